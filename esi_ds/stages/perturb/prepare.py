"""Everything about a perturbation that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from esi_ds.config import Config, Perturb
from esi_ds.config.needs import require_perturb
from esi_ds.core.mask import Mask, load_mask
from esi_ds.core.score_folder import ScoreFolder
from esi_ds.core.select import check_ratio, share_sizes
from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_structure
from esi_ds.models.meta import meta_parameters
from esi_ds.reading import json_sha256
from esi_ds.stages.evaluate.prepare import Candidate, EvalInputs, prepare_eval
from esi_ds.tensor_files import INDEX_NAME, SINGLE_NAME

CLEAN = "clean"


@dataclass(frozen=True)
class NoiseCell:
    """One way to disturb the model."""

    order: str  # top, random or bottom: which weights
    ratio: float  # share of the weights
    noise: float  # standard deviation, in σ of each weight's matrix
    seed: int  # of the noise and of the random weights

    @property
    def name(self) -> str:
        """What its answers are filed under."""
        return f"{self.order} {self.ratio:g}, noise {self.noise:g}, seed {self.seed}"


@dataclass(frozen=True)
class PerturbInputs:
    """Everything a perturbation reads, but for weights."""

    mask: Mask
    scores: Path | None  # folder of the scores that the mask was made from; None if no cell needs it
    eval: EvalInputs
    cells: list[NoiseCell]
    source: dict[str, Any]  # hashes of prompts, mask and scores, for the manifest

    @property
    def candidate(self) -> Candidate:
        """The only model of a perturbation."""
        return self.eval.candidates[0]

    @property
    def names(self) -> list[str]:
        """What the tables call the clean model and every cell's."""
        return [CLEAN, *(cell.name for cell in self.cells)]


def prepare_perturb(config: Config) -> PerturbInputs:
    """Read prompts, judges and mask and check them against each other. Raises UserError. Loads no weights."""
    section = check_sections(config)
    inputs = prepare_eval(config)
    parameters = meta_parameters(
        inputs.candidates[0].config, inputs.candidates[0].source, config.model.roles, config.model.dtype
    )
    mask = open_mask(section, parameters)
    cells = noise_cells(section, mask.header.ratio)
    scores = _scores_folder(section.scores, mask, chosen_by_scores(cells, mask.header.ratio))
    source = {**inputs.source, "mask": mask.fingerprint, "mask_k": mask.k}
    if scores is not None and (digests := ScoreFolder(scores, "perturb.scores").digests):
        source["scores_sha256"] = json_sha256(digests)
    return PerturbInputs(mask, scores, inputs, cells, source)


def check_sections(config: Config) -> Perturb:
    """The ``perturb`` section. Raises UserError for what is wrong whatever the model and the mask are."""
    section = require_perturb(config)
    for key in ("models", "tasks", "divergence"):
        if config.eval is not None and getattr(config.eval, key):
            raise UserError(
                f"eval.{key}", None, "is for launch/eval.py only", "leave it out: the noise is on model.path"
            )
    for key in ("orders", "ratios", "noise", "seeds"):
        values = getattr(section, key)
        names = {f"{value:g}" if isinstance(value, float) else value for value in values or ()}  # as in a cell's name
        if values is not None and len(names) < len(values):
            problem = "names a value twice, or two that differ in the seventh digit"
            raise UserError(f"perturb.{key}", values, problem, "name it once")
    return section


def open_mask(section: Perturb, parameters: tuple[Parameter, ...]) -> Mask:
    """The mask, checked against the model's parameters and the ratios asked for. Raises UserError."""
    mask = load_mask(section.mask, "perturb.mask")
    check_mask_structure(mask, parameters, "perturb.mask")
    if mask.header.order != "top":
        raise UserError("perturb.mask", section.mask, f"holds the {mask.header.order} weights", "give a top mask")
    sizes = share_sizes(parameters, mask.header.of, mask.header.scope)
    for ratio in section.ratios or ():
        check_ratio(ratio, sizes, "perturb.ratios")
    return mask


def noise_cells(section: Perturb, mask_ratio: float) -> list[NoiseCell]:
    """Every way to disturb the model. mask_ratio: of the mask, taken where ``perturb.ratios`` names none."""
    ratios = section.ratios or [mask_ratio]
    return [NoiseCell(*key) for key in product(section.orders, ratios, section.noise, section.seeds)]


def chosen_by_scores(cells: list[NoiseCell], mask_ratio: float) -> list[NoiseCell]:
    """The cells whose weights the mask does not name."""
    return [cell for cell in cells if cell.order == "bottom" or (cell.order == "top" and cell.ratio != mask_ratio)]


def _scores_folder(configured: str | None, mask: Mask, by_scores: list[NoiseCell]) -> Path | None:
    """The folder of scores; None if there is none and no cell needs one. by_scores: cells chosen by scores.

    Raises UserError if it is needed and missing.
    """
    folder = Path(configured) if configured is not None else _scores_beside(mask.path)
    if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
        return folder
    if configured is None and not by_scores:
        return None
    need, remedy = "the mask is checked against it", "name the folder of the mask's scores, or leave it out"
    if by_scores:
        need = f"the {by_scores[0].order} weights at ratio {by_scores[0].ratio:g} are chosen by it"
        remedy = (
            "set it to the folder of the mask's scores, ask for top and random at the mask's own ratio, or score again "
            "with esi.save_scores: true"
        )
    raise UserError("perturb.scores", str(folder), f"is not there, but {need}", remedy)


def _scores_beside(mask: Path) -> Path:
    """Where the run that made a mask keeps its scores: ``scores/`` beside ``mask/``, and of a run with several criteria
    ``scores/<criterion>/`` for ``mask/<criterion>/``."""
    beside = mask.parent / "scores"
    several = mask.parent.parent / "scores" / mask.name
    return several if mask.parent.name == "mask" and not beside.is_dir() else beside
