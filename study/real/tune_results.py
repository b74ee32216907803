"""Figures of the tuned models and of noise, from the reports of evaluations and perturbations; and which cells of SET
these ask for next."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esi_ds.artifacts import read_jsonl
from esi_ds.data.rows import Row
from esi_ds.eval.statistics import wilson
from study.real.grid import CLASSIFIER, Cell
from study.real.runner import read_record
from study.real.tune_cells import CHOOSE, POISONED, REPORT, TASKS

TUNED = "tuned"
BEST = "best rate"
LIMITS = (0.10, 0.30)  # of benign requests lost on the prompts for choosing, within which methods are compared
# Column → (measure, judge, kind of prompts) of an evaluation's report.
MEASURES = {
    "not refused": ("attack_success", "words", "harmful"),
    "unsafe": ("attack_success", CLASSIFIER, "harmful"),
    "unsafe (guard)": ("attack_success", "judge-guard", "harmful"),
    "incoherent, harmful": ("incoherent", None, "harmful"),
    "over-refused": ("refused", None, "benign"),
    "incoherent, benign": ("incoherent", None, "benign"),
    "KL": ("divergence", None, "benign"),
}
KEYS = ("rate", "low", "high", "n", "missing")
Measured = dict[str, list[float | int | None]]  # column of MEASURES → the values of KEYS


def measured(report: Mapping[str, Any], model: str, part: str) -> Measured:
    """One model on one part of the prompts; what was not measured is left out."""
    row: Measured = {}
    for column, (measure, judge, kind) in MEASURES.items():
        for one in report["measures"]:
            same = one["measure"] == measure and one["model"] == model and one["set"] == f"{part}-{kind}"
            if same and judge in (None, one["judge"]) and one["rate"] is not None:
                row[column] = [_rounded(one[key]) for key in KEYS]
    return row


def _rounded(value: float | int | None) -> float | int | None:
    return round(value, 5) if isinstance(value, float) else value


def read_report(run: Path) -> Row:
    """A finished run's report."""
    report: Row = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return report


def is_right(task: str, answer: str, expected: str) -> bool:
    """Whether an answer is the expected one: of arithmetic the last number, else the first word."""
    if task == "gsm8k":
        numbers = [float(text.replace(",", "")) for text in re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)]
        return bool(numbers) and numbers[-1] == float(expected.split("####")[-1].strip().replace(",", ""))
    words = re.findall(r"[a-z]+", answer.lower())
    return bool(words) and words[0] == expected.lower()


def accuracy(answers: Path, heldout: Path, task: str, model: str) -> list[float | int]:
    """[rate, low, high, n] of a model's right answers to the held-out questions of a task."""
    rows = {row["index"]: row["response"] for row in read_jsonl(answers)
            if row["model"] == model and row["set"] == heldout.stem}  # fmt: skip
    expected = [row["response"] for row in read_jsonl(heldout)]
    right = sum(is_right(task, rows.get(index) or "", answer) for index, answer in enumerate(expected))
    interval = wilson(right, len(expected))
    return [round(right / len(expected), 5), round(interval.low, 5), round(interval.high, 5), len(expected)]


def tuned_rows(cells: Sequence[Cell], output: Path, part: str) -> list[Row]:
    """One row a finished SET or SPA cell: its facts, what was measured on both parts of the prompts, its losses."""
    rows = []
    for cell in cells:
        if cell.part != part:
            continue
        folder = output / cell.name
        report, losses = read_report(folder / "eval"), json.loads((folder / "skills.json").read_text(encoding="utf-8"))
        facts = {name: value for name, value in cell.facts.items() if name not in ("rates", "only_if")}
        row = {**facts, **{name: measured(report, TUNED, name) for name in (CHOOSE, REPORT)}}
        row["loss"] = {name.removesuffix("-heldout"): round(one["loss"], 4) for name, one in losses.items()}
        if part == "spa":
            task = TASKS[0] if cell.facts["task"] == POISONED else cell.facts["task"]
            heldout = output / f"data/{task}-heldout.jsonl"
            asked = {entry["path"] for entry in dict(cell.steps[1].config or {})["eval"]["benign"]}
            is_asked = str(heldout) in asked
            answers = folder / "eval/answers.jsonl"
            row["accuracy"] = accuracy(answers, heldout, task, TUNED) if is_asked else None
        rows.append({**row, "seconds": read_record(folder)["seconds"]})
    return rows


def agreement_rows(cells: Sequence[Cell], output: Path) -> list[Row]:
    """One row a finished SET or SPA cell and pair of judges: Cohen's kappa over all answers to harmful prompts that the
    evaluation judged, None where it is undefined."""
    kept = ("first", "second", "num_pairs", "kappa", "low", "high")
    return [
        {"cell": cell.name, **{key: _rounded(agreement[key]) for key in kept}}
        for cell in cells
        if cell.part in ("set", "spa")
        for agreement in read_report(output / cell.name / "eval")["agreements"]
    ]


def base_rows(cells: Sequence[Cell], output: Path) -> list[Row]:
    """The models as they are: what the first evaluation of a tuned one measured of them, and their losses."""
    rows = []
    for cell in cells:
        if cell.part == "base":
            evaluated = next((other for other in cells if other.part == cell.facts["tuned_by"]), None)
            losses = json.loads((output / cell.name / "skills.json").read_text(encoding="utf-8"))
            row: Row = {"model": cell.facts["model"]}
            row["loss"] = {name.removesuffix("-heldout"): round(one["loss"], 4) for name, one in losses.items()}
            if evaluated is not None:
                report = read_report(output / evaluated.name / "eval")
                row |= {name: measured(report, "base", name) for name in (CHOOSE, REPORT)}
            rows.append(row)
    return rows


def noise_rows(cells: Sequence[Cell], output: Path) -> list[Row]:
    """Points of the curves on the reported prompts; noise 0 is the model as it is."""
    rows = []
    for cell in cells:
        if cell.part == "noise":
            for point in read_report(output / cell.name / "perturb")["curves"]:
                if point["set"].startswith(REPORT):
                    kept = ("measure", "judge", "set", "order", "ratio", "noise", *KEYS)
                    row = {**cell.facts, **{key: _rounded(point[key]) for key in kept}}
                    rows += [row] if row not in rows else []  # two cells of a mask begin with the same model
    return rows


# ---------------------------------------------------------------- the best learning rate


def benign_lost(row: Row) -> float:
    """Share of the benign requests for choosing whose answer is a refusal or garbled (a garbled refusal counts twice):
    a rate that garbles answers instead of refusing them is no better."""
    part = row[CHOOSE]
    # As many digits as the rates have: 20 and 10 % are within a limit of 30 %, which their binary sum is not.
    lost: float = round(part["over-refused"][0] + part["incoherent, benign"][0], 5)
    return lost


def badness(row: Row) -> tuple[float, float]:
    """What a learning rate is chosen by: harmful requests not refused and benign ones lost, the greater share first, on
    the part of the prompts that is for choosing. Garbled answers to harmful requests count as not refused."""
    not_refused, lost = row[CHOOSE]["not refused"][0], benign_lost(row)
    return max(not_refused, lost), min(not_refused, lost)


def is_measured(row: Row) -> bool:
    """Whether a row has what a learning rate is chosen by; a broken cell's may lack it."""
    return {"not refused", "over-refused", "incoherent, benign"} <= set(row[CHOOSE])


def candidates(rows: Sequence[Row], method: str, seed: int) -> list[Row]:
    """A method's and seed's rows that a learning rate can be chosen from."""
    return [row for row in rows if (row["method"], row["seed"]) == (method, seed) and is_measured(row)]


def best_rate(rows: Sequence[Row], method: str, seed: int) -> float | None:
    """The best rate of a method and seed, the lower of equals; None where none is finished. Of rates whose greater
    share is the same, the one whose other share is lower."""
    kept = candidates(rows, method, seed)
    return min(kept, key=lambda row: (badness(row), row["lr"]))["lr"] if kept else None


def rate_within(rows: Sequence[Row], method: str, seed: int, limit: float) -> float | None:
    """Of a method's rates with at most ``limit`` of the benign requests lost, the one that leaves the fewest harmful
    requests not refused, both on the prompts for choosing; of equals the one that loses fewer benign ones, else the
    lower rate. None where no rate keeps the limit."""
    kept = [
        (row[CHOOSE]["not refused"][0], lost, row["lr"])
        for row in candidates(rows, method, seed)
        if (lost := benign_lost(row)) <= limit
    ]
    return min(kept)[-1] if kept else None


def chosen_rates(rows: Sequence[Row], method: str, seed: int) -> dict[str, float | None]:
    """Rule → the rate at which a method is compared: its best, and the best within each limit of what is lost."""
    limited = {f"benign lost ≤ {100 * limit:g} %": rate_within(rows, method, seed, limit) for limit in LIMITS}
    return {BEST: best_rate(rows, method, seed), **limited}


def is_due(cell: Cell, rows: Sequence[Row], first_seed: int) -> bool:
    """Whether the finished cells ask for a cell: an end of a method's range where the rate beside it is the best, the
    upper end also where that is the best within a limit (a lower rate refuses fewer harmful requests, not more), a
    further seed at the rates of ``chosen_rates``; any other cell always.

    rows: of the finished SET cells.
    """
    reason = cell.facts.get("only_if")
    if not reason:
        return True
    if reason == "seed":
        return cell.facts["lr"] in chosen_rates(rows, cell.facts["method"], first_seed).values()
    chosen, rates = chosen_rates(rows, cell.facts["method"], first_seed), cell.facts["rates"]
    if cell.facts["lr"] == rates[0]:
        return chosen[BEST] in rates[:2]
    return not set(chosen.values()).isdisjoint(rates[-2:])


def is_at_end(rate: float, rates: Sequence[float]) -> bool:
    """Whether a chosen rate is the first or last of its method: the range did not bracket it."""
    return rate in (rates[0], rates[-1])


def is_open(rows: Sequence[Row], method: str, seed: int, rate: float, rates: Sequence[float]) -> bool:
    """Whether a rate beside a chosen one, in its method's range, was not run or measured nothing: it may be the better
    one."""
    run = {row["lr"] for row in candidates(rows, method, seed)}
    index = rates.index(rate)
    return not run.issuperset(rates[max(0, index - 1) : index + 2])
