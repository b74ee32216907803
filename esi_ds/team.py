"""The processes that share a tool's work: one alone, or those that ``mpirun`` started, on any number of nodes."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from esi_ds import ranks

PATIENCE_S = 5.0  # until a process that has met an error believes that the others have met none


class Team:
    """One process alone: it has all of the work, and what it counts is the whole."""

    rank, size = 0, 1

    def add(self, counts: Tensor) -> Tensor:
        """The sum over all processes, on all of them. counts: int64, contiguous, on the CPU; may be overwritten."""
        return counts

    def gather(self, found: list[Any]) -> list[Any]:
        """All processes' lists one behind another, on all of them."""
        return found

    def speaks_of_error(self) -> bool:
        """Whether this process, which has met an error, is to show it. Where not all processes have met one, the others
        wait for this one for ever: it must ``abort`` when it has spoken."""
        return True

    def abort(self) -> None:
        """End the other processes if they do not end by themselves."""


class MpiTeam(Team):
    """The processes of ``mpirun``; ``add`` and ``gather`` are one collective each."""

    def __init__(self, place: ranks.Place):
        """Raises UserError where mpi4py is missing or sees other processes than the launcher started."""
        self._world = ranks.mpi_world(place)
        self.rank, self.size = place.rank, place.world_size
        self._errors = self._world.Dup()  # of its own: the others may be in a collective of the work
        self._alone = False  # in an error

    def add(self, counts: Tensor) -> Tensor:
        from mpi4py import MPI

        self._world.Allreduce(MPI.IN_PLACE, counts.numpy())
        return counts

    def gather(self, found: list[Any]) -> list[Any]:
        return [one for part in self._world.allgather(found) for one in part]

    def speaks_of_error(self) -> bool:
        request, deadline = self._errors.Ibarrier(), time.monotonic() + PATIENCE_S
        while not request.Test() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._alone = not request.Test()
        return self._alone or self.rank == 0

    def abort(self) -> None:
        if self._alone:
            self._world.Abort(1)


def find() -> Team:
    """The team that this process was started in. Needs mpi4py only where there is more than one process."""
    place = ranks.find()
    return Team() if place.world_size == 1 else MpiTeam(place)
