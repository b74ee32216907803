"""The stages, a package each: its ``run`` module checks and plans before anything heavy is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.errors import UserError
from esi_ds.options import Options

# Name as in ``launch/<stage>.py`` → module whose ``run`` runs it. Imported on demand: each loads other libraries.
ENTRIES = {
    "esi": "esi_ds.stages.esi.run",
    "set": "esi_ds.stages.tune.run",
    "spa": "esi_ds.stages.tune.run",
    "eval": "esi_ds.stages.evaluate.run",
    "perturb": "esi_ds.stages.perturb.run",
}


def entry(stage: str) -> Callable[[Config, Options], None]:
    """The function that runs a stage. It raises UserError for whatever can be checked beforehand, and Interrupted."""

    def run(config: Config, options: Options) -> None:
        if not options.dry_run:  # which makes notes of what is not there yet
            from esi_ds.stages.paths import check_paths

            check_paths(config, stage)
        from esi_ds.stages.begun import keep_commits, with_date, with_dtype  # imports torch

        keep_commits(config)
        room = importlib.import_module(ENTRIES[stage])
        resolved = with_dtype(config, options.dry_run)
        room.run(resolved if options.dry_run else with_date(resolved), options, stage)
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
