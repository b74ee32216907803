"""Errors that end a run with a message instead of a traceback."""

from __future__ import annotations

from typing import Any

from esi_ds.terminal import printable


class UserError(Exception):
    """The user's mistake (config, data, artifact): exit code 2. Its text names field, value, problem and remedy."""

    def __init__(self, field: str, value: Any, problem: str, remedy: str):
        super().__init__(field, value, problem, remedy)  # as arguments, so that it can be pickled between ranks
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {self.value if isinstance(self.value, str) else repr(self.value)}"
        # One line, even if the value or a library's message has several.
        return printable(" ".join(f"{self.field}{value}: {self.problem}; {self.remedy}".split("\n")))


class Interrupted(Exception):
    """Stopped by a signal after saving everything: exit code 75; the same command resumes the run."""
