"""Values that the user gives the chat template (``model.template_kwargs``), such as ``enable_thinking``, and the date.

They are set at the head of the template itself, so that whoever renders it renders with them: scoring, tuning,
evaluation and lm-eval alike.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from esi_ds.errors import UserError
from esi_ds.reading import first_line

GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # of transformers; other parsers do not know it
FIELD = "model.template_kwargs"
CLOCK = "strftime_now"  # the function by which templates ask transformers for today's date
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMpPrRSTuUVwWxXyYzZ"  # of strftime


def fixed_clock(day: date, end: str = "%}\n") -> str:
    """A Jinja macro that, at the head of a template, takes the place of ``strftime_now``: it is 00:00 of ``day``.

    end: of its last tag. "%}\n" takes the line break along, so that the template begins a line as before.
    """
    formats = [f"%{flag}{letter}" for letter in DIRECTIVES for flag in ("-", "")]
    replacements = "".join(f".replace('{text}', '{day.strftime(text)}')" for text in formats)
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replacements} }}}}{{% endmacro {end}"


def set_values(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], day: date | None = None) -> None:
    """Set the values at the head of the tokenizer's chat template, and the day where it asks for the date.

    day: None leaves it the machine's clock.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):  # by name, of which "default" is rendered
        tokenizer.chat_template = {name: _head(text, values, day) + text for name, text in template.items()}
    elif isinstance(template, str):
        tokenizer.chat_template = _head(template, values, day) + template


def without_values(
    tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], day: date | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template as it was before ``set_values``: an exported model takes other values."""
    template: Any = tokenizer.chat_template
    if template is None or (not values and day is None):
        return tokenizer
    plain = copy.copy(tokenizer)
    if isinstance(template, Mapping):
        plain.chat_template = {name: text.removeprefix(_head(text, values, day)) for name, text in template.items()}
    else:
        plain.chat_template = template.removeprefix(_head(template, values, day))
    return plain


def default_template(template: str | Mapping[str, str] | None) -> str | None:
    """What is rendered of a tokenizer's ``chat_template``, which may be several by name."""
    return template.get("default") if isinstance(template, Mapping) else template


def unread_values(template: str | Mapping[str, str] | None, values: Mapping[str, Any]) -> list[str]:
    """The names that the template does not read. Raises UserError for a template that is not Jinja."""
    if not values:
        return []
    text = GENERATION_TAG.sub("", default_template(template) or "")
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
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
            "remove it, or give a model.chat_template that reads it",
        )


def _head(template: str, values: Mapping[str, Any], day: date | None) -> str:
    """Jinja statements; each takes the line break behind it along, so that the template begins a line as before."""
    clock = fixed_clock(day) if day is not None and CLOCK in template else ""
    return clock + "".join(f"{{% set {name} = {_literal(value)} %}}\n" for name, value in values.items())


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
