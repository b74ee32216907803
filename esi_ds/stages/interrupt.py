"""Preemption: SIGTERM and SIGUSR1 set a flag that stages look at between micro-batches (DESIGN §8).

The flag is the process's, not a loop's: a signal between two parts of a run is not lost. Nothing is ever saved inside
the handler.
"""

from __future__ import annotations

import signal
import threading

from esi_ds.errors import Interrupted
from esi_ds.zero import runtime

_told = threading.Event()


def listen() -> None:
    """From now on the signals set the flag instead of ending the process."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: _told.set())


def told_to_stop() -> bool:
    """Whether this rank has had a signal. Others may not: ranks must agree before one of them stops."""
    return _told.is_set()


def check_stop(done: str) -> None:
    """Raise Interrupted on every rank where one of them was told to stop. One gather."""
    if any(runtime.gather_objects(told_to_stop())):
        raise Interrupted(f"stopped by a signal with {done}; start again to go on")
