"""Main memory that this host still has for the job: what the system calls available, within the limits of cgroups.

Containers, Slurm and Kubernetes limit a job by cgroups, which ``psutil`` does not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

OWN_GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Version 2 and 1: limit, usage, and in memory.stat the pages of files that the kernel gives up first.
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(own_groups: Path = OWN_GROUPS, mount: Path = MOUNT) -> int:
    """Bytes that processes of this host may still take before one is killed; at least 0."""
    room = [room for folder in _group_folders(own_groups, mount) for room in _room(folder)]
    return max(0, min([psutil.virtual_memory().available, *room]))


def _group_folders(own_groups: Path, mount: Path) -> Iterator[Path]:
    """The folders of this process's memory cgroups and of all that they lie in, each of which may set a limit.

    own_groups: lines ``<number>:<controllers>:<path>``, of version 2 without controllers. Within a container the path
    may not exist, and the limit is the mount's own.
    """
    with suppress(OSError):
        for line in own_groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = mount / "memory" if controllers else mount
            folder = top / path.lstrip("/")
            yield from [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


def _room(folder: Path) -> Iterator[int]:
    """What the limit of one cgroup leaves; nothing where there is none."""
    for limit, usage, reclaimable in FILES:
        with suppress(OSError, ValueError):  # "max" means no limit
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage).read_text()) - int(statistics.get(reclaimable, 0))
            yield int((folder / limit).read_text()) - used
