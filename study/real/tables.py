"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOT_RUN = "not run"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A head and lines of as many cells."""
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"
