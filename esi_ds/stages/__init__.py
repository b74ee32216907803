"""The stages, a package each: its ``run`` module checks and plans before anything heavy is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from esi_ds.config import Config
from esi_ds.options import Options

# Name as in ``launch/<stage>.py`` → module and function of its entry. Imported on demand: each loads other libraries.
ENTRIES = {
    "esi": ("esi_ds.stages.esi.run", "run"),
    "set": ("esi_ds.stages.tune.run", "run_set"),
    "spa": ("esi_ds.stages.tune.run", "run_spa"),
    "eval": ("esi_ds.stages.evaluate.run", "run"),
    "perturb": ("esi_ds.stages.perturb.run", "run"),
}


def entry(stage: str) -> Callable[[Config, Options], None]:
    """The function that runs a stage. It raises UserError for whatever can be checked beforehand, and Interrupted."""
    module, function = ENTRIES[stage]
    run: Callable[[Config, Options], None] = getattr(importlib.import_module(module), function)

    def run_in_one_dtype(config: Config, options: Options) -> None:
        from esi_ds.stages.dtype import with_dtype

        run(with_dtype(config, options.dry_run), options)

    return run_in_one_dtype
