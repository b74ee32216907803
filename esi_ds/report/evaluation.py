"""An evaluation's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

from collections.abc import Sequence

from esi_ds.data.thoughts import UNFINISHED
from esi_ds.eval.rows import AgreementRow, ChangeRow, MeasureRow, RateRow
from esi_ds.eval.tables import DIVERGENCE, TASK, is_share_metric
from esi_ds.report import figures
from esi_ds.report.contents import CurveRow, EvaluationReport, PivotRow, RateTables
from esi_ds.tracking import Tracker
from esi_ds.words import counted, ends_of

NAME_WIDTH = 24  # characters of a model's name on the console
WORDS = {
    "attack_success": "attack success",
    "any_attack_success": "attack success, any attempt",
    "refused": "refused",
    "divergence": "drift from the base",
    "incoherent": "incoherent",
    "task": "skill",
}


def pivot(report: EvaluationReport) -> list[PivotRow]:
    """One row per measure, set and judge: every model's rate, and its paired change."""
    cells = {(*question_of(row), row["model"]): row for row in report["measures"]}
    changed = {(*question_of(row), row["model"]): row for row in report["changes"]}
    names = [model["name"] for model in report["models"]]
    return [
        {
            "measure": WORDS[measure],
            "set": set_name,
            "judge": judge,
            "cells": [cells.get((measure, set_name, judge, name)) for name in names],
            "changes": [changed.get((measure, set_name, judge, name)) for name in names],
        }
        for measure, set_name, judge in dict.fromkeys(key[:3] for key in cells)
    ]


def percent(value: float | None) -> str:
    """A share of 1 in per cent; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(cell: RateRow | None) -> str:
    """A rate with its interval, its number of answers, of how many prompts or goals they are, and how many are
    missing or, among these, unfinished: they end within a thought."""
    if cell is None:
        return "not measured"
    missing = f", {cell['missing']} missing" if cell["missing"] else ""
    reasons = dict(cell).get("reasons")  # of measures; other rates have none
    if unfinished := reasons.get(UNFINISHED) if isinstance(reasons, dict) else None:
        missing += f", {unfinished} of them unfinished"
    rate, low, high = cell["rate"], cell["low"], cell["high"]
    if rate is None or is_share(cell):
        value, scale, digits = percent(rate), 100, ".1f"
    else:
        value, scale, digits = f"{rate:.4g}", 1, ".4g"
    bounds = ""
    if low is not None and high is not None:  # lm-eval computes no error for some metrics
        bounds = f" [{scale * low:{digits}}, {scale * high:{digits}}]"
    clusters = ""
    if "clusters" in cell:
        clusters = f" of {counted(cell['clusters'], cell['clustered_by'])}"
    return f"{value}{bounds} (n {cell['n']}{clusters}{missing})"


def is_share(cell: RateRow) -> bool:
    """Whether the rate is a share of 1. Measures say so; those of earlier versions do not, and other tables' are."""
    measured = dict(cell)
    if "is_share" in measured:
        return bool(measured["is_share"])
    if measured.get("measure") != TASK:
        return measured.get("measure") != DIVERGENCE
    has_flags = bool(cell["n"]) and cell["rate"] is not None and abs(cell["count"] / cell["n"] - cell["rate"]) < 1e-9
    return has_flags or is_share_metric(str(measured["judge"]))


def p_value(value: float | None) -> str:
    """Four digits, or that it is below them; a dash for None."""
    if value is None:
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def change(row: ChangeRow) -> str:
    """A paired difference with its interval: of a share percentage points, and the exact test where it has one; else
    mean scores in their own unit."""
    difference, low, high = row["difference"], row["low"], row["high"]
    if difference is None:
        return "no pairs"
    if row["p_value"] is None and not (row["measure"] == TASK and is_share_metric(row["judge"])):
        bounds = "" if low is None else f" [{low:+.4g}, {high:+.4g}]"
        return f"{difference:+.4g}{bounds}"
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    test = "" if row["p_value"] is None else f", p {p_value(row['p_value'])}"
    return f"{100 * difference:+.1f} points{bounds}{test}"


def closing_table(report: EvaluationReport) -> str:
    """What the console shows at the end: rates with 95 % intervals, then paired changes."""
    lines = []
    names = ends_of([model["name"] for model in report["models"]], NAME_WIDTH)
    width = max(NAME_WIDTH, *map(len, names))
    for row in pivot(report):
        lines += ["", f"{row['measure']} · {row['set']} · {row['judge']}"]
        for name, cell, changed in zip(names, row["cells"], row["changes"], strict=True):
            against = f"   {change(changed)} (against {changed['before']})" if changed else ""
            lines.append(f"  {name:{width}} {interval(cell)}{against}")
    for agreement in report["agreements"]:
        judges = f"{agreement['first']} and {agreement['second']}"
        lines += ["", f"{judges}: Cohen's kappa {kappa(agreement)} over {counted(agreement['num_pairs'], 'answer')}"]
    lines += [f"{name} used {usage}" for name, usage in report["usage"].items()]
    return "\n".join(lines)


def markdown(report: EvaluationReport) -> str:
    """The table of rates for TensorBoard."""
    names = [model["name"] for model in report["models"]]
    lines = ["| measure | set | judge | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for row in pivot(report):
        cells = " | ".join(interval(cell) for cell in row["cells"])
        lines.append(f"| {row['measure']} | {row['set']} | {row['judge']} | {cells} |")
    return "\n".join(lines)


def changes_markdown(report: RateTables) -> str:
    """The paired changes and the judges' agreement for TensorBoard."""
    lines = ["| measure | set | judge | model | against | pairs | difference [95 %], p |", "|---" * 7 + "|"]
    for row in report["changes"]:
        compared = f"{WORDS[row['measure']]} | {row['set']} | {row['judge']} | {row['model']} | {row['before']}"
        lines.append(f"| {compared} | {row['num_pairs']} | {change(row)} |")
    lines += ["", "| judge | judge | answers | Cohen's kappa [95 %] |", "|---" * 4 + "|"]
    for agreement in report["agreements"]:
        judges = f"{agreement['first']} | {agreement['second']}"
        lines.append(f"| {judges} | {agreement['num_pairs']} | {kappa(agreement)} |")
    return "\n".join(lines)


def kappa(row: AgreementRow) -> str:
    """Cohen's κ with two digits, and its interval where it has one."""
    if row["kappa"] is None:
        return "undefined: one verdict only"
    bounds = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['kappa']:.2f}{bounds}"


def publish(tracker: Tracker, report: EvaluationReport) -> None:
    """Rates as scalars, the tables as text, the figures as images; first a chart of each measure, set and judge with a
    line for each model."""
    for row in report["measures"]:
        if row["rate"] is not None:
            title = chart_title(*question_of(row))
            tracker.overview(row["n"] + row["missing"], {title: row["rate"]}, row["model"])
    publish_rates(tracker, report["measures"])
    tracker.text("rates", markdown(report))
    tracker.text("changes", changes_markdown(report))
    for title, rows in charts(report):
        figure = figures.rate_bars(title, rows, [model["name"] for model in report["models"]])
        figures.log_figure(tracker, f"rates/{title}", figure)


def question_of(row: MeasureRow | ChangeRow | CurveRow) -> tuple[str, str, str]:
    """(measure, set, judge): what rows of several models, or of several noises, have in common."""
    return row["measure"], row["set"], row["judge"]


def curve_name(measure: str, set_name: str, judge: str, model: str) -> str:
    """The TensorBoard curve of one measure of one model."""
    return f"{measure}/{set_name}/{judge}/{model}"


def chart_title(measure: str, set_name: str, judge: str) -> str:
    """Title of the chart that shows one measure of all models."""
    return f"{WORDS[measure]}, {set_name}, {judge}"


def publish_rates(tracker: Tracker, measures: Sequence[MeasureRow]) -> None:
    """The last point of every curve, over all of its prompts; those of a run that is done once more are dropped."""
    tracker.resume_at(-1)
    by_step: dict[int, dict[str, float]] = {}
    for row in measures:
        if row["rate"] is not None:
            name = curve_name(*question_of(row), row["model"])
            by_step.setdefault(row["n"] + row["missing"], {})[name] = row["rate"]
    for step, values in sorted(by_step.items()):
        tracker.scalars(step, values)


def charts(report: EvaluationReport) -> list[tuple[str, list[PivotRow]]]:
    """(title, rows of ``pivot``) of every chart, one per measure; metrics that are not shares have no bar."""
    rows = [row for row in pivot(report) if all(cell is None or is_share(cell) for cell in row["cells"])]
    return [
        (title, [row for row in rows if row["measure"] == title])
        for title in dict.fromkeys(row["measure"] for row in rows)
    ]
