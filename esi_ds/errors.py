"""Errors that end a run with a message instead of a traceback."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """The user's mistake (config, data, artifact): exit code 2. Its text names field, value, problem and remedy."""

    def __init__(self, field: str, value: Any, problem: str, remedy: str):
        super().__init__(field, value, problem, remedy)  # as arguments, so that it survives pickling between ranks
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy

    def __str__(self) -> str:
        value = (
            ""
            if self.value is None
            else f" = {self.value!r}"
            if not isinstance(self.value, str)
            else f" = {self.value}"
        )
        # One line, whatever was given: a template or a library's message may hold many.
        return " ".join(f"{self.field}{value}: {self.problem}; {self.remedy}".split("\n"))


class Interrupted(Exception):
    """Stopped by a signal with everything saved: exit code 75, start again to go on."""
