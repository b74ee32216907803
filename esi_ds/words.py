"""Numbers as they stand in sentences."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 20


def counted(number: int, noun: str) -> str:
    """ "1 cell", "2 cells", "1,000 cells", "2 batches": a number with its noun, whose plural adds an s or es."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def part_of(number: int, total: int) -> str:
    """ "3 of the 5", "all 5": some of them, or all."""
    return f"all {total}" if number == total else f"{number} of the {total}"


def first_of(items: Sequence[object], separator: str = ", ") -> str:
    """ "1, 2, 3", "1, 2, 3 and 80 more": a list for a line or a cell, where there may be thousands."""
    more = f" and {len(items) - MAX_LISTED:,} more" if len(items) > MAX_LISTED else ""
    return separator.join(map(str, items[:MAX_LISTED])) + more


def ends_of(names: Sequence[str], length: int) -> list[str]:
    """The last ``length`` characters of each name, or as many more as tell different names apart.

    The end of a path tells more than its beginning.
    """
    while len({name[-length:] for name in names}) < len(set(names)):
        length += 1
    return [name[-length:] for name in names]
