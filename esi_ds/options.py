"""The command line's options besides the config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """``world_size``, ``nodes`` and the memory sizes are those that a dry run plans for; ``launcher`` is the value of
    ``launch_environment.launcher_processes`` at the start."""

    dry_run: bool = False
    world_size: int | None = None
    nodes: int | None = None
    gpu_memory_gib: float = 80.0
    node_memory_gib: float = 2048.0
    verbose: bool = False
    allow_fingerprint_mismatch: bool = False
    launcher: tuple[tuple[int, int], ...] = ()
