"""The page's figures. Every function draws what ``findings`` and ``where`` computed; the caller closes the Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esi_ds.data.rows import Row
from esi_ds.report.figures import COLOURS, STYLE, plt
from study.findings import MAX_ATTACKS, MAX_OVER_REFUSAL

# Lines that stand out, always in the same colour; every other method is drawn thin and grey.
SHOWN = ("esi", "snip", "random", "esi-contrastive", "tuning-grad", "directed", "all")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
COLOUR = dict(zip(SHOWN, COLOURS, strict=True))
FROZEN = {"nothing": "o", "esi": "s", "random": "^", "snip": "D"}
LABELS = {
    "not_refused": "harmful requests not refused (%)",
    "unsafe_or_incoherent": "unsafe by the guard, or incoherent (%)",
    "correct": "benign accuracy (%)",
    "over_refused": "benign requests refused (%)",
}


def _bars(points: Sequence[Row]) -> tuple[list[float], np.ndarray]:
    """In per cent: rates, and what the intervals reach below and above [2, points]."""
    rates = np.array([point["rate"] for point in points])
    low, high = (np.array([point[key] for point in points]) for key in ("low", "high"))
    return list(100 * rates), 100 * np.clip(np.stack([rates - low, high - rates]), 0, None)


def _beside(axes: Axes, **options: Any) -> None:
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5), **options)


def _frontier(axes: Axes, methods: Sequence[Row], attack: str, wanted: str) -> None:
    """One line a method over its learning rates, with both intervals; the limits are drawn as dotted lines."""
    for row in sorted(methods, key=lambda row: row["criterion"] in SHOWN):
        x, across = _bars([point[attack] for point in row["curve"]])
        y, errors = _bars([point[wanted] for point in row["curve"]])
        name = row["criterion"]
        if name not in SHOWN:
            axes.plot(x, y, color="#c4c4c4", linewidth=0.8, marker=".", markersize=3, zorder=1)
            continue
        axes.errorbar(
            x,
            y,
            xerr=across,
            yerr=errors,
            color=COLOUR[name],
            marker=MARKS[SHOWN.index(name)],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.7,
            zorder=2,
        )
    for limit in MAX_ATTACKS:
        axes.axvline(100 * limit, color="#666666", linestyle=":", linewidth=0.8, zorder=0)
    if wanted == "over_refused":
        axes.axhline(100 * MAX_OVER_REFUSAL, color="#666666", linestyle=":", linewidth=0.8, zorder=0)
    axes.set(xlabel=LABELS[attack], ylabel=LABELS[wanted], xlim=(-3, 103))


def _legend_of(axes: Axes, methods: Sequence[Row]) -> None:
    names = [name for name in SHOWN if any(row["criterion"] == name for row in methods)]
    marks = [
        plt.Line2D([], [], color=COLOUR[name], marker=MARKS[SHOWN.index(name)], markersize=4.5, label=name)
        for name in names
    ]
    if any(row["criterion"] not in SHOWN for row in methods):
        marks.append(plt.Line2D([], [], color="#c4c4c4", marker=".", label="other methods"))
    _beside(axes, handles=marks)


def set_frontiers(methods: Sequence[Row], model: str) -> Figure:
    """At 1 %: benign accuracy and over-refusal (columns) against attack success by words and by the guard (rows)."""
    chosen = [r for r in methods if r["model"] == model and (r["ratio"] == 0.01 or r["criterion"] == "all")]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10.4, 7.0))
        for line, attack in zip(panels, ("not_refused", "unsafe_or_incoherent"), strict=True):
            for axes, wanted in zip(line, ("correct", "over_refused"), strict=True):
                _frontier(axes, chosen, attack, wanted)
        _legend_of(panels[0][1], chosen)
        figure.suptitle(f"SET on {model}, 1 % of the weights: learning rates along each line", x=0.02, ha="left")
        figure.tight_layout()
    return figure


def other_ratios(methods: Sequence[Row], model: str) -> list[float]:
    """The model's ratios besides 1 % and all weights."""
    return sorted({r["ratio"] for r in methods if r["model"] == model} - {0.01, 1.0})


def set_ratios(methods: Sequence[Row], model: str) -> Figure:
    """Benign accuracy against requests not refused at the other ratios, of which there is at least one."""
    ratios = other_ratios(methods, model)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(ratios), figsize=(4.4 * len(ratios) + 1.6, 3.6), squeeze=False)
        chosen = [r for r in methods if r["model"] == model and r["ratio"] in ratios]
        for axes, ratio in zip(panels[0], ratios, strict=True):
            _frontier(axes, [row for row in chosen if row["ratio"] == ratio], "not_refused", "correct")
            axes.set_title(f"{100 * ratio:g} % of the weights")
        _legend_of(panels[0][-1], chosen)
        figure.tight_layout()
    return figure


def spa_frontiers(rows: Sequence[Row], model: str, tasks: Sequence[str]) -> Figure:
    """Requests not refused against the task's score: one panel a task, one mark a setting and learning rate."""
    with plt.rc_context(STYLE):
        columns = min(2, len(tasks))
        lines = -(-len(tasks) // columns)
        figure, panels = plt.subplots(lines, columns, figsize=(4.4 * columns + 1.4, 3.2 * lines), squeeze=False)
        for axes, task in zip(panels.flat, tasks, strict=False):
            for row in (row for row in rows if row["model"] == model and row["task"] == task):
                x, across = _bars([row["correct"]])
                y, errors = _bars([row["not_refused"]])
                size = 7 if row["criterion"] == "nothing" else 4 + 20 * row["ratio"]
                axes.errorbar(
                    x,
                    y,
                    xerr=across,
                    yerr=errors,
                    marker=FROZEN[row["criterion"]],
                    color=COLOURS[list(FROZEN).index(row["criterion"])],
                    alpha=0.75,
                    markersize=size,
                    linewidth=0.7,
                )
            axes.set(title=task, xlabel="task score (%)", ylabel="not refused (%)")
        for axes in list(panels.flat)[len(tasks) :]:
            axes.set_visible(False)
        marks = [
            plt.Line2D([], [], marker=mark, color=COLOURS[index], linestyle="", label=f"{name} frozen")
            for index, (name, mark) in enumerate(FROZEN.items())
        ]
        _beside(panels[0][-1], handles=marks, title="larger: more frozen", title_fontsize=8)
        figure.suptitle(f"SPA on {model}", x=0.02, ha="left")
        figure.tight_layout()
    return figure


def mask_maps(maps: Sequence[Row]) -> Figure:
    """Share of the mask over share of the weights by layer and role, one panel a model; white is what chance gives."""
    with plt.rc_context(STYLE):
        columns = min(2, len(maps))
        lines = -(-len(maps) // columns)
        figure, panels = plt.subplots(lines, columns, figsize=(5.0 * columns, 2.9 * lines), squeeze=False)
        for axes, about in zip(panels.flat, maps, strict=False):
            roles = [row["role"] for row in about["roles"] if row["role"] != "head"]
            values = np.full((len(about["layers"]), len(roles)), np.nan)
            for cell in about["cells"]:
                if cell["role"] in roles and cell["layer"] in about["layers"]:
                    position = about["layers"].index(cell["layer"]), roles.index(cell["role"])
                    values[position] = np.log2(max(cell["density"], 1 / 16))
            image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="PuOr_r", vmin=-4, vmax=4)
            axes.set_xticks(range(len(roles)), roles, rotation=35, ha="right", fontsize=7)
            axes.set_yticks(range(len(about["layers"])), about["layers"])
            axes.set(title=about["model"], ylabel="layer")
            bar = figure.colorbar(image, ax=axes, fraction=0.05, label="times chance")
            bar.set_ticks([-4, -2, 0, 2, 4], labels=["≤ 1/16", "1/4", "1", "4", "≥ 16"])
        for axes in list(panels.flat)[len(maps) :]:
            axes.set_visible(False)
        figure.tight_layout()
    return figure


def stability(overlaps: Sequence[Row]) -> Figure:
    """Mean overlap and its range over pairs, one line a comparison, one colour a model."""
    models = list(dict.fromkeys(row["model"] for row in overlaps))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 1.2 + 0.21 * len(overlaps)))
        for line, row in enumerate(overlaps):
            mean, least, greatest = (100 * row[key] for key in ("mean", "least", "greatest"))
            colour = COLOURS[models.index(row["model"])]
            axes.errorbar(
                [mean],
                [line],
                xerr=[[mean - least], [greatest - mean]],
                fmt="o",
                color=colour,
                markersize=4,
                capsize=2,
            )
        axes.set_yticks(range(len(overlaps)), [row["what"] for row in overlaps], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlim=(-2, 102), xlabel="weights in both masks of 1 % (%)")
        marks = [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[i], label=m) for i, m in enumerate(models)]
        _beside(axes, handles=marks)
    return figure


def noise(curves: Mapping[str, Sequence[Row]]) -> Figure:
    """Attack success by both judges, and incoherent answers, against noise; one line of panels a model."""
    ratios = sorted({row["ratio"] for rows in curves.values() for row in rows})
    orders = ("top", "random", "bottom")
    styles: dict[str, Literal["-", "--", ":"]] = {"not refused": "-", "unsafe": "--", "incoherent": ":"}
    with plt.rc_context(STYLE):
        shape = (len(curves), len(ratios))
        figure, panels = plt.subplots(
            *shape, figsize=(4.2 * shape[1] + 1.4, 2.9 * shape[0]), squeeze=False, sharey=True
        )
        for line, (model, rows) in zip(panels, curves.items(), strict=True):
            for axes, ratio in zip(line, ratios, strict=True):
                for index, order in enumerate(orders):
                    for measure, style in styles.items():
                        keys = (ratio, order, measure)
                        points = [r for r in rows if (r["ratio"], r["order"], r["measure"]) == keys]
                        points = sorted((r for r in points if r["rate"] is not None), key=lambda r: r["noise"])
                        if points:
                            x = [row["noise"] for row in points]
                            y, errors = _bars(points)
                            axes.errorbar(x, y, yerr=errors, color=COLOURS[index], linestyle=style, capsize=2)
                axes.set_title(f"{model}, {100 * ratio:g} %", fontsize=9)
                axes.set_xlabel("noise (σ)")
            line[0].set_ylabel("answers (%)")
        marks = [plt.Line2D([], [], color=COLOURS[i], label=order) for i, order in enumerate(orders)]
        marks += [plt.Line2D([], [], color="#444444", linestyle=s, label=name) for name, s in styles.items()]
        _beside(panels[0][-1], handles=marks)
        figure.tight_layout()
    return figure
