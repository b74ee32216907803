"""Preemption: SIGTERM, SIGUSR1 and Ctrl-C set a flag that stages check between micro-batches (docs/design.md §8).

The end of the launcher sets it too: its ranks would go on unseen, holding devices and the run folder. The flag belongs
to the process, not to a loop, so that a signal between two parts of a run is not lost. Nothing is ever saved inside the
handler. Before a stage listens there is nothing to save, and signals end the process (``cli.end_at_signals``).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

from esi_ds.errors import Interrupted
from esi_ds.zero import runtime

LOOK_S = 0.25  # between two looks at the launcher

_stop_requested, _ctrl_c = threading.Event(), threading.Event()


def listen(launcher: tuple[tuple[int, int], ...] = ()) -> None:
    """From now on signals set the flag instead of ending the process, and so does the end of the launcher.

    launcher: (process id, id of its parent) of each process between this rank and the launcher; empty: none is
    watched.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: _stop_requested.set())
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a job in a shell's background
        signal.signal(signal.SIGINT, _stop_or_end)
    if launcher:
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _stop_or_end(*_: object) -> None:
    """Ctrl-C: the first sets the flag, a second ends the process without saving."""
    if _ctrl_c.is_set():
        raise KeyboardInterrupt
    _ctrl_c.set()
    _stop_requested.set()
    if runtime.rank() == 0:
        os.write(2, b"\nsaving after the current step, then stopping; Ctrl-C again ends at once\n")


def _watch(launcher: tuple[tuple[int, int], ...]) -> None:
    while all(_parent(process) == parent for process, parent in launcher):
        time.sleep(LOOK_S)
    print(f"rank {runtime.rank()}: the launcher is gone; saving, then ending", file=sys.stderr, flush=True)
    _stop_requested.set()


def _parent(process: int) -> int | None:
    try:
        return psutil.Process(process).ppid()
    except psutil.NoSuchProcess:
        return None


def stop_requested() -> bool:
    """Whether a signal, or the end of the launcher, asks this rank to stop. Others may not know yet: ranks must agree
    before one of them stops."""
    return _stop_requested.is_set()


def check_stop(done: str, save: Callable[[], None] | None = None) -> None:
    """Raise Interrupted on every rank if any of them was signalled.

    done: what is saved, in words. save: does that first, on every rank. Collectives: one gather, and those of ``save``.
    """
    if any(runtime.gather_objects(stop_requested())):
        if save is not None:
            save()
        raise Interrupted(f"stopped by a signal with {done}; start again to continue")
