"""``launch/set.py`` and ``launch/spa.py``: what can be refused or planned without weights, then the run itself."""

from __future__ import annotations

from esi_ds import launch_environment
from esi_ds.config import Config
from esi_ds.config.needs import check_mix
from esi_ds.core.mask import identity, unread
from esi_ds.options import Options
from esi_ds.stages.folder import open_folder
from esi_ds.stages.plan.tuning import print_tuning_plan
from esi_ds.stages.tune.prepare import prepare_tuning


def run(config: Config, options: Options, stage: str) -> None:
    """Run SET or SPA to its end, or to an ``Interrupted``. Everything that can be refused is refused first."""
    if options.dry_run:
        print_tuning_plan(config, options, stage)
        return
    inputs = prepare_tuning(config, stage)
    check_mix(inputs.tune, launch_environment.read().world_size)
    source = {**inputs.source, **identity(inputs.mask)}
    folder = open_folder(config, stage, source, "tune", unread(inputs.mask))
    from esi_ds.stages.tune.work import TuneRun  # loads deepspeed

    TuneRun.start(stage, config, options, inputs, folder, source)
