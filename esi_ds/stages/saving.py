"""When a run saves what it has computed: not before a stated time, so that short runs save nothing (docs/design.md §8).

This affects when something is written, never what. What generation and judging produce is kept as it comes, elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

SHARE = 0.05  # `save_every: auto` spends at most this share of the time on saving
Clock = Callable[[], float]  # seconds since some moment


class SaveClock:
    """Says whether a save is due. Ranks must not ask their own: they follow rank 0's answer.

    every: ``esi.save_every`` or ``tune.save_every``; a number counts micro-batches or steps, whatever the time.
    minutes: ``run.save_every_min``, until the first save and from each to the next; 0: a save is always due.
    """

    def __init__(self, every: Literal["auto"] | int, minutes: float, clock: Clock = time.monotonic):
        self._every, self._least_s, self._clock = every, 60 * minutes, clock
        self._last_save, self._save_s = clock(), 0.0

    def is_due(self, steps: int) -> bool:
        """steps: how many have passed since the last save."""
        if self._every != "auto":
            return steps >= self._every
        if self._least_s == 0:
            return True
        return self._clock() - self._last_save >= max(self._least_s, self._save_s / SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A context manager around every save, which it times."""
        started = self._clock()
        yield
        self._last_save = self._clock()
        self._save_s = self._last_save - started
