"""The gradients that each criterion needs (docs/method.md §2). Imports no torch, because the config reads it first.

Each objective is one pass over its data. ``safety`` gives the mean gradient g_S of the judge's score S, ``tuning`` the
mean gradient g_T of the loss on ``data.tuning``, and ``benign`` the mean squared gradient F of single rows of
``data.benign`` (diagonal Fisher).
"""

from __future__ import annotations

GRADIENTS: dict[str, tuple[str, ...]] = {
    "esi": ("safety",),
    "grad": ("safety",),
    "snip": ("safety",),
    "tuning_grad": ("tuning",),
    "directed": ("safety", "tuning"),
    "conflict": ("safety", "tuning"),
    "magnitude": (),
    "random": (),
}


def objectives(criterion: str, contrastive: bool) -> tuple[str, ...]:
    """The objectives that a criterion needs, in the order of their passes."""
    return (*GRADIENTS[criterion], "benign") if contrastive else GRADIENTS[criterion]
