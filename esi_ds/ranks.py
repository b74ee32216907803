"""The processes that share some work, and which of them this one is: one alone, or the ranks of ``mpirun``.

``zero.runtime.JobRanks`` are those of a stage's process group.
"""

from __future__ import annotations

import time
from typing import TypeVar

from torch import Tensor

from esi_ds import launch_environment
from esi_ds.launch_environment import LaunchEnvironment

Item = TypeVar("Item")

ERROR_WAIT_S = 5.0  # how long a process that failed waits before it concludes that the others did not fail


class Ranks:
    """One process alone: all of the work is its own, and its counts are the totals."""

    rank, size = 0, 1

    def add(self, counts: Tensor) -> Tensor:
        """The sum over all ranks, on every rank. counts: int64, contiguous, on the CPU; may be overwritten."""
        return counts

    def gather(self, item: Item) -> list[Item]:
        """Every rank's item in rank order, on every rank."""
        return [item]

    def reports_error(self) -> bool:
        """Whether this process, which has failed, is the one to print its error.

        If only some processes failed, the others would wait for them forever: call ``abort`` after printing.
        """
        return True

    def abort(self) -> None:
        """End the other processes if they will not end by themselves."""


class MpiRanks(Ranks):
    """The processes of ``mpirun``, on any number of nodes; ``add`` and ``gather`` are one collective each."""

    def __init__(self, environment: LaunchEnvironment):
        """Raises UserError if mpi4py is missing or sees other processes than the launcher started."""
        self._world = launch_environment.mpi_world(environment)
        self.rank, self.size = environment.rank, environment.world_size
        self._errors = self._world.Dup()  # a separate communicator: the others may be inside a collective of the work
        self._failed_alone = False

    def add(self, counts: Tensor) -> Tensor:
        from mpi4py import MPI

        self._world.Allreduce(MPI.IN_PLACE, counts.numpy())
        return counts

    def gather(self, item: Item) -> list[Item]:
        return self._world.allgather(item)

    def reports_error(self) -> bool:
        request, deadline = self._errors.Ibarrier(), time.monotonic() + ERROR_WAIT_S
        while not request.Test() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._failed_alone = not request.Test()
        return self._failed_alone or self.rank == 0

    def abort(self) -> None:
        if self._failed_alone:
            self._world.Abort(1)


def find_ranks() -> Ranks:
    """The processes that this one was started with. Needs mpi4py only if there are several."""
    environment = launch_environment.read()
    return Ranks() if environment.world_size == 1 else MpiRanks(environment)
