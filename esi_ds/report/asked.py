"""How a model was asked, for pages and cards: what the config sets of it, by which answers and losses differ."""

from __future__ import annotations

import json

from esi_ds.config import Model
from esi_ds.data.chat import is_jinja


def asked_as(section: Model, template_sha256: str | None = None) -> dict[str, str]:
    """Rows of a table; settings that are the default have none. section: ``model`` of the config. template_sha256: of
    its chat template, to show where no copy of it is at hand."""
    facts: dict[str, str] = {}
    if section.system_prompt is not None:
        facts["system prompt"] = section.system_prompt or "a turn without text"
    if section.template_kwargs:
        values = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in section.template_kwargs.items())
        facts["values for chat templates"] = ", ".join(values)
    if section.chat_template is not None:
        origin = "a text in the config" if is_jinja(section.chat_template) else section.chat_template
        facts["chat template"] = origin + (f", sha256 {template_sha256}" if template_sha256 is not None else "")
    if section.date != "auto":
        facts["date for chat templates"] = section.date
    if section.thought_marks is not None:
        facts["marks of thoughts"] = " … ".join(section.thought_marks)
    return facts
