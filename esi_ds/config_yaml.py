"""YAML as people write it, and ``key.path=value`` overrides of what a file says."""

from __future__ import annotations

import re
from typing import Any

import yaml

from esi_ds.errors import UserError


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as everybody means it; YAML 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The content of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set the value of ``key.path=value`` in ``raw``; missing sections are created, missing list items are not.

    The value is read as YAML. Raises UserError.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError("override", override, "is not key.path=value", "write for instance select.ratio=0.05")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(key, text, "is not a valid YAML value", "quote it") from error
    section: Any = raw
    for part in parts[:-1]:
        index = _index(section, part, key, text)
        if isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
        section = section[index]
    section[_index(section, parts[-1], key, text)] = value


def _index(section: Any, part: str, key: str, text: str) -> str | int:
    """How ``part`` of the key indexes a section or a list."""
    if isinstance(section, list):
        if not part.isdecimal() or int(part) >= len(section):
            raise UserError(key, text, f"{part} is not a number of the list before it", "count from 0")
        return int(part)
    if not isinstance(section, dict):
        raise UserError(key, text, f"the key before {part} is not a section", "give a key.path of the config")
    return part
