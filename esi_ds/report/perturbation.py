"""A perturbation's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

from typing import Any

from esi_ds.report import figures
from esi_ds.report.evaluation import WORDS, interval, publish_rates
from esi_ds.tracking import Tracker

Row = dict[str, Any]


def panels(report: Row) -> list[tuple[str, list[Row]]]:
    """(title, points) of every chart: one a measure, set and judge."""
    places = dict.fromkeys((row["measure"], row["set"], row["judge"]) for row in report["curves"])
    return [
        (
            f"{WORDS[place[0]]}, {place[1]}, {place[2]}",
            [row for row in report["curves"] if (row["measure"], row["set"], row["judge"]) == place],
        )
        for place in places
    ]


def closing_table(report: Row) -> str:
    """What the console shows at the end."""
    lines = []
    for title, points in panels(report):
        lines += ["", title]
        for row in points:
            name = f"{row['order']} {row['ratio']:g}, noise {row['noise']:g}"
            lines.append(f"  {name:32} {interval(row)}")
    lines += [f"{name} used {what}" for name, what in report["usage"].items()]
    restored = report["restored"]
    lines += ["", f"all weights restored after {restored['checked']} cells: sha256 {restored['digest'][:16]}…"]
    return "\n".join(lines)


def publish(tracker: Tracker, report: Row) -> None:
    """Rates as scalars; the curves over the noise, in hundredths of σ, as scalars and as images."""
    publish_rates(tracker, report)
    for row in report["curves"]:
        if row["rate"] is not None:
            name = f"noise/{row['measure']}/{row['set']}/{row['judge']}/{row['order']} {row['ratio']:g}"
            tracker.points(round(100 * row["noise"]), {name: row["rate"]})
    for title, points in panels(report):
        figure = figures.noise_curves(title, points)
        tracker.figure(f"noise/{title}", figure)
        figures.plt.close(figure)
