"""Paired tests of SET's methods against ESI on the reported prompts, at learning rates chosen on other prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from esi_ds.artifacts import read_jsonl
from esi_ds.data.rows import Row
from esi_ds.eval.refusals import DEFAULT_FOR_ATTACKS, DEFAULT_FOR_BENIGN, REFUSAL_LISTS
from study.findings import judged, paired
from study.real.grid import Cell
from study.real.tune_cells import CHOOSE, REPORT
from study.real.tune_results import TUNED, best_rate

REFERENCE = "esi"
BEST = "best rate"
LIMITS = (0.10, 0.30)  # of over-refusal on the prompts that are for choosing
MEASURES = ("not refused", "over-refused")  # the lower the better


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


def tests_of(cells: Sequence[Cell], output: Path, rows: Sequence[Row], first_seed: int) -> list[Row]:
    """``comparisons`` of finished cells."""
    folders = {
        (cell.facts["method"], cell.facts["lr"], cell.facts["seed"]): output / cell.name / "eval"
        for cell in cells
        if cell.part == "set"
    }
    known: dict[Path, Row] = {}

    def flags(row: Row) -> Row:
        folder = folders[row["method"], row["lr"], row["seed"]]
        if folder not in known:
            known[folder] = flags_of(folder)
        return known[folder]

    return comparisons(rows, flags, first_seed)
