"""A perturbation's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

from esi_ds.report import figures
from esi_ds.report.contents import CurveRow, PerturbationReport
from esi_ds.report.evaluation import WORDS, interval, publish_rates
from esi_ds.tracking import Tracker


def panels(report: PerturbationReport) -> list[tuple[str, list[CurveRow]]]:
    """(title, points) of every chart, one per measure, set and judge."""
    points: dict[tuple[str, str, str], list[CurveRow]] = {}
    for row in report["curves"]:
        points.setdefault((row["measure"], row["set"], row["judge"]), []).append(row)
    return [(f"{WORDS[measure]}, {set_name}, {judge}", rows) for (measure, set_name, judge), rows in points.items()]


def closing_table(report: PerturbationReport) -> str:
    """What the console shows at the end."""
    lines = []
    for title, points in panels(report):
        lines += ["", title]
        for row in points:
            name = f"{row['order']} {row['ratio']:g}, noise {row['noise']:g}"
            lines.append(f"  {name:32} {interval(row)}")
    lines += [f"{name} used {usage}" for name, usage in report["usage"].items()]
    restored = report["restored"]
    lines += ["", f"all weights restored after {restored['checked']} cells: sha256 {restored['digest'][:16]}…"]
    return "\n".join(lines)


def publish(tracker: Tracker, report: PerturbationReport) -> None:
    """Rates as scalars; the curves over the noise, in hundredths of σ, as scalars and as images."""
    publish_rates(tracker, report["measures"])
    for row in report["curves"]:
        if row["rate"] is not None:
            name = f"noise/{row['measure']}/{row['set']}/{row['judge']}/{row['order']} {row['ratio']:g}"
            tracker.points(round(100 * row["noise"]), {name: row["rate"]})
    for title, points in panels(report):
        figures.log_figure(tracker, f"noise/{title}", figures.noise_curves(title, points))
