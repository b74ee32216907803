"""``launch/perturb.py``: what can be refused or planned without weights, then the run itself."""

from __future__ import annotations

from esi_ds.config import Config
from esi_ds.core.mask import identity, unread
from esi_ds.options import Options
from esi_ds.stages.folder import open_folder
from esi_ds.stages.perturb.prepare import prepare_perturb
from esi_ds.stages.plan.perturbation import plan_perturb


def run(config: Config, options: Options, stage: str) -> None:
    """Run the stage to its end, or to an ``Interrupted``. Everything that can be refused is refused first."""
    if options.dry_run:
        plan_perturb(config, options)
        return
    inputs = prepare_perturb(config)
    source = {**inputs.source, **identity(inputs.mask)}
    folder = open_folder(config, stage, source, "perturb", unread(inputs.mask))
    from esi_ds.stages.perturb.work import PerturbRun  # loads deepspeed

    PerturbRun.start(stage, config, options, inputs, folder, source)
