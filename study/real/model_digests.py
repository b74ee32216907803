"""What tells the models and judges of a study from others at the same path."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from esi_ds.artifacts import file_sha256, json_sha256
from esi_ds.errors import UserError
from study.real.grid import SHUFFLED, Plan

CARD = "README.md"  # of a model: written anew with its figures


@lru_cache
def _file_sha256(file: Path, size: int, modified_ns: int) -> str:
    """A file is read again only where its size or time has changed: a start asks before and after every cell."""
    return file_sha256(file)


def model_names(plan: Plan) -> tuple[str, ...]:
    """The models and judges that ``--models`` holds: all but the judge that the study itself trains."""
    return (*plan.models, *(judge for judge in plan.grid.judges if judge != SHUFFLED))


def model_digests(plan: Plan, models_needed: bool = True) -> dict[str, str]:
    """Name of every model and judge of ``--models`` → sha256 of the names and contents of its files, but for the card.

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
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CARD)
        digests[name] = json_sha256({file.name: _file_sha256(file, *_version(file)) for file in files})
    return digests


def _version(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
