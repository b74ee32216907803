"""One page of several runs side by side, of all kinds: pure functions of their ``report.json`` and manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from esi_ds.eval.rows import MeasureRow
from esi_ds.eval.tables import task_names
from esi_ds.report import tables
from esi_ds.report.contents import EsiReport, EvaluationReport, PerturbationReport, Report, TuningReport
from esi_ds.report.evaluation import WORDS, is_share, percent, question_of
from esi_ds.report.tuning import refusal_shares
from esi_ds.words import counted

R = TypeVar("R", bound=Report, covariant=True)
DOCUMENTS = ("limit", "num_documents", "num_fewshot", "rows", "version")  # of a task; its prompts are a template's, too
LABELS = {"evaluation": "evaluation", "perturbation": "perturbation", None: "ESI"}


@dataclass(frozen=True)
class FinishedRun(Generic[R]):
    """A finished run. name: on the page. link: to its own page. manifest: empty where the file is lost."""

    name: str
    link: str
    report: R
    manifest: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """The kind that the report states: tuning, evaluation or perturbation; None for ESI."""
        kind = self.report.get("kind")
        return None if kind is None else str(kind)

    @property
    def label(self) -> str:
        """The stage, for people."""
        return cast(TuningReport, self.report)["method"].upper() if self.kind == "tuning" else LABELS[self.kind]

    @property
    def model(self) -> str:
        """Path of the model, or of all models that were evaluated."""
        if self.kind == "evaluation":
            return ", ".join(model["path"] for model in cast(EvaluationReport, self.report)["models"])
        return self.report["facts"].get("model") or self.report["title"].removeprefix("Noise on the weights of ")


@dataclass(frozen=True)
class RunsByKind:
    """The runs of each kind, in the order of the page."""

    esi: list[FinishedRun[EsiReport]]
    tuning: list[FinishedRun[TuningReport]]
    evaluations: list[FinishedRun[EvaluationReport]]
    perturbations: list[FinishedRun[PerturbationReport]]


def by_kind(runs: Sequence[FinishedRun[Report]]) -> RunsByKind:
    """Runs sorted by ``kind``, which says what their reports hold."""
    return RunsByKind(
        [cast(FinishedRun[EsiReport], run) for run in runs if run.kind is None],
        [cast(FinishedRun[TuningReport], run) for run in runs if run.kind == "tuning"],
        [cast(FinishedRun[EvaluationReport], run) for run in runs if run.kind == "evaluation"],
        [cast(FinishedRun[PerturbationReport], run) for run in runs if run.kind == "perturbation"],
    )


def masks(runs: Sequence[FinishedRun[EsiReport]]) -> list[FinishedRun[EsiReport]]:
    """A row for every mask: a run with several criteria has one for each, with the criterion behind its name."""
    return [
        replace(run, name=f"{run.name}: {mask['selection']['criterion']}", report={**run.report, **mask})
        if len(several) > 1
        else run
        for run in runs
        for several in [tables.masks_of(run.report)]
        for mask in several
    ]


def key_fact(run: FinishedRun[Report]) -> str:
    """The outcome of a run in one line."""
    if run.kind is None:
        return _esi_fact(cast(EsiReport, run.report))
    if run.kind == "tuning":
        return _tuning_fact(cast(TuningReport, run.report))
    if run.kind == "evaluation":
        return _evaluation_fact(cast(EvaluationReport, run.report))
    return f"{counted(len(cast(PerturbationReport, run.report)['cells']), 'cell')} of noise, all weights restored"


def _esi_fact(report: EsiReport) -> str:
    selection, scores = report["selection"], report["judge_scores"]
    mean = f", mean judge score {sum(scores) / len(scores):.3g} of {counted(len(scores), 'answer')}" if scores else ""
    criteria = ", ".join(mask["selection"]["criterion"] for mask in tables.masks_of(report))
    each = "each " if report.get("further_masks") else ""
    return f"{selection['k']:,} of {selection['total_numel']:,} weights {each}by {criteria}{mean}"


def _tuning_fact(report: TuningReport) -> str:
    parts = [f"{counted(report['trained'], 'weight')} trained in {counted(report['steps'], 'step')}"]
    for row in report["refusals"]:
        rates = " → ".join(map(percent, refusal_shares(row)))
        parts.append(f"{row['set']} refused {rates}")
    return "; ".join(parts)


def _evaluation_fact(report: EvaluationReport) -> str:
    """Attack success by the first judge; without it the first thing that was measured."""
    attacks = [row for row in report["measures"] if row["measure"] == "attack_success"]
    judge = report["judges"][0]["name"] if attacks else None
    shown = [row for row in attacks if row["judge"] == judge]
    if not attacks:
        first = next(iter(report["measures"]), None)
        shown = [row for row in report["measures"] if first and question_of(row) == question_of(first)]
    return "; ".join(
        f"{row['model']} {_value(row)} {WORDS[row['measure']]} ({row['set']}, {row['judge']})" for row in shown
    )


def _value(row: MeasureRow) -> str:
    rate = row["rate"]
    return percent(rate) if rate is None or is_share(row) else f"{rate:.4g}"


def facts_table(runs: Sequence[FinishedRun[Report]]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """(names of the runs, rows of (fact, its value in each run)); facts that differ between runs come first."""
    values_of: dict[str, list[Any]] = {}
    for index, run in enumerate(runs):
        selection = cast(dict[str, Any], run.report.get("selection") or {})
        for fact, value in {**run.report["facts"], **selection}.items():
            values_of.setdefault(fact, [None] * len(runs))[index] = value
    rows = sorted(values_of.items(), key=lambda row: len({str(value) for value in row[1]}) == 1)
    return [run.name for run in runs], rows


def role_shares(runs: Sequence[FinishedRun[EsiReport]]) -> list[tuple[str, list[float | None]]]:
    """(role, its share of each run's mask); None where a model has no such role."""
    shares: dict[str, list[float | None]] = {}
    for index, run in enumerate(runs):
        for role, cell in tables.by_role(run.report["units"]):
            k = max(run.report["selection"]["k"], 1)
            shares.setdefault(role, [None] * len(runs))[index] = cell.selected / k
    return list(shares.items())


def joined(runs: Sequence[FinishedRun[EvaluationReport]]) -> EvaluationReport:
    """Several evaluations as one, each model under its run's name, and under it also sets and judges that share their
    name with other prompts and judges. Only the parts that tables of rates read."""
    if len(runs) == 1:
        return runs[0].report
    sets = _ambiguous([{row["set"]: row.get("sha256") for row in run.report["sets"]} for run in runs])
    sets |= _ambiguous([_documents(run.report) for run in runs])
    judges = _ambiguous([{row["name"]: row for row in run.report["judges"]} for run in runs])
    measures = [
        {
            **row,
            "model": f"{run.name}: {row['model']}",
            "set": f"{row['set']} of {run.name}" if row["set"] in sets else row["set"],
            "judge": f"{row['judge']} of {run.name}" if row["judge"] in judges else row["judge"],
        }
        for run in runs
        for row in run.report["measures"]
    ]
    models = [{**model, "name": f"{run.name}: {model['name']}"} for run in runs for model in run.report["models"]]
    return cast(EvaluationReport, {"models": models, "measures": measures, "changes": []})


def _documents(report: EvaluationReport) -> dict[str, list[Any]]:
    """Task, as the measures name it → what tells its documents from others; the same for all models of a run."""
    results = [(row["task"], result) for row in report.get("tasks", []) for result in row["results"]]
    names = task_names((number, result["task"]) for number, result in results)
    return {names[number, result["task"]]: [dict(result).get(key) for key in DOCUMENTS] for number, result in results}


def _ambiguous(named: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names that mean different things in different runs. named: of each run, name → what it stands for."""
    meanings: dict[str, set[str]] = {}
    for of_run in named:
        for name, meaning in of_run.items():
            meanings.setdefault(name, set()).add(json.dumps(meaning, sort_keys=True))
    return {name for name, different in meanings.items() if len(different) > 1}
