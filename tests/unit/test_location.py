"""Where a mask and its scores lie, beside chance and the control; the page's heatmaps, at all sizes of models."""

from __future__ import annotations

import math
import re
from itertools import groupby
from pathlib import Path

import fabricate
import pytest
from test_report import DENSE, report, unit

from esi_ds.report import figures, location, sentences
from esi_ds.report.heat_tables import heat_table
from esi_ds.report.html import render
from esi_ds.report.tables import Heatmap
from study import grid, where

MIXTURE = [
    unit("v", "attention.v", 0, None, 100, 30, 4.0),
    *(unit(f"{e}{p}", f"expert.{p}", 0, e, 100, 10, 1.0 + e) for e in (0, 1) for p in ("gate", "up", "down")),
]


def with_control(units: list[dict], selected: list[int], scores: list[float]) -> list[dict]:
    rows = zip(units, selected, scores, strict=True)
    return [{**row, "control_selected": count, "control_mean_score": score} for row, count, score in rows]


CONTROLLED = with_control(DENSE, [20, 30, 0, 0], [1.0, 1.0, 1.0, 1.0])


def test_the_statistic_adds_up_matrices_and_the_mask_counts_weights() -> None:
    """Six expert matrices of scores 1 and 2 outweigh one of 4, though each of its weights has twice their score."""
    parts = dict(location.by_part(MIXTURE))
    attention, experts = parts["attention"], parts["routed experts"]
    assert attention.statistic == pytest.approx(4 / 13) and experts.statistic == pytest.approx(9 / 13)
    assert attention.part.mean_score == 4.0 and experts.part.mean_score == 1.5
    assert attention.weights == pytest.approx(1 / 7) and attention.share == pytest.approx(1 / 3)
    assert attention.times_chance == pytest.approx(7 / 3) and experts.times_chance == pytest.approx(7 / 9)
    by_expert = location.expert_maps(MIXTURE, report(MIXTURE)["selection"])
    assert [view.title for view in by_expert] == ["Share of the mask", "The paper’s statistic"]
    assert by_expert[1].values == [[pytest.approx(300 / 13), pytest.approx(600 / 13)]]
    assert [name for name, _ in location.largest_experts(MIXTURE)] == ["layer 0, expert 0", "layer 0, expert 1"]


def test_shares_over_the_controls_shares() -> None:
    roles = dict(location.by_role(CONTROLLED))
    assert roles["attention.q"].share_to_control == pytest.approx((40 / 50) / (50 / 50))
    assert roles["attention.q"].statistic_to_control == pytest.approx((3.0 / 8.5) / (2 / 4))
    assert roles["attention.q"].control_times_chance == pytest.approx(1 / (400 / 600))
    assert math.isnan(roles["mlp.down"].share_to_control) and math.isinf(roles["head"].share_to_control)
    titles = [view.title for view in location.role_maps(CONTROLLED, report(CONTROLLED)["selection"])]
    assert titles[3:] == ["Share of the mask against the control’s", "The paper’s statistic against the control’s"]
    page = render(report(CONTROLLED))
    assert "of the scored weights</th>" in page  # these shares add up to 1, the model's other weights apart
    row = re.search(r"<tr><td>attention.q</td>(.*)</tr>", page)
    assert row is not None
    cells = re.findall(r">([^<]+)</td>", row[1])
    assert cells[:6] == ["66.67 %", "80.00 %", "1.20", "35.29 %", "0.80", "0.71"]
    assert "mask ÷ control’s" in page and "∞" in page


def test_a_run_without_a_control_speaks_of_none() -> None:
    assert "control" not in render(report(DENSE))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "the paper’s statistic"),
        ({"criterion": "snip"}, "summed mean scores"),
        ({"contrastive": True}, "summed mean scores"),
        ({"normalise": "matrix"}, "summed mean scores"),  # every matrix has a mean of 1
    ],
)
def test_only_the_sum_of_esis_own_scores_is_called_the_papers(changed: dict, name: str) -> None:
    selection = {**report(DENSE)["selection"], **changed}
    assert location.statistic_name(selection) == name  # type: ignore[arg-type]


def test_regions_are_thirds_of_the_depth() -> None:
    units = [unit(f"v{layer}", "attention.v", layer, None, 10, 1, 1.0) for layer in range(30)]
    units.append(unit("head", "head", None, None, 10, 1, 1.0))
    names = [str(region) for region in location.regions(units)]
    thirds = ["layers 0–9", "layers 10–19", "layers 20–29"]
    assert names == [*(f"attention.v of {third}" for third in thirds), "head"]
    assert [str(region) for region in location.regions(units[4:5])] == ["attention.v of layer 4"]


@pytest.mark.parametrize(("depth", "sizes"), [(30, (10, 10, 10)), (5, (2, 1, 2)), (4, (1, 2, 1)), (8, (3, 2, 3))])
def test_thirds_are_cut_alike_by_reports_and_studies(depth: int, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Of a depth that is no multiple of three, too, both ends have as many layers. Both read the same report."""
    third_of = location.thirds_of(range(depth))
    assert depth != 5 or third_of == {0: "early", 1: "early", 2: "middle", 3: "late", 4: "late"}
    assert [list(third_of.values()).count(third) for third in location.THIRDS] == list(sizes)
    fabricate.mask_report(
        tmp_path / grid.mask_name("llama-aligned", "esi", 0),
        [("attention.v", layer, None, 10, 1) for layer in range(depth)],
    )
    shares = where.places(tmp_path, "llama-aligned")
    assert shares is not None
    assert [row["of_weights"] for row in shares["thirds"]] == pytest.approx([size / depth for size in sizes])
    units = [unit(f"v{layer}", "attention.v", layer, None, 10, 1, 1.0) for layer in range(depth)]
    assert [region.at.weights for region in location.regions(units)] == pytest.approx([size / depth for size in sizes])


@pytest.mark.parametrize(("rows", "columns"), [(7, 2), (7, 30), (7, 61), (12, 126), (61, 128), (94, 256)])
def test_labels_stay_apart_at_all_sizes(rows: int, columns: int) -> None:
    """As many columns as cells, a label for some of them, and never more than fit at the table's least width."""
    values = [[float(row + column) for column in range(columns)] for row in range(rows)]
    data = Heatmap("t", list(map(str, range(rows))), list(map(str, range(columns))), values, "%", "role", "layer")
    table = heat_table(data)
    assert sum(span for _, span in table.header) == columns and len(table.header) <= 16
    widths = (table.least_width - table.label_width) / columns
    assert all(span * widths >= 6.6 * len(label) for label, span in table.header)
    spans = [row.span for row in table.rows]
    assert sum(spans) == rows and all(row.span * table.row_height >= 11 for row in table.rows[:-5] if row.span)
    assert table.rows[-1].cells[-1].shade == "a20" and table.rows[0].cells[0].shade == "a0"
    assert table.rows[1].cells[1].tip == "role 1, layer 1: 2"
    assert table.numbers is not None and [len(row.cells) for row in table.numbers.rows] == [rows] * columns
    assert table.numbers.rows[1].cells[1].text == "2"


def test_maps_of_experts_can_be_read_as_numbers_and_stay_light() -> None:
    """A cell and its number take less than 80 bytes: six maps of 94 layers, with a control, under 6 MB. Here are 24."""
    layers, experts = range(24), range(128)
    units = [unit(f"{layer}.{e}", "expert.up", layer, e, 1000, e + 1, 1.0 + layer) for layer in layers for e in experts]
    routing = [{"set": "harmful", "layer": layer, "tokens": [3, *[1] * 127]} for layer in layers]
    page = render({**report(units), "routing": routing})
    grids = re.findall(r'<table class="heat numbers.*?</table>', page.partition("<h2>Experts")[2], re.S)
    assert len(grids) == 3  # the mask, the statistic, the routing
    first = re.search(r"<tr><th>0</th>(.*)</tr>", grids[2])
    assert first is not None and re.findall(r">([^<]*)</td>", first[1]) == ["2.3"] * 24
    assert all(f'title="layer 0, expert 0: {value}"' in page for value in ("0.000505", "0.0026", "2.31"))
    assert len(page) - len(render(report(units[:1]))) < 80 * 3 * 24 * 128


def test_a_long_name_does_not_push_the_cells_out_of_sight() -> None:
    data = Heatmap("t", ["r" * 1000], ["c" * 1000, "d"], [[1.0, 2.0]], "%", "role", "layer")
    table = heat_table(data)
    assert table.label_width < 250 and table.least_width < 1000 and table.numbers is not None
    assert table.numbers.least_width < 1000


def test_shades_of_ratios_and_of_nothing() -> None:
    values = [[1.0, 4.0, 0.25, 0.0, math.inf, math.nan, 2.0]]
    table = heat_table(Heatmap("t", ["a"], list("bcdefgh"), values, "× chance", "role", "layer", True))
    assert [cell.shade for cell in table.rows[0].cells] == ["r10", "r20", "r0", "r0", "r20", "", "r15"]
    assert [cell.text for cell in table.rows[0].cells] == ["1", "4", "0.25", "0", "∞", "", "2"]
    assert table.scale == ("1/4 or less", "4 × chance or more")


def test_a_very_great_ratio_is_short_and_whole_on_hover() -> None:
    """A control whose statistic is next to nothing: 11 digits would stand over the neighbours' cells."""
    values = [[58418343925.25, 1000.0, 1000.5, 2.0]]
    table = heat_table(Heatmap("t", ["a"], list("bcde"), values, "× the control’s", "layer", "expert", True))
    cells = table.rows[0].cells
    assert [cell.text for cell in cells] == ["> 1,000", "1,000", "> 1,000", "2"]
    assert cells[0].tip == "layer a, expert b: 58,418,343,925" and table.numbers is not None
    assert [row.cells[0].text for row in table.numbers.rows] == ["58,418,343,925", "1,000", "1,000", "2"]
    assert (table.least_width - table.label_width) / 4 >= 6.6 * len("> 1,000")
    controls = [1e-12 if row["role"] == "attention.q" else 1.0 for row in DENSE]
    units = with_control(DENSE, [20, 30, 0, 0], controls)
    page = render(report(units))
    assert re.search(r'<span title="[\d,]{7,}">&gt; 1,000</span>', page) and not re.search(r">\d{7,}", page)
    mask = {**report(units), "units": with_control(DENSE, [1, 1, 10**6, 1], [1.0] * 4)}
    assert "more than 1,000 times the control’s share" in " ".join(sentences.where(mask, "The mask"))


def test_pictures_take_the_pages_colours_and_are_the_same_each_time() -> None:
    """What is black becomes the page's own colour, but for a name that looks like one."""
    pages = [render(report(DENSE)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "currentColor" in pages[0] and "#000000" not in pages[0]
    assert "prefers-color-scheme: dark" in pages[0] and "@media print" in pages[0]
    losses = figures.loss_curves([("#000000", [{"step": 1, "loss": 1.0}])])
    assert re.findall(r">[^<]*#000000[^<]*<", figures.figure_svg(losses)) == [">#000000<"]
    ids = re.findall(r' id="([^"]+)"', pages[0])
    assert all(len(list(group)) == 1 for key, group in groupby(sorted(ids)) if not key.startswith(("m", "p")))
