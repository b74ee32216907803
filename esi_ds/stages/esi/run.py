"""``launch/esi.py``: checks and plans that need no weights, then the run itself."""

from __future__ import annotations

from esi_ds.config import Config
from esi_ds.config.needs import require_esi
from esi_ds.options import Options
from esi_ds.stages.esi.prepare import prepare
from esi_ds.stages.folder import open_folder
from esi_ds.stages.plan.stages import print_plan


def run(config: Config, options: Options, stage: str) -> None:
    """Check the config and its data, then run the stage. Raises UserError and Interrupted."""
    require_esi(config)
    if options.dry_run:
        print_plan(config, options)
        return
    inputs = prepare(config)
    folder = open_folder(config, stage, inputs.source, "data")
    from esi_ds.stages.esi.work import EsiRun  # loads deepspeed

    EsiRun.start(stage, config, options, inputs, folder, inputs.source)
