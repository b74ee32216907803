"""Preemption: SIGTERM and SIGUSR1 set a flag that stages look at between micro-batches (DESIGN §8)."""

from __future__ import annotations

import signal


class StopSignal:
    """``raised`` becomes True with the first signal. Nothing is ever saved inside the handler."""

    def __init__(self):
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.raised = True
