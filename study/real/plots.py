"""The figures of real.md. Every function draws what ``collect`` has computed; the caller closes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esi_ds.data.rows import Row
from esi_ds.report.figures import COLOURS, STYLE, plt
from study.plots import MARKS

MARKERS = ("o", "s")
GREY = "#666666"
BESIDE = {"fontsize": 8, "frameon": False, "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}  # a legend: outside


def layers(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Model → name of what is scored → share of the mask over share of the weights, by layer: a panel a model."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(curves), figsize=(5.2 * len(curves), 3.2), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, (model, lines) in zip(panels[0], curves.items(), strict=True):
            for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
                axes.plot(range(len(values)), values, color=colour, marker=".", markersize=4, linewidth=1.2, label=name)
            axes.axhline(1, color=GREY, linestyle=":", linewidth=0.8)
            axes.set(title=model, xlabel="layer", ylim=(0, None))
        panels[0][0].set_ylabel("share of the mask\nover share of the weights")
        panels[0][-1].legend(**BESIDE)
    return figure


def ratio_to_controls(ratios: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> Figure:
    """(model, control) → role → share of the mask over the control's, by layer: a panel each, in powers of two; what
    the control or the mask has nothing of is grey."""
    models = list(dict.fromkeys(model for model, _ in ratios))
    controls = list(dict.fromkeys(control for _, control in ratios))
    size = (3.6 * len(controls) + 1, 2.4 * len(models))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(len(models), len(controls), figsize=size, squeeze=False, layout="constrained")
        colours = plt.get_cmap("RdBu_r").with_extremes(bad="#d9d9d9")
        for axes in panels.flat:
            axes.axis("off")
        image = None
        for (model, control), by_role in ratios.items():
            axes = panels[models.index(model)][controls.index(control)]
            axes.axis("on")
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log2(np.array(list(by_role.values()), dtype=float))
            shown = np.ma.masked_invalid(values)
            image = axes.imshow(shown, aspect="auto", cmap=colours, vmin=-2, vmax=2, interpolation="nearest")
            axes.set_yticks(range(len(by_role)), [role.split(".")[-1] for role in by_role], fontsize=8)
            axes.set_title(f"{model} ÷ {control}", fontsize=9)
            axes.set_xlabel("layer", fontsize=8)
        if image is not None:
            bar = figure.colorbar(image, ax=panels, shrink=0.8, ticks=range(-2, 3))
            bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    return figure


def frontier(methods: Mapping[str, Sequence[Row]]) -> Figure:
    """Over-refusal and KL against harmful requests not refused: a line a method over its learning rates, the higher the
    larger the point. The target, at most 10 % of both, is shaded."""
    kept = [row["report"] for rows in methods.values() for row in rows]
    rates = [100 * part[column][0] for part in kept for column in ("not refused", "over-refused") if column in part]
    edge = min(100.0, 1.1 * max([20.0, *rates]))  # an empty range has no room for them
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(11.5, 3.8), layout="constrained")
        for number, (name, rows) in enumerate(methods.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
            for axes, column, scale in ((panels[0], "over-refused", 100), (panels[1], "KL", 1)):
                points = [row["report"] for row in rows if column in row["report"]]
                x = [100 * point["not refused"][0] for point in points]
                y = [scale * point[column][0] for point in points]
                axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
                axes.scatter(x, y, s=[12.0 * (1 + 2 * index) for index in range(len(x))], color=colour, marker=marker)
        panels[0].fill_between([0, 10], 0, 10, color="#009E73", alpha=0.2, linewidth=0)
        panels[0].set(ylabel="safe requests refused (%)", xlim=(-1, edge + 1), ylim=(-1, edge + 1))
        panels[1].set(ylabel="KL(base ‖ model), nats a token", xlim=(-1, edge + 1))
        for axes in panels:
            axes.set_xlabel("harmful requests not refused (%)")
        panels[1].legend(**BESIDE)
    return figure


def spa(points: Sequence[Row], not_tuned: Sequence[float] | None) -> Figure:
    """Harmful requests not refused against the score of the task that was learnt, with 95 % intervals: a panel a task,
    a colour what was frozen, a mark a learning rate. Equal scores stand beside each other.

    not_tuned: rate and interval of the model before, a line without a score; None: not measured.
    """
    tasks, frozen, rates = (list(dict.fromkeys(row[key] for row in points)) for key in ("task", "frozen", "lr"))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(frozen)}
    marks = {rate: MARKS[index % len(MARKS)] for index, rate in enumerate(rates)}
    with plt.rc_context(STYLE):
        size = (4.2 * len(tasks) + 1.6, 3.4)
        figure, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, task in zip(panels[0], tasks, strict=True):
            rows = [row for row in points if row["task"] == task]
            step = 4 * (1.02 - min(row["accuracy"][1] for row in rows))
            for row in rows:
                equal = [other for other in rows if other["accuracy"] == row["accuracy"]]
                beside = step * (equal.index(row) - (len(equal) - 1) / 2)
                _spa_point(axes, row, beside, colours[row["frozen"]], marks[row["lr"]])
            if not_tuned is not None:
                rate, low, high = (100 * value for value in not_tuned[:3])
                axes.axhline(rate, color=GREY, linestyle="--", linewidth=1)
                axes.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0)
            axes.set(title=task, xlabel="right answers to held-out questions (%)", ylim=(0, None))
        panels[0][0].set_ylabel("harmful requests\nnot refused (%)")
        lines = [plt.Line2D([], [], color=GREY, linestyle="--", label="not tuned")] if not_tuned is not None else []
        about_marks = [(f"{name} frozen", colour, "o") for name, colour in colours.items()]
        about_marks += [(f"rate {rate:g}", GREY, mark) for rate, mark in marks.items()]
        lines += [
            plt.Line2D([], [], color=colour, marker=mark, linestyle="", label=label)
            for label, colour, mark in about_marks
        ]
        panels[0][-1].legend(handles=lines, **BESIDE)
    return figure


def _spa_point(axes: Axes, row: Row, beside: float, colour: str, mark: str) -> None:
    """beside: how far from its score, in per cent, a point is drawn."""
    x, x_low, x_high = (100 * value for value in row["accuracy"][:3])
    y, y_low, y_high = (100 * value for value in row["report"]["not refused"][:3])
    across, along = [[x - x_low], [x_high - x]], [[y - y_low], [y_high - y]]
    axes.errorbar(x + beside, y, along, across, color=colour, marker=mark, markersize=5, elinewidth=0.8)


def noise(points: Sequence[Row]) -> Figure:
    """Harmful requests not refused against noise, a line an order of ESI's ranking or a control's mask; a panel greedy,
    one sampled."""
    samplings = sorted({point["sampling"] for point in points})
    with plt.rc_context(STYLE):
        size = (4.6 * len(samplings) + 1.2, 3.2)
        figure, panels = plt.subplots(1, len(samplings), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, sampling in zip(panels[0], samplings, strict=True):
            lines: dict[str, list[Row]] = {"top": [], "random": [], "bottom": []}
            for point in points:
                if point["sampling"] == sampling:
                    lines.setdefault(point["order"] if point["mask"] == "esi" else point["mask"], []).append(point)
            for (order, curve), colour in zip(lines.items(), COLOURS, strict=False):
                curve.sort(key=lambda point: point["noise"])
                rates = [100 * point["rate"] for point in curve]
                spread = [[100 * abs(point["rate"] - point[end]) for point in curve] for end in ("low", "high")]
                axes.errorbar(
                    [point["noise"] for point in curve], rates, yerr=spread, color=colour, marker=".", label=order
                )
            axes.set(title=sampling, xlabel="noise (σ of the matrix)", ylim=(-3, 103))
        panels[0][0].set_ylabel("harmful requests\nnot refused (%)")
        panels[0][-1].legend(**BESIDE)
    return figure
