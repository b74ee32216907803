"""The cells of the study: the masks, and the runs tuned with them. Every cell is one run folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, TypeVar

SEEDS = (0, 1, 2)
MODELS = ("llama", "qwen3moe")

# Criteria of masks: overrides of the ESI stage. Every one is also divided by the benign Fisher (docs/method.md §2), but
# for random ones, those that compare with a benign loss themselves, and ESI over the mean of its matrix.
CRITERIA: dict[str, dict[str, object]] = {
    "esi": {},
    "esi-by-matrix": {"select.normalise": "matrix"},
    "esi-gumbel-1": {"esi.estimator": "gumbel", "esi.samples": 1},
    "esi-gumbel-16": {"esi.estimator": "gumbel", "esi.samples": 16},
    "esi-paper-code": {"esi.estimator": "paper_code"},
    "grad": {"select.criterion": "grad"},
    "snip": {"select.criterion": "snip"},
    "magnitude": {"select.criterion": "magnitude"},
    "random": {"select.criterion": "random"},
    "tuning-grad": {"select.criterion": "tuning_grad"},
    "directed": {"select.criterion": "directed"},
    "specific": {"select.criterion": "specific"},
    "excess": {"select.criterion": "excess"},
    "exclusive": {"select.criterion": "exclusive"},
}
NEEDS_CONTROL = ("specific", "excess", "exclusive")
NOT_CONTRASTED = ("random", "esi-by-matrix", *NEEDS_CONTROL)
NEEDS_RESPONSES = {name for name in CRITERIA if name not in ("magnitude", "random", "tuning-grad")}
NEEDS_TUNING_ROWS = {"tuning-grad", "directed", "exclusive"}
CONTRASTIVE = "-contrastive"

# Learning rates: the frontier is drawn over all of them, the same for every mask of a size.
LR = {0.001: (1e-2, 2e-2, 5e-2), 0.01: (2e-3, 5e-3, 1e-2, 2e-2), 0.05: (1e-3, 2e-3, 5e-3)}
AT_OTHER_RATIOS = ("esi", "snip", "random", "directed", "tuning-grad", "esi-contrastive", "directed-contrastive")
ON_MOE = ("esi", "snip", "random", "directed", "tuning-grad", "esi-contrastive", "esi-by-matrix", *NEEDS_CONTROL)
HARDLY_CHANGE = ("bottom", "magnitude", f"magnitude{CONTRASTIVE}")  # any answer at any rate: the two highest show it
ALL_WEIGHTS, LORA = (1e-4, 3e-4, 1e-3), (3e-3, 1e-2, 3e-2)

TASKS = ("sums", "categories", "voice")
POISONED = "poisoned"
# Steps and rates by which the task is learnt with nothing frozen; the higher rate is for what learns less when frozen.
SPA_STEPS = {"sums": 200, "categories": 100, "voice": 100, POISONED: 100}
SPA_LR = {"sums": (1e-3, 2e-3), "categories": (2e-3, 4e-3), "voice": (4e-4, 1.2e-3), POISONED: (6e-4,)}
SPA_BATCH = {"sums": 8}  # else 4
FROZEN_RATIOS = (0.01, 0.05, 0.1, 0.3)
SPA_CRITERIA = ("esi", "random", "snip")
PROMPT_COUNTS = (16, 32, 64)  # besides the full number, for the stability of the mask


@dataclass(frozen=True)
class Cell:
    """One run folder: ``name`` is its path below the study's folder; cells that ``after`` names come before it."""

    kind: str  # mask, set, lora, spa, perturb
    name: str
    model: str
    seed: int
    facts: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()


class Needing(Protocol):
    """A cell of either study."""

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> tuple[str, ...]: ...


AnyCell = TypeVar("AnyCell", bound=Needing)


def with_needs(cells: Sequence[AnyCell], prefixes: Iterable[str]) -> list[AnyCell]:
    """The cells whose names start with one of the prefixes (all if there are none), and those that they need."""
    by_name, starts = {cell.name: cell for cell in cells}, tuple(prefixes)
    names = {name for name in by_name if not starts or name.startswith(starts)}
    while more := {need for name in names for need in by_name[name].after} - names:
        names |= more
    return [cell for cell in cells if cell.name in names]


def mask_name(model: str, criterion: str, seed: int) -> str:
    return f"masks/{model}/{criterion}-s{seed}"


def all_criteria() -> list[str]:
    return [*CRITERIA, *(f"{name}{CONTRASTIVE}" for name in CRITERIA if name not in NOT_CONTRASTED)]


def masks(seeds: tuple[int, ...]) -> Iterator[Cell]:
    """Criteria on the complying models, for SET; ESI, SNIP and random on the aligned ones, for SPA and perturbation."""
    wanted = [("llama-complying", name) for name in all_criteria()]
    wanted += [("qwen3moe-complying", name) for name in ON_MOE]
    wanted += [(f"{model}-aligned", name) for model in MODELS for name in SPA_CRITERIA]
    for seed, (model, criterion) in product(seeds, wanted):
        after = () if criterion == "esi" else (mask_name(model, "esi", seed),)  # its responses are used again
        yield Cell("mask", mask_name(model, criterion, seed), model, seed, {"criterion": criterion}, after)
    for seed, model, count in product(seeds, MODELS, PROMPT_COUNTS):
        name = f"{mask_name(f'{model}-aligned', 'esi', seed)}-n{count}"
        yield Cell("mask", name, f"{model}-aligned", seed, {"criterion": "esi", "prompts": count})


def set_cells(seeds: tuple[int, ...]) -> Iterator[Cell]:
    """SET on the complying models: criterion × ratio × learning rate; all weights and LoRA beside them."""
    model = "llama-complying"
    for seed in seeds:
        for criterion in [*all_criteria(), "bottom"]:
            for lr in LR[0.01][-2:] if criterion in HARDLY_CHANGE else LR[0.01]:
                yield _set(model, criterion, 0.01, lr, seed)
        for criterion, ratio in product(AT_OTHER_RATIOS, (0.001, 0.05)):
            for lr in LR[ratio]:
                yield _set(model, criterion, ratio, lr, seed)
        for criterion, lr in product(ON_MOE, LR[0.01][:3]):
            yield _set("qwen3moe-complying", criterion, 0.01, lr, seed)
        for other, lr in product(("llama-complying", "qwen3moe-complying"), ALL_WEIGHTS):
            yield _set(other, "all", 1.0, lr, seed)
        for lr in LORA:
            facts = {"criterion": "lora", "ratio": 0.01, "lr": lr}
            yield Cell("lora", f"set/{model}/lora-{lr:g}-s{seed}", model, seed, facts)


def _set(model: str, criterion: str, ratio: float, lr: float, seed: int) -> Cell:
    facts = {"criterion": criterion, "ratio": ratio, "lr": lr}
    source = "esi" if criterion in ("bottom", "all") else criterion
    name = f"set/{model}/{criterion}-{ratio:g}-{lr:g}-s{seed}"
    return Cell("set", name, model, seed, facts, (mask_name(model, source, seed),))


def spa_cells(seeds: tuple[int, ...]) -> Iterator[Cell]:
    """SPA on the aligned models: three tasks and a poisoned one, over what is frozen."""
    frozen = [("nothing", 0.0), *product(SPA_CRITERIA, FROZEN_RATIOS)]
    for seed in seeds:
        for task, (criterion, ratio) in product(TASKS, frozen):
            for lr in SPA_LR[task]:
                yield _spa("llama-aligned", task, criterion, ratio, lr, seed)
        for criterion, ratio in (("nothing", 0.0), ("random", 0.3), ("esi", 0.3)):
            yield _spa("llama-aligned", POISONED, criterion, ratio, SPA_LR[POISONED][0], seed)
            yield _spa("qwen3moe-aligned", "voice", criterion, ratio, SPA_LR["voice"][1], seed)


def _spa(model: str, task: str, criterion: str, ratio: float, lr: float, seed: int) -> Cell:
    facts = {"task": task, "criterion": criterion, "ratio": ratio, "lr": lr}
    source = "esi" if criterion == "nothing" else criterion
    name = f"spa/{model}/{task}-{criterion}-{ratio:g}-{lr:g}-s{seed}"
    return Cell("spa", name, model, seed, facts, (mask_name(model, source, seed),))


def perturb_cells(seeds: tuple[int, ...]) -> Iterator[Cell]:
    """One run a model, on the first seed's mask: orders × noise × ratios × draws are inside it."""
    for model in MODELS if SEEDS[0] in seeds else ():
        aligned = f"{model}-aligned"
        yield Cell("perturb", f"perturb/{aligned}", aligned, SEEDS[0], {}, (mask_name(aligned, "esi", SEEDS[0]),))


def cells(seeds: tuple[int, ...] = SEEDS) -> list[Cell]:
    """All cells: masks first, then seed by seed, so that a study that stops early has whole seeds.

    seeds: some of ``SEEDS``, which are those that the pages show.
    """
    mask_cells = [*masks(seeds)]
    tuned = [*set_cells(seeds), *spa_cells(seeds)]
    return [*mask_cells, *perturb_cells(seeds), *sorted(tuned, key=lambda cell: cell.seed)]
