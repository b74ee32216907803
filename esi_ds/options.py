"""What the command line says besides the config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What the command line says besides the config. ``world_size``, ``nodes`` and the memories: ranks, on how many
    nodes, and what a GPU and a node hold, that a dry run plans for. ``launcher``: what
    ``launch_environment.launcher_processes`` returned when the process began."""

    dry_run: bool = False
    world_size: int | None = None
    nodes: int | None = None
    gpu_memory_gib: float = 80.0
    node_memory_gib: float = 2048.0
    verbose: bool = False
    allow_fingerprint_mismatch: bool = False
    launcher: tuple[tuple[int, int], ...] = ()
