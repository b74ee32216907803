"""Reduce-scatters that run beside the backward pass: started, and received a little later in the same order.

Under NCCL a collective runs on a stream of its own. Until it has been waited for, nothing may overwrite or free what
it reads and writes, so both buffers are kept here. Waiting does not stop the CPU: it makes the current stream wait.
gloo's collectives run in threads of their own, and waiting does stop the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import Work

from esi_ds.core.footprint import IN_FLIGHT, IN_FLIGHT_LIMIT


@dataclass(frozen=True)
class Reduction:
    """One reduce-scatter in flight. send: what this rank adds. local: this rank's part of the sum, once received.

    receive: is called with ``local`` when the sum is there.
    """

    work: Work
    send: Tensor
    local: Tensor
    receive: Callable[[Tensor], None]

    @property
    def nbytes(self) -> int:
        return self.send.nbytes + self.local.nbytes

    def finish(self) -> None:
        self.work.wait()
        if self.local.device.type != "cpu":
            # Autograd may run hooks on other streams than the one that allocated the buffers; the allocator must not
            # give them away before this stream is done with them. Without effect on the allocating stream.
            for tensor in (self.send, self.local):
                tensor.record_stream(get_accelerator().current_stream())
        self.receive(self.local)


class InFlight:
    """Reductions that have been started, oldest first. Every rank must make the same calls with the same sizes.

    most: how many may be in flight; 0: each is waited for at once. most_bytes: of all their buffers together; a larger
    reduction is waited for at once.
    """

    def __init__(self, most: int = IN_FLIGHT, most_bytes: int = IN_FLIGHT_LIMIT):
        self._most, self._most_bytes = most, most_bytes
        self._waiting: deque[Reduction] = deque()

    def make_room(self, nbytes: int) -> None:
        """Receive the oldest until one more of ``nbytes`` fits; call before its buffers are sent."""
        while self._waiting and not self._fits(nbytes):
            self._waiting.popleft().finish()

    def _fits(self, nbytes: int) -> bool:
        held = sum(reduction.nbytes for reduction in self._waiting)
        return len(self._waiting) < self._most and held + nbytes <= self._most_bytes

    def add(self, reduction: Reduction) -> None:
        """Keep a reduction that has just been started; receive it now if it must not be in flight."""
        self._waiting.append(reduction)
        if not self._most or reduction.nbytes > self._most_bytes:
            self.receive_all()

    def receive_all(self) -> None:
        """Wait for everything in flight, oldest first."""
        while self._waiting:
            self._waiting.popleft().finish()

    def forget(self) -> None:
        """Wait for nothing more, after an error: other ranks may never take part. The sums are lost."""
        self._waiting.clear()

    def __len__(self) -> int:
        return len(self._waiting)
