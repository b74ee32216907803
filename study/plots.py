"""The page's figures. Every function draws what ``findings`` computed and returns a Figure that the caller closes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from findings import curve, preserved, settings
from matplotlib.figure import Figure

from esi_ds.report.figures import COLOURS, STYLE, plt

# Lines that stand out; every other method is drawn thin and grey.
SHOWN = ("esi", "esi-contrastive", "snip", "directed-contrastive", "tuning-grad", "random", "lora")
FROZEN = {"nothing": "o", "esi": "s", "random": "^", "snip": "D"}
Row = dict[str, Any]


def _bars(point: Row) -> tuple[float, float, float]:
    """In per cent: rate, and what the interval reaches below and above."""
    rate, low, high = (100 * point[key] for key in ("rate", "low", "high"))
    return rate, max(rate - low, 0), max(high - rate, 0)


def set_frontier(rows: Sequence[Row], model: str, wanted: str, label: str) -> Figure:
    """Requests not refused against another rate, one line a method at 1 % of the weights over its learning rates."""
    own = [row for row in rows if row["model"] == model and (row["ratio"] == 0.01 or row["criterion"] == "all")]
    groups = settings(own, "criterion")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 4.6))
        colours = iter(COLOURS)
        for (name,), found in sorted(groups.items(), key=lambda item: item[0][0] in SHOWN):
            points = curve(found, ("not_refused", wanted))
            x, y = ([point[flag]["rate"] * 100 for point in points] for flag in ("not_refused", wanted))
            if name not in SHOWN:
                axes.plot(x, y, color="#bbbbbb", linewidth=0.8, marker=".", markersize=3, zorder=1)
                axes.annotate(name, (x[-1], y[-1]), fontsize=5.5, color="#888888")
                continue
            errors = np.array([_bars(point[wanted])[1:] for point in points]).T
            across = np.array([_bars(point["not_refused"])[1:] for point in points]).T
            axes.errorbar(
                x,
                y,
                yerr=errors,
                xerr=across,
                color=next(colours),
                marker="o",
                markersize=4,
                capsize=2,
                label=name,
                zorder=2,
            )
        axes.set(xlabel="harmful requests not refused (%)", ylabel=f"{label} (%)", xlim=(-2, 102))
        axes.set_title(f"SET on {model}: 1 % of the weights, learning rates along each line")
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def spa_frontier(rows: Sequence[Row], model: str, tasks: Sequence[str]) -> Figure:
    """Requests not refused against the task's score: one panel a task, one mark a setting."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(tasks), figsize=(4.0 * len(tasks) + 1.4, 3.6), sharey=True, squeeze=False)
        for axes, task in zip(panels[0], tasks, strict=True):
            found = preserved([row for row in rows if row["model"] == model and row["task"] == task])
            for row in found:
                x, left, right = _bars(row["correct"])
                y, low, high = _bars(row["not_refused"])
                axes.errorbar(
                    [x],
                    [y],
                    xerr=[[left], [right]],
                    yerr=[[low], [high]],
                    marker=FROZEN[row["criterion"]],
                    color=COLOURS[list(FROZEN).index(row["criterion"])],
                    alpha=0.35 + 0.6 * (row["ratio"] / 0.3 if row["criterion"] != "nothing" else 1),
                    markersize=5,
                    linewidth=0.8,
                )
            axes.set_title(task)
            axes.set_xlabel("task score (%)")
        panels[0][0].set_ylabel("harmful requests not refused (%)")
        marks = [
            plt.Line2D([], [], marker=mark, color=COLOURS[index], linestyle="", label=f"{name} frozen")
            for index, (name, mark) in enumerate(FROZEN.items())
        ]
        panels[0][-1].legend(handles=marks, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.tight_layout()
    return figure


def mask_maps(found: Sequence[Row]) -> Figure:
    """Where masks lie: layer × role, one panel a model."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(found), figsize=(5.4 * len(found), 3.2), squeeze=False)
        for axes, about in zip(panels[0], found, strict=True):
            roles = [role for role in about["roles"] if role != "head"]
            values = np.full((len(about["layers"]), len(roles)), np.nan)
            for cell in about["cells"]:
                if cell["role"] in roles and cell["layer"] in about["layers"]:
                    values[about["layers"].index(cell["layer"]), roles.index(cell["role"])] = 100 * cell["share"]
            image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis", vmin=0)
            axes.set_xticks(range(len(roles)), roles, rotation=40, ha="right", fontsize=7)
            axes.set_yticks(range(len(about["layers"])), about["layers"])
            axes.set_title(about["model"], fontsize=9)
            axes.set_ylabel("layer")
            figure.colorbar(image, ax=axes, label="% of the mask", fraction=0.05)
        figure.tight_layout()
    return figure


def noise(curves: Mapping[str, Sequence[Row]]) -> Figure:
    """Requests not refused, and incoherent answers to them, against noise; one row of panels a model."""
    with plt.rc_context(STYLE):
        ratios = sorted({row["ratio"] for rows in curves.values() for row in rows})
        figure, panels = plt.subplots(
            len(curves), len(ratios), figsize=(4.4 * len(ratios) + 1.2, 2.7 * len(curves)), squeeze=False, sharey=True
        )
        for line, (model, rows) in zip(panels, curves.items(), strict=True):
            for axes, ratio in zip(line, ratios, strict=True):
                for index, order in enumerate(("top", "random", "bottom")):
                    for measure, style in (("attack_success", "-"), ("incoherent", ":")):
                        own = [
                            r for r in rows if r["ratio"] == ratio and r["order"] == order and r["measure"] == measure
                        ]
                        own = [r for r in own if r["judge"] != "guard" and "benign" not in r["set"]]
                        errors = np.array([_bars(row)[1:] for row in own]).T
                        label = f"{order}, {'not refused' if style == '-' else 'incoherent'}"
                        axes.errorbar(
                            [row["noise"] for row in own],
                            [100 * row["rate"] for row in own],
                            yerr=errors,
                            color=COLOURS[index],
                            linestyle=style,
                            capsize=2,
                            linewidth=1.1,
                            label=label,
                        )
                axes.set_title(f"{model}, {100 * ratio:g} % of the weights", fontsize=8)
                axes.set_xlabel("noise (σ)")
            line[0].set_ylabel("%")
        panels[0][-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.tight_layout()
    return figure
