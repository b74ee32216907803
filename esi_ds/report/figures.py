"""Figures of a report, drawn by matplotlib without a display. The caller closes every Figure returned."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from esi_ds.eval.rows import MeasureRow  # noqa: E402
from esi_ds.report.contents import CurveRow, MetricsRow, PivotRow, ScoreHistogram  # noqa: E402
from esi_ds.report.tables import Heatmap  # noqa: E402
from esi_ds.tracking import Tracker  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MAX_LABELS = 32
MAX_LABEL = 60  # characters of one label: a longer one would make a picture too wide to be drawn
STYLE: dict[Any, Any] = {  # matplotlib types the keys of a style as a literal of all names
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def as_label(text: str) -> str:
    """A name that a user chose, as matplotlib shows it unchanged: no formula between dollar signs, no control
    characters, at most ``MAX_LABEL`` characters, and not left out of a legend for its leading underscore."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(shown) > MAX_LABEL:
        shown = shown[: MAX_LABEL // 2] + "…" + shown[-MAX_LABEL // 2 :]
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def figure_png(figure: Figure) -> bytes:
    """PNG bytes; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def figure_svg(figure: Figure) -> str:
    """An ``<svg>`` element for a page; the figure is closed. Black is the page's own colour for text, the background
    is the page's, and texts are texts. The same figure has the same characters."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esi_ds"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every picture of a page has the same ones
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # a page's parser knows them; nothing in it looks like an address
    return re.sub(r"<[^>]*>", lambda tag: tag[0].replace("#000000", "currentColor"), svg)


def log_figure(tracker: Tracker, tag: str, figure: Figure) -> None:
    """An image in TensorBoard; the figure is closed."""
    tracker.figure(tag, figure)
    plt.close(figure)


def heatmap(data: Heatmap) -> Figure:
    """Rows from the top; readable from 2 × 7 to 94 × 128 cells. Cells that do not exist are grey."""
    values = np.array(data.values, dtype=float)
    rows, columns = values.shape
    width = min(15.0, max(5.5, 1.8 + 0.62 * columns if columns <= 16 else 1.8 + 0.11 * columns))
    height = min(16.0, max(2.4, 1.2 + 0.34 * rows if rows <= 40 else 1.2 + 0.13 * rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height))
        draw_heatmap(axes, data)
    return figure


def draw_heatmap(axes: Axes, data: Heatmap) -> None:
    """Draw into ``axes``, with a colour bar; up to 120 cells also show their values."""
    values = np.array(data.values, dtype=float)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        cmap=plt.get_cmap("viridis").with_extremes(bad="#d9d9d9"),
        interpolation="nearest",
        vmin=min(0.0, np.nanmin(values)),
    )
    axes.set_title(as_label(data.title))
    axes.set_xlabel(data.column_axis)
    axes.set_ylabel(data.row_axis)
    _label(axes.set_xticks, data.columns, rotate=any(len(label) > 3 for label in data.columns))
    _label(axes.set_yticks, data.rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.figure.colorbar(image, ax=axes, label=data.unit, fraction=0.05, pad=0.02, format="%.3g")
    if values.size <= 120:
        _write_values(axes, values)


def _label(set_ticks: Callable[..., object], labels: Sequence[str], rotate: bool = False) -> None:
    """All labels where there is room for them, otherwise every n-th."""
    step = math.ceil(len(labels) / MAX_LABELS)
    options = {"rotation": 40, "ha": "right"} if rotate else {}
    set_ticks(range(0, len(labels), step), [as_label(label) for label in labels[::step]], **options)


def _write_values(axes: Axes, values: np.ndarray) -> None:
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            axes.text(
                column,
                row,
                f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < middle else "black",
            )


def score_histogram(overall: ScoreHistogram, by_role: Mapping[str, list[int]], threshold: float | None) -> Figure:
    """Distribution of log10 score, each role normalised to its own size; the threshold as a line."""
    edges = np.array(overall["log10_edges"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 3.6))
        total = max(sum(overall["counts"]), 1)
        axes.stairs(np.array(overall["counts"]) / total, edges, fill=True, color="#cccccc", label="all scored weights")
        for index, (role, counts) in enumerate(sorted(by_role.items())):
            axes.stairs(
                np.array(counts) / max(sum(counts), 1),
                edges,
                color=COLOURS[index % len(COLOURS)],
                linestyle=("-", "--")[index // len(COLOURS) % 2],
                linewidth=1.2,
                label=as_label(role),
            )
        if threshold:
            axes.axvline(math.log10(threshold), color="black", linestyle=":", label="threshold")
        axes.set(title="Distribution of scores", xlabel="log10 score", ylabel="share of the role's weights")
        _legend_beside(axes)
    return figure


def judge_histogram(scores: Sequence[float]) -> Figure:
    """Judge scores of the responses; higher is safer."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 2.8))
        axes.hist(scores, bins=min(40, max(5, len(scores) // 3)), color=COLOURS[0])
        axes.axvline(float(np.mean(scores)), color="black", linestyle=":", label=f"mean {np.mean(scores):.3g}")
        axes.set(title="Judge scores of the responses", xlabel="judge score (higher is safer)", ylabel="responses")
        _count_in_whole_numbers(axes.yaxis)
        axes.legend(frameon=False)
    return figure


def _count_in_whole_numbers(axis: Axis) -> None:
    """No ticks between, also where the axis is short."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _legend_beside(axes: Axes) -> None:
    """A legend to the right of the axes."""
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _points(rows: Sequence[MetricsRow], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a value."""
    having = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in having], [row[key] for row in having]


def progress_curves(rows: Sequence[MetricsRow]) -> Figure:
    """Judge score and gradient norm of each micro-batch."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.5, 2.6))
        for axes, key, label in zip(
            panels, ("judge_score", "gradient_norm"), ("mean judge score", "norm of the gradient"), strict=True
        ):
            steps, values = _points(rows, key)
            axes.plot(steps, values, color=COLOURS[0], marker="." * (len(steps) < 200))
            axes.set(title=label, xlabel="prompts")
            _count_in_whole_numbers(axes.xaxis)
        figure.tight_layout()
    return figure


def training_curves(rows: Sequence[MetricsRow]) -> Figure:
    """Loss, gradient norm, learning rate and share of the trained weights that moved, by step."""
    views = (
        ("loss", "loss per learnt token"),
        ("gradient_norm", "norm of the trained gradient"),
        ("learning_rate", "learning rate"),
        ("share_moved", "share of trained weights that moved"),
    )
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(views), figsize=(13, 2.6))
        for axes, (key, label) in zip(panels, views, strict=True):
            axes.plot(*_points(rows, key), color=COLOURS[0], linewidth=1.2)
            axes.set_title(label, fontsize=9)
            axes.set_xlabel("step")
            _count_in_whole_numbers(axes.xaxis)
            axes.set_ylim(bottom=0)
        figure.tight_layout()
    return figure


def loss_curves(runs: Sequence[tuple[str, Sequence[MetricsRow]]]) -> Figure:
    """Loss by step of several runs. runs: (name, rows of metrics.jsonl)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, 3.0))
        for index, (name, rows) in enumerate(runs):
            line = ("-", "--", ":")[index // len(COLOURS) % 3]
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(*_points(rows, "loss"), line, color=colour, linewidth=1.2, label=as_label(name))
        axes.set(title="loss per learnt token", xlabel="step")
        _count_in_whole_numbers(axes.xaxis)
        axes.set_ylim(bottom=0)
        _legend_beside(axes)
    return figure


def rate_bars(
    title: str, rows: Sequence[PivotRow], models: Sequence[str], in_line_with: Sequence[PivotRow] = ()
) -> Figure:
    """Rates of several models with their intervals, one group of bars a set and judge (``evaluation.pivot``).

    in_line_with: rows of the charts above and below, which leave as much room for their labels, so that all axes begin
    at one place.
    """
    height = 1.0 + 0.26 * max(3, len(rows) * len(models))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, min(height, 20.0)))
        step = len(models) + 0.8
        for index, model in enumerate(models):
            positions, rates, bounds = _bars([row["cells"][index] for row in rows])
            axes.barh(
                step * positions + index,
                100 * rates,
                xerr=_error_bars(rates, bounds),
                color=COLOURS[index % len(COLOURS)],
                error_kw={"linewidth": 1.0, "capsize": 2},
                label=as_label(model),
            )
        axes.set_yticks(
            [group * step + (len(models) - 1) / 2 for group in range(len(rows))],
            list(map(_group_label, rows)),
            fontsize=8,
        )
        for label in dict.fromkeys(map(_group_label, in_line_with)):  # unseen, but counted as part of the picture
            axes.annotate(label, (0, 0.5), (-7, 0), "axes fraction", "offset points", ha="right", fontsize=8, alpha=0)
        axes.invert_yaxis()
        axes.set(title=f"{as_label(title)}, with 95 % intervals", xlabel="%", xlim=(0, 104))
        _legend_beside(axes)
    return figure


def _group_label(row: PivotRow) -> str:
    return f"{as_label(row['set'])}\n{as_label(row['judge'])}"


def _bars(cells: Sequence[MeasureRow | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the cells that have a rate: their positions [bars], rates [bars] and ends of intervals [2, bars].

    A rate without an interval has its own value as both ends.
    """
    positions, rates, bounds = [], [], []
    for position, cell in enumerate(cells):
        if cell is not None and (rate := cell["rate"]) is not None:
            low, high = cell["low"], cell["high"]
            positions.append(position)
            rates.append(rate)
            bounds.append((rate if low is None else low, rate if high is None else high))
    return np.array(positions), np.array(rates), np.array(bounds).reshape(-1, 2).T


def _error_bars(rates: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Lengths in per cent, down and up [2, n], of the bars from rates [n] to the ends of their intervals [2, n]."""
    return 100 * np.clip(np.stack([rates - bounds[0], bounds[1] - rates]), 0, None)


def noise_curves(title: str, points: Sequence[CurveRow]) -> Figure:
    """Rate against noise, one line an order and one panel a ratio (rows of ``curves`` in a perturbation's report)."""
    ratios = list(dict.fromkeys(point["ratio"] for point in points))
    orders = list(dict.fromkeys(point["order"] for point in points))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(ratios), figsize=(min(4.2 * len(ratios) + 1.2, 15), 3.0), sharey=True, squeeze=False
        )
        for axes, ratio in zip(panels[0], ratios, strict=True):
            for index, order in enumerate(orders):
                curve = [p for p in points if p["ratio"] == ratio and p["order"] == order and p["rate"] is not None]
                rates = np.array([point["rate"] for point in curve])
                bounds = np.array([[point["low"], point["high"]] for point in curve]).reshape(-1, 2).T
                axes.errorbar(
                    [point["noise"] for point in curve],
                    100 * rates,
                    yerr=_error_bars(rates, bounds),
                    color=COLOURS[index],
                    marker="o",
                    markersize=3.5,
                    capsize=2,
                    linewidth=1.3,
                    label=as_label(order),
                )
            axes.set_title(f"{100 * ratio:g} % of the weights", fontsize=9)
            axes.set(xlabel="noise, in σ of the matrix", ylim=(-3, 103))
        panels[0][0].set_ylabel("%")
        _legend_beside(panels[0][-1])
        figure.suptitle(as_label(title), fontsize=11, fontweight="bold", x=0.02, ha="left")
        figure.tight_layout()
    return figure
