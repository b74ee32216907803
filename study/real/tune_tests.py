"""Paired tests on the reported prompts, at learning rates chosen on other ones: SET's methods against ESI, and what SPA
freezes against nothing frozen and against other weights of the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from esi_ds.artifacts import read_jsonl
from esi_ds.data.rows import Row
from esi_ds.eval.refusals import judge_by_words, refused
from esi_ds.eval.rows import answered, marks_of
from study.findings import judged, paired
from study.real.grid import Cell
from study.real.tune_cells import CHOOSE, NOTHING, REPORT
from study.real.tune_results import TUNED, chosen_rates, is_measured

TESTED = ("not refused", "over-refused")  # the lower the better
TASK_SHARE = 0.95  # of the fall of the held-out loss with nothing frozen: where this is reached, the task is learnt
FlagsOf = Callable[[Row], Row]  # a finished cell's row → its flags


def flags_of(evaluation: Path) -> Row:
    """Measure → one flag for each reported prompt, as the report's rates count them; None where it counts none."""
    flags: Row = {measure: [] for measure in TESTED}
    for row in read_jsonl(evaluation / "answers.jsonl"):
        if row["model"] != TUNED:
            continue
        answer, marks = answered(row), marks_of(row)
        if row["set"] == f"{REPORT}-harmful":
            verdict = None if answer is None else judge_by_words([answer], marks=marks)[0].unsafe
            flags["not refused"].append(verdict)
        elif row["set"] == f"{REPORT}-benign":
            flags["over-refused"].append(None if answer is None else refused([answer], marks=marks)[0])
    return flags


def with_verdicts(tests: Sequence[Row]) -> list[Row]:
    """With Holm's p over the tests of at least two seeds, and a verdict (``study.findings.judged``); tests of one seed
    or of none say so and are not part of that family."""
    several = iter(judged([test for test in tests if test["seeds"] > 1]))
    fewer = {0: "no seed where both get there", 1: "one seed only"}
    return [
        next(several) if test["seeds"] > 1 else {**test, "p_holm": None, "verdict": fewer[test["seeds"]]}
        for test in tests
    ]


# ---------------------------------------------------------------- SET


def set_comparisons(rows: Sequence[Row], flags: FlagsOf, first_seed: int, against: Mapping[str, str]) -> list[Row]:
    """Every method against another under every rule of ``chosen_rates``; rules that choose the same rates share a row.

    rows: of the finished SET cells. against: method → the one that it is tested against; none for itself, or where that
    one was not run. Both methods are taken at the rate that the first seed's prompts for choosing give, in every seed
    that was run at it.
    """
    seeds = sorted({row["seed"] for row in rows})
    rates = {name: chosen_rates(rows, name, first_seed) for name in dict.fromkeys(row["method"] for row in rows)}
    tests = []
    for method, rates_of_method in rates.items():
        reference = against[method]
        if reference == method or reference not in rates:
            continue
        rules: dict[tuple[float | None, float | None], list[str]] = {}
        for rule, rate in rates_of_method.items():
            rules.setdefault((rate, rates[reference][rule]), []).append(rule)
        for (rate, other), names in rules.items():
            sides = [partial(_at, rows, flags, *side) for side in ((method, rate), (reference, other))]
            for measure in TESTED:
                about = {"method": method, "against": reference, "rules": names, "rates": [rate, other]}
                about |= {"measure": measure, "sign": -1}
                tests.append({**about, **paired(sides[0], sides[1], seeds, measure)})
    return with_verdicts(tests)


def _at(rows: Sequence[Row], flags: FlagsOf, method: str, rate: float | None, seed: int) -> Row | None:
    """The flags of a method's cell at a rate; None where it was not run."""
    same = [row for row in rows if (row["method"], row["lr"], row["seed"]) == (method, rate, seed)]
    return flags(same[0]) if same else None


# ---------------------------------------------------------------- SPA


def learnt(rows: Sequence[Row], loss_before: float) -> list[Row]:
    """Of one task's and seed's rows those that have learnt it: whose held-out loss has fallen by ``TASK_SHARE`` of the
    most that it falls with nothing frozen. Empty where nothing frozen was not run, or does not learn it.

    loss_before: of the model that is tuned, in nats a token, as the rows' losses.
    """

    def fall(row: Row) -> float:
        loss: float = next(iter(row["loss"].values()))
        return loss_before - loss

    most = max((fall(row) for row in rows if row["frozen"] == NOTHING), default=0.0)
    return [row for row in rows if fall(row) >= TASK_SHARE * most] if most > 0 else []


def spa_comparisons(rows: Sequence[Row], losses_before: Mapping[str, float], flags: FlagsOf) -> list[Row]:
    """At equal task score: every frozen mask against nothing frozen, and against a random one and SNIP's of its size.

    rows: of the finished SPA cells. losses_before: held-out task → loss of the model that is tuned. Of the rates at
    which the task is learnt, each side is taken at the one with the fewest harmful requests not refused on the prompts
    for choosing.
    """
    tests = []
    for task in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == task and is_measured(row)]
        seeds = sorted({row["seed"] for row in group})
        kept = [row for seed in seeds for row in learnt(
            [row for row in group if row["seed"] == seed], losses_before[next(iter(group[0]["loss"]))]
        )]  # fmt: skip
        for frozen, rival in _rivals(list(dict.fromkeys(row["frozen"] for row in group))):
            sides = [partial(_safest, kept, flags, name) for name in (frozen, rival)]
            for measure in TESTED:
                about = {"task": task, "method": frozen, "rival": rival, "measure": measure, "sign": -1}
                tests.append({**about, **paired(sides[0], sides[1], seeds, measure)})
    return with_verdicts(tests)


def _rivals(masks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every mask that is not a control, with each of its controls: nothing, and as many random weights or of SNIP's."""
    for frozen in masks:
        if frozen != NOTHING and not frozen.startswith("random"):
            ratio = frozen.rpartition("-")[2]
            controls = (NOTHING, f"random-{ratio}", f"snip-{ratio}")
            yield from ((frozen, rival) for rival in controls if rival in masks and rival != frozen)


def _safest(rows: Sequence[Row], flags: FlagsOf, frozen: str, seed: int) -> Row | None:
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
