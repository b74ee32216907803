"""The stages, a package each: its ``run`` module checks and plans before anything heavy is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.errors import UserError
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

    def run(config: Config, options: Options) -> None:
        if not options.dry_run:  # which makes notes of what is not there yet
            from esi_ds.stages.paths import check_paths

            check_paths(config, stage)
        from esi_ds.stages.commits import keep_commits
        from esi_ds.stages.date import with_date
        from esi_ds.stages.dtype import with_dtype  # imports torch

        keep_commits(config)
        work: Callable[[Config, Options], None] = getattr(importlib.import_module(module), function)
        resolved = with_dtype(config, options.dry_run)
        work(resolved if options.dry_run else with_date(resolved), options)
        if options.dry_run:
            _note_folder(with_date(resolved), stage)

    return run


def _note_folder(config: Config, stage: str) -> None:
    """Say, after a plan, why a run would be refused by its folder."""
    folder = RunFolder(config.run.output_dir)
    try:
        folder.check(config)
        folder.check_stage(stage)
    except UserError as error:
        print(f"\nA run would be refused: {error}")
