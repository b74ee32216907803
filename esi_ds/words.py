"""Numbers as they stand in sentences."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 cell", "2 cells", "1,000 cells": a number with its noun, of which the plural only adds an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
