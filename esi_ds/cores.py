"""Which cores a rank computes on: its share of its host's, near its GPU where the system says which those are.

Read from Linux's ``/sys``; imports no torch. Cores are named by the numbers of their hardware threads, as the kernel's
affinity does, and shares are made of whole cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/sys")


@dataclass(frozen=True)
class Affinity:
    """Where a rank runs before the cores are shared.

    cores: hardware threads that the kernel lets it run on. near: those at its GPU's memory; () without a GPU, or
    where the system does not tell.
    """

    host: str
    cores: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class CoreShare:
    """What a rank computes on: hardware threads, and how many threads of a computation they carry, one a core."""

    cores: tuple[int, ...]
    num_threads: int


def near_gpu(address: str, system: Path = SYSTEM) -> tuple[int, ...]:
    """The hardware threads at the memory of a PCI device, ``0000:3b:00.0``; () where the system does not tell."""
    folder = system / "bus/pci/devices" / address.lower()
    try:
        if int((folder / "numa_node").read_text()) < 0:
            return ()
        return parse((folder / "local_cpulist").read_text())
    except (OSError, ValueError):
        return ()


def share(ranks: Sequence[Affinity], rank: int, system: Path = SYSTEM) -> CoreShare:
    """The part of its host's cores that a rank computes on. ranks: all ranks of the job, in order.

    Ranks of a host with the same cores were bound by nobody. They divide them: those near their GPUs among the ranks
    near the same ones, where that is known of all these ranks. A rank whose cores nobody shares keeps them, as they
    were chosen for it; if they are all cores of the host, they were not, and it takes those near its GPU. More ranks
    than cores are not bound.
    """
    local = ranks[rank]
    sharing = [number for number, other in enumerate(ranks) if (other.host, other.cores) == (local.host, local.cores)]
    near = {number: tuple(core for core in ranks[number].near if core in local.cores) for number in sharing}
    chosen, members = local.cores, sharing
    if _are_separate(near.values()) and (len(sharing) > 1 or set(local.cores) == set(_online(system))):
        chosen = near[rank]
        members = [number for number in sharing if near[number] == chosen]
    physical = _physical_cores(chosen, system)
    size = len(physical) // len(members)
    if size > 0 and len(members) > 1:
        first = members.index(rank) * size
        physical = physical[first : first + size]
        chosen = tuple(sorted(core for siblings in physical for core in siblings))
    return CoreShare(chosen, max(1, size))


def _are_separate(sets: Iterable[tuple[int, ...]]) -> bool:
    """Whether none of some sets of cores is empty, and any two are equal or share nothing."""
    different = set(sets)
    return all(different) and sum(map(len, different)) == len(set().union(*different))


def _online(system: Path) -> tuple[int, ...]:
    """The hardware threads of the host; () where the system does not tell."""
    try:
        return parse((system / "devices/system/cpu/online").read_text())
    except (OSError, ValueError):
        return ()


def _physical_cores(cores: Iterable[int], system: Path) -> list[list[int]]:
    """Hardware threads grouped by the core that they are of, in the order of each core's first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for core in sorted(cores):
        try:
            siblings = parse((system / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text())
        except (OSError, ValueError):
            siblings = (core,)
        groups.setdefault(siblings, []).append(core)
    return list(groups.values())


def parse(text: str) -> tuple[int, ...]:
    """The numbers of a list as the kernel writes it: ``0-3,8``. Raises ValueError."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def describe(cores: Iterable[int]) -> str:
    """Numbers as the kernel writes them: ``0-3,8``."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
