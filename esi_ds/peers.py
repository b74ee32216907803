"""The other ranks of this host: which of them died of a signal, said by one that lives on.

A rank that C++ aborts, as NCCL's watchdog does, or that the system kills, says nothing of its own, and under NCCL the
others wait in a collective without an error until the launcher ends them. A thread of each rank therefore waits for the
ends of the others' processes (pidfd, Linux 5.3). The signal is known until the launcher has asked for it, which
DeepSpeed's and torchrun's do at intervals; under launchers that ask at once (srun, mpirun) they say it themselves.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from esi_ds.errors import UserError
from esi_ds.lock import own_identity
from esi_ds.status import progress_of

# How launchers end ranks, and how a user does: no death to report.
ASKED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
CAUSES = {
    signal.SIGABRT: "an error in C++, or NCCL's watchdog, which ends a rank whose collective failed or waited for "
    "longer than run.collective_timeout_s (raise it where ranks may be that far apart, as with long responses); its "
    "own message is above",
    signal.SIGKILL: "the host ran out of memory, or it was killed, as launchers do to ranks that do not end in time",
}
FAULT = "a fault in a library or a driver; the stack above says where"


class RankProcess(NamedTuple):
    """A rank's process. table: host, boot and process table, as of ``lock.own_identity``: what its id is of."""

    rank: int
    pid: int
    table: tuple[str, str | None, str | None]


def own_process(rank: int) -> RankProcess:
    """This process."""
    identity = own_identity()
    return RankProcess(rank, identity["pid"], (identity["host"], identity["boot"], identity["pids"]))


class PeerWatch:
    """A context manager: inside it the death of another rank of this host is reported on stderr by the lowest
    surviving rank.

    ranks: all ranks' processes, this one's included. run: the run's folder, whose status says how far it was.
    """

    def __init__(self, rank: int, ranks: Iterable[RankProcess], run: Path):
        this_process, *_ = (process for process in ranks if process.rank == rank)
        self._rank, self._run = rank, run
        self._processes: dict[int, RankProcess] = {}  # by pidfd
        if hasattr(os, "pidfd_open"):
            for process in ranks:
                if process.table == this_process.table and process.rank != rank:
                    with suppress(OSError):  # an old kernel, or a rank that has ended already
                        self._processes[os.pidfd_open(process.pid)] = process
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> PeerWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # perhaps of a collective, which fails as a rank dies: say that first
            self._thread.join(0.3)
        os.close(self._waker)
        self._thread.join()
        for descriptor in (self._wake, *self._processes):
            os.close(descriptor)

    def _watch(self) -> None:
        """Wait for the ends of other ranks, until one died of a signal or the block is left."""
        poll, living = select.poll(), dict(self._processes)
        poll.register(self._wake, 0)  # tells that the other end is closed
        for descriptor in living:
            poll.register(descriptor, select.POLLIN)
        while living:
            for descriptor, _ in poll.poll():
                if descriptor == self._wake:
                    return
                poll.unregister(descriptor)
                process = living.pop(descriptor)
                code = exit_code(process.pid)
                if code in (0, None):
                    continue
                is_first = all(self._rank < other.rank for other in living.values())
                if code < 0 and -code not in ASKED and is_first:
                    print(f"\n{death_message(process, signal.Signals(-code), self._run)}", file=sys.stderr, flush=True)
                return  # the launcher ends the others now


def exit_code(pid: int) -> int | None:
    """Exit code of a process that has ended, negative for a signal; None if its parent has collected it already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None  # proc(5): exit_code
    except (OSError, ValueError):
        return None


def death_message(process: RankProcess, number: signal.Signals, run: Path) -> str:
    """One line about a rank that a signal ended."""
    progress = None
    with suppress(UserError, OSError):
        progress = progress_of(run)
    where = f" during {progress}" if progress else ""
    return (
        f"rank {process.rank} died of {number.name}{where} (process {process.pid} on {process.table[0]}): "
        f"{CAUSES.get(number, FAULT)}. Start the same command again to continue"
    )
