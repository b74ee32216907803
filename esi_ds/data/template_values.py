"""Values that the user gives the chat template (``model.template_kwargs``), such as ``enable_thinking``.

They are set at the head of the template itself, so that whoever renders it renders with them: scoring, tuning,
evaluation and lm-eval alike.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from esi_ds.errors import UserError
from esi_ds.reading import first_line

GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # of transformers; other parsers do not know it
FIELD = "model.template_kwargs"


def set_values(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Set the values at the head of the tokenizer's chat template."""
    head = _head(values)
    template: Any = tokenizer.chat_template
    if head and isinstance(template, Mapping):  # by name, of which "default" is rendered
        tokenizer.chat_template = {name: head + text for name, text in template.items()}
    elif head and isinstance(template, str):
        tokenizer.chat_template = head + template


def without_values(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template as it was before ``set_values``: an exported model takes other values."""
    template: Any = tokenizer.chat_template
    if not values or template is None:
        return tokenizer
    plain, head = copy.copy(tokenizer), _head(values)
    if isinstance(template, Mapping):
        plain.chat_template = {name: text.removeprefix(head) for name, text in template.items()}
    else:
        plain.chat_template = template.removeprefix(head)
    return plain


def unread_values(template: str | Mapping[str, str] | None, values: Mapping[str, Any]) -> list[str]:
    """The names that the template does not read. Raises UserError for a template that is not Jinja."""
    if not values:
        return []
    if isinstance(template, Mapping):
        template = template.get("default")
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAG.sub("", str(template or "")))
    except TemplateError as error:
        problem = f"cannot be set: the chat template is not Jinja ({first_line(error)})"
        raise UserError(FIELD, dict(values), problem, "give a model.chat_template") from error
    variables = meta.find_undeclared_variables(parsed)
    return [name for name in values if name not in variables]


def check_read(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Raise UserError for a value that the tokenizer's chat template does not read: it would change nothing."""
    for name in unread_values(tokenizer.chat_template, values):
        raise UserError(
            f"{FIELD}.{name}",
            values[name],
            f"is not read by the chat template of {tokenizer.name_or_path}",
            "take it out, or give a model.chat_template that reads it",
        )


def _head(values: Mapping[str, Any]) -> str:
    """Jinja statements; each takes the line break behind it along, so that the template begins a line as before."""
    return "".join(f"{{% set {name} = {_literal(value)} %}}\n" for name, value in values.items())


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
