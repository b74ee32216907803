"""The names of lm-eval's tasks, groups and tags, read from the text of their definitions in a second or two.

lm-eval's own index parses 14,000 YAML files in ten seconds or more: too long to tell that a name is misspelt.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import yaml

# The keys of a definition that say what it is called, with the lines of their values.
KEYS = re.compile(r"""^["']?(?:task|group|tag|include|class)\b.*(?:\n(?:[ \t#-].*)?)*""", re.MULTILINE)
IS_CLASS = re.compile(r"""["']?class\b""")


@functools.cache
def names_in(folder: Path) -> frozenset[str]:
    """Names of the tasks, groups and tags that the definitions in ``folder`` and its folders give.

    A file that is not named .yaml counts where another one includes it, as in lm-eval.
    """
    waiting = list(folder.rglob("*.yaml"))
    seen, names = set(waiting), set[str]()
    while waiting:
        path = waiting.pop()
        keys = _keys(path)
        names |= _names(keys)
        included = {Path(os.path.normpath(path.parent / name)) for name in _texts(keys.get("include"))} - seen
        seen |= included
        waiting += included
    return frozenset(names)


def _keys(path: Path) -> dict[str, Any]:
    """The keys of one file that ``KEYS`` names; none if the file cannot be read, which lm-eval passes over too."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {key: value for part in KEYS.findall(text) for key, value in _parse(part).items()}


@functools.cache
def _parse(text: str) -> dict[str, Any]:
    """One key and its value; cached, as thousands of files say the same."""
    if IS_CLASS.match(text):
        return {"class": text}  # what follows has lm-eval's own tags
    try:
        return yaml.load(text, yaml.CSafeLoader) or {}
    except yaml.YAMLError:
        return {}


def _names(keys: dict[str, Any]) -> set[str]:
    """What a file with these keys names. A list under ``task`` has the members of a group, which files of their own
    define; a task written in Python is not a group, whatever else its definition says."""
    task, group = keys.get("task"), None if "class" in keys else keys.get("group")
    return {name for name in (task, group, *_texts(keys.get("tag"))) if isinstance(name, str)}


def _texts(value: Any) -> list[str]:
    """The texts of a value that is one text or a list of them."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
