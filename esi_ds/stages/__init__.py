"""The stages: one room each, whose ``run`` refuses and plans before anything heavy is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from esi_ds.config import Config
from esi_ds.options import Options

# As in ``launch/<stage>.py`` → module and function of its entry.
ENTRIES = {
    "esi": ("esi_ds.stages.esi.run", "run"),
    "set": ("esi_ds.stages.tune.run", "run_set"),
    "spa": ("esi_ds.stages.tune.run", "run_spa"),
    "eval": ("esi_ds.stages.evaluate.run", "run"),
    "perturb": ("esi_ds.stages.perturb.run", "run"),
}


def entry(stage: str) -> Callable[[Config, Options], None]:
    """The function that runs a stage to its end, or raises ``Interrupted``; it refuses first what can be refused."""
    module, function = ENTRIES[stage]
    return getattr(importlib.import_module(module), function)
