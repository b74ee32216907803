"""Paired tests on the reported prompts, at learning rates chosen on other ones: SET's methods against ESI, and what SPA
freezes against nothing frozen and against other weights of the same number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from esi_ds.artifacts import read_jsonl
from esi_ds.data.rows import Row
from esi_ds.eval.refusals import DEFAULT_FOR_ATTACKS, DEFAULT_FOR_BENIGN, REFUSAL_LISTS
from study.findings import judged, paired
from study.real.grid import Cell
from study.real.tune_cells import CHOOSE, NOTHING, REPORT
from study.real.tune_results import TUNED, best_rate

REFERENCE = "esi"
BEST = "best rate"
LIMITS = (0.10, 0.30)  # of over-refusal on the prompts that are for choosing
MEASURES = ("not refused", "over-refused")  # the lower the better
TASK_SHARE = 0.95  # of the fall of the held-out loss with nothing frozen: where this is reached, the task is learnt


def flags_of(evaluation: Path) -> Row:
    """Measure → one flag for each reported prompt, as the report's rates count them; None without an answer."""
    attacks, benign = REFUSAL_LISTS[DEFAULT_FOR_ATTACKS], REFUSAL_LISTS[DEFAULT_FOR_BENIGN]
    flags: Row = {measure: [] for measure in MEASURES}
    for row in read_jsonl(evaluation / "answers.jsonl"):
        if row["model"] == TUNED and row["set"] == f"{REPORT}-harmful":
            flags["not refused"].append(None if row["response"] is None else not attacks.matches(row["response"]))
        elif row["model"] == TUNED and row["set"] == f"{REPORT}-benign":
            flags["over-refused"].append(None if row["response"] is None else benign.matches(row["response"]))
    return flags


def rate_within(rows: Sequence[Row], method: str, seed: int, limit: float) -> float | None:
    """Of a method's rates with over-refusal of at most ``limit``, the one that leaves the fewest harmful requests not
    refused, both on the prompts for choosing; the lower of equals. None where no rate keeps the limit."""
    kept = [
        row
        for row in rows
        if (row["method"], row["seed"]) == (method, seed) and row[CHOOSE]["over-refused"][0] <= limit
    ]
    return min(kept, key=lambda row: (row[CHOOSE]["not refused"][0], row["lr"]))["lr"] if kept else None


def comparisons(rows: Sequence[Row], flags: Callable[[Row], Row], first_seed: int) -> list[Row]:
    """Every method against ESI, with Holm's correction over all tests (``study.findings.judged``).

    rows: of the finished SET cells. flags: those of a row's cell. Both methods are taken at the rate that the first
    seed's prompts for choosing give, in every seed that was run at it.
    """
    rules: Mapping[str, Callable[[str], float | None]] = {
        BEST: lambda method: best_rate(rows, method, first_seed),
        **{
            f"over-refused ≤ {100 * limit:g} %": partial(rate_within, rows, seed=first_seed, limit=limit)
            for limit in LIMITS
        },
    }
    seeds = sorted({row["seed"] for row in rows})
    methods = dict.fromkeys(row["method"] for row in rows)
    if REFERENCE not in methods:
        return []
    tests = []
    for rule, rate_of in rules.items():
        for method in methods:
            if method == REFERENCE:
                continue
            rates = [rate_of(name) for name in (method, REFERENCE)]
            sides = [
                partial(_at, rows, flags, name, rate) for name, rate in zip((method, REFERENCE), rates, strict=True)
            ]
            for measure in MEASURES:
                test = paired(sides[0], sides[1], seeds, measure)
                about = {"method": method, "rule": rule, "rates": rates, "measure": measure, "sign": -1}
                tests.append({**about, **test})
    return judged(tests)


def _at(rows: Sequence[Row], flags: Callable[[Row], Row], method: str, rate: float | None, seed: int) -> Row | None:
    """The flags of a method's cell at a rate; None where it was not run."""
    same = [row for row in rows if (row["method"], row["lr"], row["seed"]) == (method, rate, seed)]
    return flags(same[0]) if same else None


def learnt(rows: Sequence[Row], loss_before: float) -> list[Row]:
    """Of one task's rows those that have learnt it: whose held-out loss has fallen by ``TASK_SHARE`` of the most that
    it falls with nothing frozen. Empty where nothing frozen was not run, or does not learn it.

    loss_before: of the model that is tuned, in nats a token, as the rows' losses.
    """

    def fall(row: Row) -> float:
        loss: float = next(iter(row["loss"].values()))
        return loss_before - loss

    most = max((fall(row) for row in rows if row["frozen"] == NOTHING), default=0.0)
    return [row for row in rows if fall(row) >= TASK_SHARE * most] if most > 0 else []


def spa_comparisons(rows: Sequence[Row], losses_before: Mapping[str, float], flags: Callable[[Row], Row]) -> list[Row]:
    """At equal task score: every frozen mask against nothing frozen, and against a random one and SNIP's of its size.

    rows: of the finished SPA cells. losses_before: held-out task → loss of the model that is tuned. Of the rates at
    which the task is learnt, each side is taken at the one with the fewest harmful requests not refused on the prompts
    for choosing.
    """
    tests = []
    for task in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == task]
        kept = learnt(group, losses_before[next(iter(group[0]["loss"]))])
        masks = list(dict.fromkeys(row["frozen"] for row in group))
        for frozen in masks:
            ratio = frozen.rpartition("-")[2]
            for rival in (NOTHING, f"random-{ratio}", f"snip-{ratio}"):
                if frozen in (NOTHING, rival) or frozen.startswith("random") or rival not in masks:
                    continue
                sides = [partial(_safest, kept, flags, name) for name in (frozen, rival)]
                for measure in MEASURES:
                    test = paired(sides[0], sides[1], sorted({row["seed"] for row in group}), measure)
                    about = {"task": task, "method": frozen, "rival": rival, "measure": measure, "sign": -1}
                    tests.append({**about, **test})
    return judged(tests)


def _safest(rows: Sequence[Row], flags: Callable[[Row], Row], frozen: str, seed: int) -> Row | None:
    """The flags of a mask's cell that leaves the fewest harmful requests not refused, the lower rate of equals."""
    same = [row for row in rows if (row["frozen"], row["seed"]) == (frozen, seed)]
    return flags(min(same, key=lambda row: (row[CHOOSE]["not refused"][0], row["lr"]))) if same else None


class Flags:
    """``flags_of`` of a row's cell, read once."""

    def __init__(self, cells: Sequence[Cell], output: Path, part: str):
        """part: set or spa; a row has its cell's facts."""
        self.keys = ("method", "lr", "seed") if part == "set" else ("task", "frozen", "lr", "seed")
        self.folders = {
            tuple(cell.facts[key] for key in self.keys): output / cell.name / "eval"
            for cell in cells
            if cell.part == part
        }
        self.known: dict[Path, Row] = {}

    def __call__(self, row: Row) -> Row:
        folder = self.folders[tuple(row[key] for key in self.keys)]
        if folder not in self.known:
            self.known[folder] = flags_of(folder)
        return self.known[folder]
