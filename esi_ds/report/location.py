"""Where a mask and its scores lie, beside chance and beside the control: pure functions of a report's ``units``.

Two measures, each as a share of the whole model: the mask's weights, and the matrices' mean scores added up. The second
is the paper's statistic where the score is |g|·σ (docs/method.md §6). It counts matrices, not weights: 128 experts of
three matrices have a larger sum than four attention matrices of equal scores. A share over the control's share is what
this objective has of its own; what both have, any gradient has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esi_ds.report.contents import SelectionFacts, UnitRow
from esi_ds.report.tables import Cell, Heatmap, View, expert_of, grouped, heatmaps, role_of, role_order

PARTS = {"expert": "routed experts", "shared": "shared experts", "attention": "attention", "mlp": "dense MLPs"}
THIRDS = ("early", "middle", "late")  # of the depth


@dataclass(frozen=True)
class Location:
    """One part of the model beside the whole. NaN stands for shares and ratios of nothing."""

    part: Cell
    whole: Cell

    @property
    def weights(self) -> float:
        """Its share of the scored weights."""
        return ratio(self.part.numel, self.whole.numel)

    @property
    def share(self) -> float:
        """Its share of the mask."""
        return ratio(self.part.selected, self.whole.selected)

    @property
    def times_chance(self) -> float:
        """Its share of the mask over its share of the weights."""
        return ratio(self.share, self.weights)

    @property
    def statistic(self) -> float:
        """Its share of all matrices' mean scores."""
        return ratio(self.part.statistic, self.whole.statistic)

    @property
    def control_share(self) -> float:
        """Its share of the control's mask."""
        return ratio(self.part.control_selected, self.whole.control_selected)

    @property
    def control_times_chance(self) -> float:
        """The control's ``times_chance``."""
        return ratio(self.control_share, self.weights)

    @property
    def share_to_control(self) -> float:
        """Its share of the mask over its share of the control's mask; infinite where that holds nothing."""
        return ratio(self.share, self.control_share)

    @property
    def statistic_to_control(self) -> float:
        """Its share of the mean scores over its share of the control's."""
        return ratio(self.statistic, ratio(self.part.control_statistic, self.whole.control_statistic))


def ratio(part: float, whole: float) -> float:
    """Their quotient; over zero infinite, and NaN where both are zero."""
    if whole:
        return part / whole
    return math.inf if part > 0 else math.nan


def has_control(units: Sequence[UnitRow]) -> bool:
    """Whether the run compared its scores with a control's."""
    return any("control_mean_score" in unit for unit in units)


def is_papers(selection: SelectionFacts) -> bool:
    """Whether the scores are the paper's, |g|·σ of the safety score, and nothing else."""
    is_changed = selection.get("contrastive") or "normalise" in selection
    return selection["criterion"] == "esi" and not is_changed


def statistic_name(selection: SelectionFacts) -> str:
    """What the sum of mean scores is called: the paper's statistic is that of its own score alone."""
    return "the paper’s statistic" if is_papers(selection) else "summed mean scores"


def whole_of(units: Sequence[UnitRow]) -> Cell:
    """All logical matrices together."""
    cell = Cell()
    for unit in units:
        cell.add(unit)
    return cell


def by_role(units: Sequence[UnitRow]) -> list[tuple[str, Location]]:
    """(role, where it stands), in the order of ``SCORED``."""
    cells, whole = grouped(units, lambda unit: unit["role"]), whole_of(units)
    return [(role, Location(cells[role], whole)) for role in sorted(cells, key=role_order)]


def part_of(unit: UnitRow) -> str:
    """Routed experts, shared experts, attention, dense MLPs, or the rest."""
    return PARTS.get(unit["role"].split(".")[0], "head and others")


def by_part(units: Sequence[UnitRow]) -> list[tuple[str, Location]]:
    """(part, where it stands), by name."""
    whole = whole_of(units)
    return [(part, Location(cell, whole)) for part, cell in sorted(grouped(units, part_of).items())]


def largest_experts(units: Sequence[UnitRow], count: int = 20) -> list[tuple[str, Location]]:
    """(expert, where it stands) of the experts with the most selected weights; empty for a dense model."""
    cells, whole = grouped(units, expert_of), whole_of(units)
    largest = sorted(cells.items(), key=lambda item: (-item[1].selected, item[0]))[:count]
    return [(f"layer {layer}, expert {expert}", Location(cell, whole)) for (layer, expert), cell in largest]


def role_maps(units: Sequence[UnitRow], selection: SelectionFacts) -> list[Heatmap]:
    """Maps of role by layer: share of the mask, times chance, statistic, and with a control both ratios to it."""
    cells = grouped(units, role_of)
    roles = sorted({role for _, role in cells}, key=role_order)
    layers = sorted({layer for layer, _ in cells})
    views = _views(units, selection, with_chance=True)
    at = {(role, layer): cell for (layer, role), cell in cells.items()}
    return heatmaps(at, roles, layers, views, ("role", "layer")) if cells else []


def expert_maps(units: Sequence[UnitRow], selection: SelectionFacts) -> list[Heatmap]:
    """The same by layer and expert, its matrices together; empty for a dense model. Experts have equal sizes, so that
    times chance would be the share of the mask once more."""
    cells = grouped(units, expert_of)
    layers, experts = sorted({layer for layer, _ in cells}), sorted({expert for _, expert in cells})
    views = _views(units, selection, with_chance=False)
    return heatmaps(cells, layers, experts, views, ("layer", "expert")) if cells else []


def _views(units: Sequence[UnitRow], selection: SelectionFacts, with_chance: bool) -> list[View]:
    whole = whole_of(units)

    def view(title: str, unit: str, value: Callable[[Location], float], is_ratio: bool = False) -> View:
        return View(title, unit, lambda cell: value(Location(cell, whole)), is_ratio)

    views = [view("Share of the mask", "% of the mask", lambda at: 100 * at.share)]
    if with_chance:
        views.append(view("Mask against chance", "× chance", lambda at: at.times_chance, is_ratio=True))
    statistic = statistic_name(selection)
    named = statistic[0].upper() + statistic[1:]
    views.append(view(named, "% of the model’s sum", lambda at: 100 * at.statistic))
    if has_control(units):
        against, unit = "against the control’s", "× the control’s"
        views += [
            view(f"Share of the mask {against}", unit, lambda at: at.share_to_control, is_ratio=True),
            view(f"{named} {against}", unit, lambda at: at.statistic_to_control, is_ratio=True),
        ]
    return views


@dataclass(frozen=True)
class Region:
    """A role in the early, middle or late layers, or outside of them."""

    role: str
    layers: tuple[int, int] | None  # first and last; None outside the layers
    at: Location

    def __str__(self) -> str:
        if self.layers is None:
            return self.role
        first, last = self.layers
        return f"{self.role} of {f'layers {first}–{last}' if first < last else f'layer {first}'}"


def thirds_of(layers: Sequence[int]) -> dict[int, str]:
    """Layer → third of the depth that its middle lies in: of five layers 2, 1 and 2. layers: all of them, rising."""
    return {layer: THIRDS[3 * (2 * index + 1) // (2 * len(layers))] for index, layer in enumerate(layers)}


def regions(units: Sequence[UnitRow]) -> list[Region]:
    """Every role in every third of the depth, in the model's order."""
    layers = sorted({layer for unit in units if (layer := unit["layer"]) is not None})
    third_of = thirds_of(layers)
    rows: dict[tuple[str, str | None], list[UnitRow]] = {}
    for unit in units:
        layer = unit["layer"]
        rows.setdefault((unit["role"], None if layer is None else third_of[layer]), []).append(unit)
    whole, all_regions = whole_of(units), []
    for (role, _), part in rows.items():
        within = [layer for unit in part if (layer := unit["layer"]) is not None]
        ends = (min(within), max(within)) if within else None
        all_regions.append(Region(role, ends, Location(whole_of(part), whole)))
    return all_regions
