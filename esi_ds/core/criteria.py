"""What each criterion is made of (docs/method.md §2). Imports no torch: the config reads it first.

An objective is data, a loss and what is kept of its gradient: ``safety`` the mean gradient g_S of the judge's score S,
``tuning`` the mean gradient g_T of the loss on ``data.tuning``, ``benign`` the mean square F of the gradients of single
rows of ``data.benign`` (diagonal Fisher).
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
    """Names of the passes that a criterion needs, in the order in which they run."""
    return (*GRADIENTS[criterion], "benign") if contrastive else GRADIENTS[criterion]
