"""What ``study/real.yaml`` says, and what a cell is: a few shipped commands with a config each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from esi_ds.config.errors import explain
from esi_ds.config.section import Section
from esi_ds.config.yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "study/real.yaml"
Device = Literal["cpu", "cuda"]
SIZE_OF: dict[Device, str] = {"cpu": "cpu", "cuda": "gpu"}
CLASSIFIER, SHUFFLED = "judge-classifier", "judge-shuffled"
HARMFUL, BENIGN, BENIGN_LOSS = "advbench", "benign", "benign-loss"
REFERENCE = "esi"  # the method of SET that others are tested against, unless the grid names another


def shuffled_judge_name(draw: int) -> str:
    """The judge of a draw of shuffled labels, from 0 on; the first has no number."""
    return f"{SHUFFLED}-{draw}" if draw else SHUFFLED


def part_name(prompts: str, seed: int, count: int | None = None) -> str:
    """The part of a set of prompts that a seed has; count: of prompts, where it is not that of a seed."""
    return f"{prompts}-s{seed}" + (f"-n{count}" if count is not None else "")


def shuffled_cell(judge: str) -> str:
    """The cell that trains a judge on shuffled labels."""
    return f"judge/{judge.removeprefix('judge-')}"


class Models(Section):
    untouched: str = Field(description="The model as it comes.")
    aligned: str = Field(description="Its aligned twin.")


class Estimator(Section):
    estimator: str = Field(description="As esi.estimator.")
    samples: int = Field(1, description="As esi.samples.")
    criteria: list[str] = Field(description="As select.criterion: the masks of one pass.")


class Where(Section):
    ratio: float = Field(description="Share of all weights that a mask selects.")
    estimators: dict[str, Estimator] = Field(
        description="How scores are estimated, by name; the first is the main one."
    )
    against_control: list[str] = Field(description="Criteria besides, of the main estimator: they need the control.")
    other_prompts: list[str] = Field(description="Sets of harmful prompts besides AdvBench.")
    other_judges: list[str] = Field(description="Judges besides the classifier.")
    shuffled_draws: int = Field(1, ge=1, description="Judges trained on shuffled labels.")
    counts: list[int] = Field(description="Numbers of prompts, besides a seed's.")


class Method(Section):
    """One way of choosing what SET trains."""

    kind: Literal["mask", "all", "lora"] = Field("mask", description="Weights of a mask, all weights, or LoRA.")
    masks: str = Field("where", description="The cells that make the mask: where, or a name below masks/.")
    criterion: str = Field("esi", description="The mask's criterion.")
    rank: int = Field(0, description="Of LoRA.")
    targets: list[str] = Field([], description="Of LoRA: the matrices' names.")
    fraction: float = Field(0.5, description="Share of benign rows.")
    benign: Literal["lookalikes", "plain", "more-lookalikes"] = Field(
        "lookalikes", description="How many look harmful."
    )
    batch_factor: int = Field(1, ge=1, description="Rows of a step, in batches of the size.")
    against: str = Field(REFERENCE, description="The method that it is tested against.")
    rates: list[float] = Field(min_length=3, description="Learning rates, rising.")


class Set(Section):
    methods: dict[str, Method] = Field(description="By name.")

    @field_validator("methods")
    @classmethod
    def _are_tested_against_methods(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name, method in methods.items():
            if method.against not in methods:
                raise ValueError(f"{name} is tested against {method.against!r}, which is not a method")
        return methods


class Frozen(Section):
    criterion: str = Field(description="Of the mask, or nothing.")
    ratio: float = Field(0.0, description="Share of all weights that the mask selects.")
    order: Literal["top", "random"] = Field("top", description="Which weights of the ranking it selects.")


class Spa(Section):
    rates: list[float] = Field(description="Learning rates; the first is the poisoned task's.")
    frozen: list[Frozen] = Field(min_length=2, description="What stays as it is.")


class Noise(Section):
    noise: list[float] = Field(min_length=2, description="As perturb.noise; the first is the paper's.")
    temperature: float = Field(description="Of the sampled answers.")
    top_p: float = Field(description="Of the sampled answers.")


class Size(Section):
    dtype: str = Field(description="As model.dtype.")
    batch_size: int = Field(description="As esi.batch_size and eval.batch_size.")
    seeds: list[int] = Field(description="From 0 on: a seed's prompts are a part of its own of each set.")
    prompts: int = Field(description="Prompts of a seed.")
    max_new_tokens: int = Field(description="Longest response that is scored, in tokens.")
    rows: int = Field(description="Rows of a loss that scores are made of.")
    set_steps: int = Field(description="As tune.max_steps, of SET.")
    spa_seeds: list[int] = Field(description="Of SPA; all freeze the masks of the first of ``seeds``.")
    spa_steps: int = Field(description="As tune.max_steps, of SPA.")
    set_batch: int = Field(description="As tune.batch_size, of SET.")
    set_length: int = Field(description="As tune.max_length, of SET.")
    spa_batch: int = Field(description="As tune.batch_size, of SPA.")
    spa_length: int = Field(description="As tune.max_length, of SPA.")
    choose: int = Field(description="Prompts of a kind that a learning rate is chosen by.")
    report: int = Field(description="Prompts of a kind that are reported.")
    heldout: int = Field(description="Held-out questions of a task.")
    answer_tokens: int = Field(description="As eval.max_new_tokens.")
    answer_batch: int = Field(description="As eval.generation_batch_size.")
    noise_seeds: list[int] = Field(description="As perturb.seeds.")
    hours: float | None = Field(None, gt=0, description="As --hours, where that is not given; null: no end.")
    minutes: dict[str, float] = Field(description="Expected minutes of a cell, by the first part of its name.")


class Grid(Section):
    models: Models = Field(description="Folders of the two models.")
    judges: dict[str, dict[str, Any]] = Field(description="Sections of a config, but for the path, by folder.")
    where: Where = Field(description="The cells that ask where the weights lie.")
    set: Set = Field(description="The cells that learn to refuse.")
    spa: Spa = Field(description="The cells that learn a task with a mask frozen.")
    noise: Noise = Field(description="The cells that put noise on the weights.")
    first: list[str] = Field(description="Beginnings of the names of the cells that are run before all others.")
    sizes: dict[str, Size] = Field(description="How much of everything, by size.")


@dataclass(frozen=True)
class Folders:
    """models: of `make real-models`. output: of the cells; prompts and rows lie in its folder ``data``."""

    models: Path
    output: Path

    @property
    def data(self) -> Path:
        """Files of prompts and rows."""
        return self.output / "data"


@dataclass(frozen=True)
class Step:
    """One command of a cell. stage: a script of ``launch/``, or a module, of this package if its name has no dot.

    config: of a stage, whose run folder is ``CELL/STAGE``; None: ``arguments`` are all that it reads.
    """

    stage: str
    config: Mapping[str, Any] | None = None
    arguments: tuple[str, ...] = ()
    is_module: bool = False


@dataclass(frozen=True)
class Cell:
    """Steps that are run one after the other in the folder ``name``, after the cells of ``after``.

    like: cells of the same word take the same time. facts: what tells this cell from others, for the tables.
    drops: folders that are deleted once all steps are done.
    """

    name: str
    like: str
    steps: tuple[Step, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """The first part of its name."""
        return self.name.split("/")[0]


def read_grid(file: Path = FILE) -> Grid:
    """The grid. Raises UserError for a file that is not one."""
    try:
        return Grid.model_validate(read_yaml(file, "study/real.yaml", "give the file of the checkout"))
    except ValidationError as error:
        raise explain(error, Grid) from None


@dataclass(frozen=True)
class Plan:
    """What all cells of a study share."""

    grid: Grid
    device: Device
    folders: Folders

    @property
    def size(self) -> Size:
        """How much of everything."""
        return self.grid.sizes[SIZE_OF[self.device]]

    @property
    def models(self) -> tuple[str, str]:
        """The aligned and the untouched model."""
        return self.grid.models.aligned, self.grid.models.untouched

    def base_config(self, cell: str, stage: str, model: str, seed: int) -> dict[str, Any]:
        """The sections that every command's config has."""
        return {
            "run": {"output_dir": str(self.folders.output / cell / stage), "seed": seed, "tensorboard": False},
            "model": {"path": str(self.folders.models / model), "dtype": self.size.dtype},
            "deepspeed": "zero3",
        }

    def larger_parts(self) -> dict[int, list[int]]:
        """Numbers of prompts above a seed's, rising → seeds that have so many: one of the largest number, and of a
        smaller one two, where the largest holds both without a prompt in common."""
        larger = sorted(count for count in self.grid.where.counts if count > self.size.prompts)
        return {count: self.size.seeds[: min(2, larger[-1] // count)] for count in larger}

    @property
    def shuffled_judges(self) -> tuple[str, ...]:
        """The judges trained on shuffled labels, one a draw."""
        return tuple(shuffled_judge_name(draw) for draw in range(self.grid.where.shuffled_draws))

    def judge(self, name: str) -> dict[str, Any]:
        """A judge's section. The shuffled ones lie among the cells."""
        if name in self.shuffled_judges:
            return {**self.grid.judges[SHUFFLED], "path": str(self.folders.output / shuffled_cell(name) / CLASSIFIER)}
        return {**self.grid.judges[name], "path": str(self.folders.models / name)}

    def expected_s(self, cell: Cell, seconds: Mapping[str, Sequence[float]]) -> float:
        """How long a cell takes: as the slowest finished one that is like it, else as the grid says."""
        return max(seconds[cell.like]) if seconds.get(cell.like) else 60 * self.size.minutes[cell.part]
