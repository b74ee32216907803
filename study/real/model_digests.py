"""What tells the models and judges of a study from others at the same path."""

from __future__ import annotations

from esi_ds.errors import UserError
from study.digests import model_sha256
from study.real.grid import SHUFFLED, Plan


def model_names(plan: Plan) -> tuple[str, ...]:
    """The models and judges that ``--models`` holds: all but the judge that the study itself trains."""
    return (*plan.models, *(judge for judge in plan.grid.judges if judge != SHUFFLED))


def model_digests(plan: Plan, models_needed: bool = True) -> dict[str, str]:
    """Name of every model and judge of ``--models`` → ``model_sha256``.

    models_needed: raise UserError where one is not there; else it is left out.
    """
    digests = {}
    for name in model_names(plan):
        folder = plan.folders.models / name
        if not folder.is_dir():
            if not models_needed:
                continue
            remedy = "run make real-models, or give the folder of the models that the cells were run with"
            raise UserError("--models", plan.folders.models, f"holds no {name}", remedy)
        digests[name] = model_sha256(folder)
    return digests
