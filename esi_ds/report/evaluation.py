"""An evaluation's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esi_ds.report import figures
from esi_ds.tracking import Tracker

Row = dict[str, Any]
WORDS = {
    "attack_success": "attack success",
    "refused": "refused",
    "incoherent": "incoherent",
    "task": "skill",
}


def places(measures: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(measure, set, judge) of every row of the tables, in order."""
    return list(dict.fromkeys((row["measure"], row["set"], row["judge"]) for row in measures))


def pivot(report: Row) -> list[Row]:
    """One row a measure, set and judge: the models' rates, and the paired changes by model."""
    cells = {(row["measure"], row["set"], row["judge"], row["model"]): row for row in report["measures"]}
    changed = {(row["measure"], row["set"], row["judge"], row["model"]): row for row in report["changes"]}
    names = [model["name"] for model in report["models"]]
    return [
        {
            "measure": WORDS[place[0]],
            "set": place[1],
            "judge": place[2],
            "cells": [cells.get((*place, name)) for name in names],
            "changes": [changed.get((*place, name)) for name in names],
        }
        for place in places(report["measures"])
    ]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(cell: Row | None) -> str:
    """A rate with its interval and what is missing."""
    if cell is None:
        return "–"
    missing = f", {cell['missing']} missing" if cell["missing"] else ""
    bounds = ""
    if cell["low"] is not None:  # lm-eval has no error of some metrics
        low, high = (f"{100 * cell[end]:.1f}" if is_share(cell) else f"{cell[end]:.4g}" for end in ("low", "high"))
        bounds = f" [{low}, {high}]"
    value = percent(cell["rate"]) if is_share(cell) else f"{cell['rate']:.4g}"
    return f"{value}{bounds} (n {cell['n']}{missing})"


def is_share(cell: Row) -> bool:
    """Of 1; a task's metric may be a perplexity."""
    return cell["rate"] is None or 0 <= cell["rate"] <= 1


def p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def change(row: Row) -> str:
    """A paired difference: points, interval, exact test; of mean scores in their own unit and without a test."""
    if row["difference"] is None:
        return "no pairs"
    if row["p_value"] is None:
        bounds = "" if row["low"] is None else f" [{row['low']:+.4g}, {row['high']:+.4g}]"
        return f"{row['difference']:+.4g}{bounds}"
    bounds = "" if row["low"] is None else f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return f"{100 * row['difference']:+.1f} points{bounds}, p {p_value(row['p_value'])}"


def closing_table(report: Row) -> str:
    """What the console shows at the end: rates with 95 % intervals, then paired changes."""
    lines = []
    for row in pivot(report):
        lines += ["", f"{row['measure']} · {row['set']} · {row['judge']}"]
        for model, cell, changed in zip(report["models"], row["cells"], row["changes"], strict=True):
            against = f"   {change(changed)} (against {changed['before']})" if changed else ""
            lines.append(f"  {model['name'][:24]:24} {interval(cell)}{against}")
    for row in report["agreements"]:
        lines += ["", f"{row['first']} and {row['second']}: Cohen's kappa {kappa(row)} over {row['num_pairs']} answers"]
    lines += [f"{name} used {what}" for name, what in report["usage"].items()]
    return "\n".join(lines)


def markdown(report: Row) -> str:
    """The table of rates for TensorBoard."""
    names = [model["name"] for model in report["models"]]
    lines = ["| measure | set | judge | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for row in pivot(report):
        cells = " | ".join(interval(cell) for cell in row["cells"])
        lines.append(f"| {row['measure']} | {row['set']} | {row['judge']} | {cells} |")
    return "\n".join(lines)


def changes_markdown(report: Row) -> str:
    """The paired changes and the judges' agreement for TensorBoard."""
    lines = ["| measure | set | judge | model | against | pairs | difference [95 %], p |", "|---" * 7 + "|"]
    for row in report["changes"]:
        place = f"{WORDS[row['measure']]} | {row['set']} | {row['judge']} | {row['model']} | {row['before']}"
        lines.append(f"| {place} | {row['num_pairs']} | {change(row)} |")
    lines += ["", "| judge | judge | answers | Cohen's kappa |", "|---" * 4 + "|"]
    for row in report["agreements"]:
        lines.append(f"| {row['first']} | {row['second']} | {row['num_pairs']} | {kappa(row)} |")
    return "\n".join(lines)


def kappa(row: Row) -> str:
    return "undefined" if row["kappa"] is None else f"{row['kappa']:.2f}"


def publish(tracker: Tracker, report: Row) -> None:
    """Rates as scalars, the tables as text, the figures as images."""
    publish_rates(tracker, report)
    tracker.text("rates", markdown(report))
    tracker.text("changes", changes_markdown(report))
    for title, rows in charts(report):
        figure = figures.rate_bars(title, rows, [model["name"] for model in report["models"]])
        tracker.figure(f"rates/{title}", figure)
        figures.plt.close(figure)


def tag(row: Row) -> str:
    """The curve of a measure's row."""
    return f"{row['measure']}/{row['set']}/{row['judge']}/{row['model']}"


def publish_rates(tracker: Tracker, report: Row) -> None:
    """The last point of every curve, over all of its prompts."""
    by_step: dict[int, dict[str, float]] = {}
    for row in report["measures"]:
        if row["rate"] is not None:
            by_step.setdefault(row["n"] + row["missing"], {})[tag(row)] = row["rate"]
    for step, values in sorted(by_step.items()):
        tracker.scalars(step, values)


def charts(report: Row) -> list[tuple[str, list[Row]]]:
    """(title, rows of ``pivot``) of every chart: one a measure; metrics that are no shares have no bar."""
    rows = [row for row in pivot(report) if all(cell is None or is_share(cell) for cell in row["cells"])]
    return [
        (word, [row for row in rows if row["measure"] == word]) for word in dict.fromkeys(r["measure"] for r in rows)
    ]
