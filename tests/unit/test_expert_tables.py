"""How a mask lies among experts, against the definitions written out."""

from __future__ import annotations

import io
import json
import random
from itertools import combinations
from pathlib import Path

import matplotlib.image
import pytest

from esi_ds.errors import UserError
from esi_ds.report import experts_picture
from esi_ds.report.experts import expert_tables, gini, hold_half
from esi_ds.report.experts_picture import experts_png


def naive_gini(counts: list[int]) -> float:
    """Half the mean absolute difference over the mean."""
    mean = sum(counts) / len(counts)
    differences = sum(abs(a - b) for a in counts for b in counts) / len(counts) ** 2
    return differences / (2 * mean) if mean else 0.0


def naive_half(counts: list[int]) -> int:
    total = sum(counts)
    sizes = range(len(counts) + 1)
    return next(n for n in sizes if any(2 * sum(chosen) >= total for chosen in combinations(counts, n)))


def test_gini_and_half_are_what_they_are_defined_as() -> None:
    generator = random.Random(0)
    for _ in range(200):
        counts = [generator.choice((0, 0, 1, 5, 40)) for _ in range(generator.randint(1, 7))]
        # Not exact: the sums are formed in another order, in float64.
        assert gini(counts) == pytest.approx(naive_gini(counts), abs=1e-12)
        assert hold_half(counts) == naive_half(counts)
    assert gini([3, 3, 3]) == pytest.approx(0) and gini([0, 0, 8]) == pytest.approx(2 / 3)


def row(role: str, layer: int | None, expert: int | None, numel: int, selected: int, mean: float = 1.0) -> dict:
    return {"role": role, "layer": layer, "expert": expert, "numel": numel, "selected": selected, "mean_score": mean}


def test_tables_count_every_selected_weight_once() -> None:
    units = [
        row("attention.q", 0, None, 100, 10),
        row("shared.up", 0, None, 50, 5),
        *(row(f"expert.{p}", layer, e, 10, 3 * e, 2.0) for p in ("gate", "up") for layer in (0, 1) for e in range(3)),
        row("head", None, None, 80, 1),
    ]
    k = sum(unit["selected"] for unit in units)
    tables = expert_tables(units, k)
    parts = {part["part"]: part for part in tables["parts"]}
    assert {name: part["selected"] for name, part in parts.items()} == {
        "attention": 10,
        "shared experts": 5,
        "routed experts": 36,
        "head and others": 1,
    }
    assert sum(part["share"] for part in tables["parts"]) == pytest.approx(1)
    assert parts["routed experts"]["times_chance"] == pytest.approx((36 / k) / (120 / 350))
    assert [(e["layer"], e["expert"], e["selected"], e["mean_score"]) for e in tables["experts"]][:3] == [
        (0, 0, 0, 2.0),
        (0, 1, 6, 2.0),
        (0, 2, 12, 2.0),
    ]
    assert (tables["num_experts"], tables["hold_half"]) == (6, 2)
    assert [(layer["hold_half"], layer["experts"]) for layer in tables["layers"]] == [(1, 3), (1, 3)]


def test_a_dense_model_has_no_such_tables_and_an_empty_mask_divides_by_nothing() -> None:
    assert expert_tables([row("mlp.up", 0, None, 10, 5)], 5) is None
    tables = expert_tables([row("expert.up", 0, e, 10, 0) for e in range(2)], 0)
    assert (tables["gini"], tables["hold_half"]) == (0.0, 0)


def test_the_picture_of_a_mixture(tmp_path: Path) -> None:
    """Two maps of the mask and one of each set's routing; a dense model's report is refused."""
    units = [row("expert.up", layer, expert, 10, layer + expert) for layer in range(2) for expert in range(3)]
    heights = []
    for sets in (["harmful"], ["harmful", "benign"], ["harmful", "benign", "other"]):
        routing = [{"set": name, "layer": layer, "tokens": [1, 2, 3]} for name in sets for layer in range(2)]
        report = {"units": units, "selection": {"k": 9}, "routing": routing}
        (tmp_path / "report.json").write_text(json.dumps(report))
        heights.append(matplotlib.image.imread(io.BytesIO(experts_png(tmp_path))).shape[0])
    assert heights[0] == heights[1] < heights[2]  # two by two, then a third row
    (tmp_path / "report.json").write_text(json.dumps({"units": [row("mlp.up", 0, None, 10, 1)], "routing": []}))
    with pytest.raises(UserError, match="without experts"):
        experts_png(tmp_path)
    with pytest.raises(UserError, match="holds no report.json"):
        experts_png(tmp_path / "nowhere")


def test_the_picture_shows_every_mask_of_a_run_with_several_criteria(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drew the first criterion's alone."""
    masks = [
        {
            "units": [row("expert.up", layer, e, 10, layer + e + number) for layer in range(2) for e in range(3)],
            "selection": {"k": 9 + 6 * number, "criterion": criterion},
        }
        for number, criterion in enumerate(("esi", "snip", "grad"))
    ]
    routing = [{"set": "harmful", "layer": layer, "tokens": [1, 2, 3]} for layer in range(2)]
    (tmp_path / "report.json").write_text(json.dumps({**masks[0], "further_masks": masks[1:], "routing": routing}))
    drawn = []
    monkeypatch.setattr(experts_picture, "draw_heatmap", lambda axes, data: drawn.append(data))
    assert experts_png(tmp_path).startswith(b"\x89PNG")
    titles = [data.title for data in drawn]
    assert [title.split(": ")[0] for title in titles[:-1]] == ["esi", "esi", "snip", "snip", "grad", "grad"]
    assert titles[-1] == "Where routers send harmful prompts"
    for number, data in enumerate(drawn[:-1:2]):
        shares = [[100 * (layer + e + number) / (9 + 6 * number) for e in range(3)] for layer in range(2)]
        assert [pytest.approx(cells) for cells in data.values] == shares
