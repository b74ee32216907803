"""The chat templates in a model's folder, wherever transformers reads them from, and a folder with other ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esi_ds.artifacts import write_json_atomic
from esi_ds.reading import read_text

TEMPLATE, FURTHER = "chat_template.jinja", "additional_chat_templates"
PROCESSOR = "chat_template.json"  # of image processors, in an older format; transformers prefers it to TEMPLATE
FILE_NAME = re.compile(rf"{re.escape(TEMPLATE)}|{re.escape(PROCESSOR)}|{FURTHER}/[^/\\\0]+\.jinja")
# Configurations that may hold a template under this key.
TOKENIZER_CONFIG, PROCESSOR_CONFIG, KEY = "tokenizer_config.json", "processor_config.json", "chat_template"


def chat_templates(folder: Path) -> dict[str, str]:
    """File's name → text of every chat template of a folder, as if each were in a file of its own.

    Those of the tokenizer are ``TEMPLATE`` and files in ``FURTHER``, that of a processor is ``PROCESSOR``. What cannot
    be read is left out: whoever loads the tokenizer says so.
    """
    files = [folder / TEMPLATE, *sorted((folder / FURTHER).glob("*.jinja"))]
    texts = {file.relative_to(folder).as_posix(): _text(file) for file in files}
    if not any(texts.values()):
        texts = _named(_content(folder / TOKENIZER_CONFIG).get(KEY))
    of_processor = _content(folder / PROCESSOR_CONFIG).get(KEY)
    texts[PROCESSOR] = json.dumps({KEY: of_processor}) if of_processor is not None else _text(folder / PROCESSOR)
    return {name: text for name, text in texts.items() if text is not None}


def of_tokenizer(templates: Mapping[str, str]) -> dict[str, str]:
    """The tokenizer's templates among ``chat_templates``."""
    return {name: text for name, text in templates.items() if name != PROCESSOR}


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Have a folder hold these chat templates and no others."""
    for name in (TEMPLATE, PROCESSOR):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / FURTHER, ignore_errors=True)
    for name in (TOKENIZER_CONFIG, PROCESSOR_CONFIG):
        if KEY in (content := _content(folder / name)):
            write_json_atomic(folder / name, {key: value for key, value in content.items() if key != KEY})
    for name, text in templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")


def _named(value: Any) -> dict[str, str | None]:
    """A tokenizer's template, or templates by name, as its configuration holds them."""
    if isinstance(value, str):
        return {TEMPLATE: value}
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    named = {str(row.get("name")): row["template"] for row in rows if isinstance(row.get("template"), str)}
    return {TEMPLATE if name == "default" else f"{FURTHER}/{name}.jinja": text for name, text in named.items()}


def _text(file: Path) -> str | None:
    try:
        return read_text(file)
    except (OSError, ValueError):
        return None


def _content(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none. As transformers reads it, which takes more than the standard."""
    try:
        content = json.loads(_text(file) or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
