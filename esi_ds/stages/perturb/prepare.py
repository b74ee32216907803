"""Everything about a perturbation that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from esi_ds.config import Config
from esi_ds.core.mask import INDEX_NAME, Mask, load_mask
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_structure
from esi_ds.models.meta import meta_parameters
from esi_ds.stages.evaluate.prepare import Candidate, EvalInputs, prepare_eval

CLEAN = "clean"


@dataclass(frozen=True)
class Cell:
    """One way to disturb the model: which weights, how many, how much, and with which numbers."""

    order: str
    ratio: float
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """What its answers are filed under."""
        return f"{self.order} {self.ratio:g}, noise {self.noise:g}, seed {self.seed}"


@dataclass(frozen=True)
class PerturbInputs:
    """scores: the folder the mask was made from; None where no cell needs it."""

    mask: Mask
    scores: Path | None
    eval: EvalInputs
    cells: list[Cell]
    source: dict[str, Any]

    @property
    def candidate(self) -> Candidate:
        return self.eval.models[0]


def prepare_perturb(config: Config) -> PerturbInputs:
    """Raises UserError. Reads only; loads no weights."""
    section = config.perturb
    if section is None:
        raise UserError("perturb", None, "is missing", "give perturb.mask")
    for key in ("models", "tasks"):
        if config.eval is not None and getattr(config.eval, key):
            raise UserError(f"eval.{key}", None, "is for launch/eval.py", "leave it out: the noise is on model.path")
    inputs = prepare_eval(config)
    mask = load_mask(section.mask, "perturb.mask")
    parameters = meta_parameters(inputs.models[0].config, inputs.models[0].source, config.model.roles)
    check_mask_structure(mask, parameters, "perturb.mask")
    if mask.metadata.get("order", "top") != "top":
        raise UserError(
            "perturb.mask", section.mask, f"holds the {mask.metadata['order']} of its scores", "give a top mask"
        )
    own = float(mask.metadata["ratio"])
    ratios = section.ratios or [own]
    cells = [Cell(*key) for key in product(section.orders, ratios, section.noise, section.seeds)]
    for key in ("orders", "ratios", "noise", "seeds"):
        given = getattr(section, key)
        if given is not None and len(set(given)) < len(given):
            raise UserError(f"perturb.{key}", given, "names one of them twice", "name it once")
    needs = [cell for cell in cells if cell.order == "bottom" or (cell.order == "top" and cell.ratio != own)]
    scores = _scores(section.scores, mask, needs)
    source = {**inputs.source, "mask": mask.metadata["fingerprint"], "mask_k": mask.k}
    return PerturbInputs(mask, scores, inputs, cells, source)


def _scores(given: str | None, mask: Mask, needs: list[Cell]) -> Path | None:
    """The folder of scores, where there is one. Raises UserError where a cell needs it and it is not there."""
    folder = Path(given) if given is not None else mask.path.parent / "scores"
    if (folder / INDEX_NAME).is_file():
        return folder
    if given is None and not needs:
        return None
    what = f"{needs[0].order} of ratio {needs[0].ratio:g}" if needs else "a check of the mask"
    raise UserError(
        "perturb.scores",
        str(folder),
        f"is not there, and {what} is chosen by it",
        "score again with esi.save_scores: true, or ask for top and random at the mask's own ratio",
    )
