"""Learning rates by step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, lr: float, scheduler: str, max_steps: int, warmup_ratio: float) -> float:
    """Learning rate of step ``step``, counted from 0: linear warm-up to ``lr``, then constant, linear or cosine decay.

    The decay ends at 0 after the last step, and the warm-up starts above 0, so every step changes the weights.
    """
    warmup_steps = math.ceil(warmup_ratio * max_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if scheduler == "linear":
        return lr * (1 - progress)
    if scheduler == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * progress))
    return lr
