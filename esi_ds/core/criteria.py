"""The gradients that criteria need, and share (docs/method.md §2). Imports no torch: the config reads it first.

Each objective is one pass over its data. ``safety`` gives the mean gradient g_S of the judge's score S, ``tuning`` the
mean gradient g_T of the loss on ``data.tuning``, and ``benign`` the mean squared gradient F of single rows of
``data.benign`` (diagonal Fisher). ``control`` gives the mean gradient g_C of what has nothing to do with safety: of the
same score S on benign prompts, or of a loss on benign rows.
"""

from __future__ import annotations

from collections.abc import Sequence

GRADIENTS: dict[str, tuple[str, ...]] = {
    "esi": ("safety",),
    "grad": ("safety",),
    "snip": ("safety",),
    "tuning_grad": ("tuning",),
    "directed": ("safety", "tuning"),
    "conflict": ("safety", "tuning"),
    "specific": ("safety", "control"),
    "excess": ("safety", "control"),
    "exclusive": ("safety", "tuning", "control"),
    "magnitude": (),
    "random": (),
}

# Criteria that set the scores of another criterion against the control.
AGAINST_CONTROL = {"specific": "esi", "excess": "esi", "exclusive": "directed"}

OBJECTIVES = ("safety", "control", "tuning", "benign")  # in the order of their passes


def objectives(criteria: Sequence[str], contrastive: bool, control: bool = False) -> tuple[str, ...]:
    """The objectives that any of the criteria needs, each once, in the order of their passes. control: whether the
    config has one, whose pass is made for the report in any case."""
    needed = {objective for criterion in criteria for objective in GRADIENTS[criterion]}
    if contrastive:
        needed.add("benign")
    if control:
        needed.add("control")
    return tuple(objective for objective in OBJECTIVES if objective in needed)


def overwrites_gradient(criteria: Sequence[str], number: int) -> bool:
    """Whether the scores of criterion ``number`` may take the place of a gradient: the first that it needs, which no
    later criterion reads."""
    gradient = GRADIENTS[criteria[number]][:1]
    return bool(gradient) and all(gradient[0] not in GRADIENTS[later] for later in criteria[number + 1 :])


def num_held(criteria: Sequence[str], contrastive: bool, control: bool = False) -> int:
    """The most fp32 values a scored weight that exist at once: means of gradients, and scores beside them."""
    beside = any(not overwrites_gradient(criteria, number) for number in range(len(criteria)))
    return len(objectives(criteria, contrastive, control)) + beside
