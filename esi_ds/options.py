"""What the command line offers besides the config: the stages and their options."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = {  # stage → what it does
    "esi": "score weights by their Expected Safety Impact and write a mask",
    "set": "tune only the weights of a mask",
    "spa": "tune all scored weights except those of a mask",
    "perturb": "add noise to the weights of a mask and see what breaks",
    "eval": "measure attack success, over-refusal and skill",
}


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
