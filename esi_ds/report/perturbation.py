"""A perturbation's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

from collections.abc import Sequence

from esi_ds.report import figures
from esi_ds.report.contents import CurveRow, PerturbationReport
from esi_ds.report.evaluation import changes_markdown, chart_title, interval, p_value, publish_rates, question_of
from esi_ds.tracking import Tracker
from esi_ds.words import counted

MAX_STEPS_PER_SIGMA = 10**9


def panels(report: PerturbationReport) -> list[tuple[str, list[CurveRow]]]:
    """(title, points) of every chart, one per measure, set and judge."""
    points: dict[tuple[str, str, str], list[CurveRow]] = {}
    for row in report["curves"]:
        points.setdefault(question_of(row), []).append(row)
    return [(chart_title(*key), rows) for key, rows in points.items()]


def closing_table(report: PerturbationReport) -> str:
    """What the console shows at the end."""
    lines = []
    for title, points in panels(report):
        lines += ["", title]
        for row in points:
            name = f"{row['order']} {row['ratio']:g}, noise {row['noise']:g}"
            tests = ", ".join(map(p_value, row.get("p_values", [])))
            against = f"   p {tests} (against noise 0)" if tests else ""
            lines.append(f"  {name:32} {interval(row)}{against}")
    lines += [f"{name} used {usage}" for name, usage in report["usage"].items()]
    restored = report["restored"]
    lines += [
        "",
        f"all weights restored after {counted(restored['checked'], 'cell')}: sha256 {restored['digest'][:16]}…",
    ]
    return "\n".join(lines)


def publish(tracker: Tracker, report: PerturbationReport) -> None:
    """Rates as scalars; the curves over the noise, in hundredths of σ or finer, as scalars and as images, and first as
    charts with a line for each part of the ranking."""
    publish_rates(tracker, report["measures"])
    tracker.text("changes", changes_markdown(report))
    per_sigma = steps_per_sigma([row["noise"] for row in report["curves"]])
    for row in report["curves"]:
        if row["rate"] is not None:
            part = f"{row['order']} {row['ratio']:g}"
            step, title = round(per_sigma * row["noise"]), chart_title(*question_of(row))
            tracker.points(step, {f"noise/{row['measure']}/{row['set']}/{row['judge']}/{part}": row["rate"]})
            tracker.overview(step, {f"{title}, by noise in units of {1 / per_sigma:g} σ": row["rate"]}, part)
    for title, points in panels(report):
        figures.log_figure(tracker, f"noise/{title}", figures.noise_curves(title, points))


def steps_per_sigma(noises: Sequence[float]) -> int:
    """How many of TensorBoard's steps, which are whole numbers, one σ is: 100, or more where the noises need it."""
    num_steps = 100
    while num_steps < MAX_STEPS_PER_SIGMA and len({round(num_steps * noise) for noise in noises}) < len(set(noises)):
        num_steps *= 10
    return num_steps
