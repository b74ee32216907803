"""``launch/eval.py``: what can be refused or planned without weights, then the run itself."""

from __future__ import annotations

from esi_ds.config import Config
from esi_ds.options import Options
from esi_ds.stages.evaluate.prepare import prepare_eval
from esi_ds.stages.folder import open_folder
from esi_ds.stages.plan.evaluation import plan_eval


def run(config: Config, options: Options, stage: str) -> None:
    """Run the stage to its end, or to an ``Interrupted``. Everything that can be refused is refused first."""
    if options.dry_run:
        plan_eval(config, options)
        return
    inputs = prepare_eval(config)
    folder = open_folder(config, stage, inputs.source, "eval")
    from esi_ds.stages.evaluate.work import EvalRun  # loads deepspeed

    EvalRun.start(stage, config, options, inputs, folder, inputs.source)
