"""Errors that end a run with a message instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import PurePath
from typing import Any, ParamSpec

from esi_ds.terminal import printable

Arguments = ParamSpec("Arguments")
MAX_PART = 1000  # characters of a part of a message
NOT_TEXT = {"", "~", "null", "true", "false", "yes", "no", "on", "off"}  # what YAML reads without quotation marks


class UserError(Exception):
    """The user's mistake (config, data, artifact): exit code 2. Its text names field, value, problem and remedy."""

    def __init__(self, field: str, value: Any, problem: str, remedy: str):
        super().__init__(field, value, problem, remedy)  # as arguments, so that it can be pickled between ranks
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {_as_text(self.value)}"
        # One line, even if the value or a library's message has several.
        parts = f"{_shorten(self.field)}{_shorten(value)}: {_shorten(self.problem)}; {self.remedy}"
        return printable(" ".join(parts.split("\n")))


def _as_text(value: Any) -> str:
    """A value as a user writes it: texts and paths as they are, several of them with commas between. A text that YAML
    would read as a number, a boolean or null is in quotation marks."""
    if isinstance(value, str | PurePath):
        return repr(str(value)) if _needs_quotes(str(value)) else str(value)
    parts = value if isinstance(value, list | tuple) else ()
    are_texts = all(isinstance(part, str | PurePath) and str(part) for part in parts)
    return ", ".join(map(_as_text, parts)) if parts and are_texts else repr(value)


def _needs_quotes(text: str) -> bool:
    """Whether a text without quotation marks would be taken for something else than a text."""
    with suppress(ValueError):
        float(text)
        return True
    return text.strip().lower() in NOT_TEXT


def _shorten(text: str) -> str:
    """A text without its middle, if it is so long that it would hide the rest of the message."""
    return text if len(text) <= MAX_PART else f"{text[: MAX_PART // 2]} ... {text[-MAX_PART // 2 :]}"


class Interrupted(Exception):
    """Stopped by a signal after saving everything: exit code 75; the same command resumes the run."""


def ends_with_message(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """A command of one process, which returns its exit code: a UserError is a message on stderr, and 2."""

    @wraps(main)
    def command(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return command
