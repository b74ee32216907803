"""What the study's page is computed from: choosing at equal safety, pooling, pairing, overlaps; and the grid itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from builders import build_mask, build_model, byte_bpe_tokenizer
from conftest import ROOT

sys.path.insert(0, str(ROOT / "study"))

import findings  # noqa: E402
import grid  # noqa: E402
import material  # noqa: E402
from collect import row_of  # noqa: E402


def row(criterion: str, lr: float, seed: int, attacks: int, right: int, refused: int = 0) -> dict:
    """Ten harmful and ten benign prompts."""
    return {
        "kind": "set", "model": "m", "ratio": 0.01, "criterion": criterion, "lr": lr, "seed": seed,
        "not_refused": [i < attacks for i in range(10)], "unsafe": [True, None] + [False] * 8,
        "correct": [i < right for i in range(10)], "over_refused": [i < refused for i in range(10)],
        "incoherent": [False] * 20,
    }  # fmt: skip


ROWS = [
    row("esi", 1e-3, 0, 6, 10), row("esi", 1e-2, 0, 1, 8), row("esi", 2e-2, 0, 0, 5, refused=3),
    row("esi", 1e-2, 1, 1, 7), row("esi", 2e-2, 1, 0, 9),
    row("random", 1e-2, 0, 9, 10), row("random", 1e-2, 1, 1, 10),
]  # fmt: skip


def test_the_best_cell_of_each_seed_at_equal_safety() -> None:
    esi = [found for found in ROWS if found["criterion"] == "esi"]
    assert [found["lr"] for found in findings.at_equal_safety(esi, 0.1)] == [1e-2, 2e-2]
    assert [found["lr"] for found in findings.at_equal_over_refusal(esi)] == [1e-2, 2e-2]  # 2e-2 of seed 0 refuses
    summary = findings.summary(findings.at_equal_safety(esi, 0.1), "correct")
    assert (summary["rate"], summary["n"], summary["reached"], summary["seeds"]) == (17 / 20, 20, 2, 2)
    assert (summary["least"], summary["greatest"]) == (0.8, 0.9)


def test_what_is_not_reached_is_said_and_not_filled_in() -> None:
    random = [found for found in ROWS if found["criterion"] == "random"]
    summary = findings.summary(findings.at_equal_safety(random, 0.1), "correct")
    assert (summary["reached"], summary["seeds"], summary["rate"], summary["n"]) == (1, 2, 1.0, 10)
    assert findings.summary([None, None], "correct") == {"seeds": 2, "reached": 0}


def test_methods_are_paired_where_both_get_there() -> None:
    found = findings.against(ROWS, "esi", "random")  # seed 1 alone: 9 right against 10
    assert (found["num_pairs"], found["only_before"], found["only_after"], found["p_value"]) == (10, 1, 0, 1.0)
    assert found["difference"] == -0.1
    assert findings.against(ROWS, "esi", "snip") is None
    order = [method["criterion"] for method in findings.methods(ROWS)]
    assert order == ["esi", "random"]  # reached by more seeds comes first, whatever its rate


def test_a_missing_verdict_is_no_verdict() -> None:
    found = findings.pooled(ROWS[:2], "unsafe")
    assert (found["rate"], found["n"], found["missing"]) == (2 / 18, 18, 2)
    assert [point["lr"] for point in findings.curve(ROWS[:5], ["correct"])] == [1e-3, 1e-2, 2e-2]


def test_overlap_of_masks(tmp_path: Path) -> None:
    build_model("llama", tmp_path / "model", byte_bpe_tokenizer())
    for seed in (0, 1):
        build_mask(tmp_path / f"mask-{seed}", tmp_path / "model", ratio=0.3, seed=seed)
    assert findings.overlap(tmp_path / "mask-0", tmp_path / "mask-0") == 1.0
    assert findings.overlap(tmp_path / "mask-0", tmp_path / "mask-1") == pytest.approx(0.3, abs=0.05)
    assert findings.overlap(tmp_path / "mask-0", tmp_path / "nowhere") is None


def test_the_grid_is_whole_and_every_need_is_met() -> None:
    cells = grid.cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for cell in cells:
        assert all(names.index(need) < names.index(cell.name) for need in cell.after)
    criteria = {cell.facts["criterion"] for cell in cells if cell.kind in ("set", "lora")}
    plain = {
        "esi",
        "esi-gumbel-1",
        "esi-gumbel-16",
        "esi-paper-code",
        "grad",
        "snip",
        "magnitude",
        "tuning-grad",
        "directed",
    }
    assert criteria == plain | {f"{name}-contrastive" for name in plain} | {"random", "bottom", "all", "lora"}
    assert {cell.seed for cell in cells if cell.kind == "set"} == {0, 1, 2}
    assert {cell.facts["ratio"] for cell in cells if cell.kind == "set"} == {0.001, 0.01, 0.05, 1.0}


def test_nothing_that_is_measured_was_seen_before(tmp_path: Path) -> None:
    material.make(tmp_path, (0,))
    heldout = {
        found["prompt"]
        for name in ("harmful", "benign")
        for found in material.read(material.DATA / f"{name}_heldout.jsonl")
    }
    assert not heldout & {found["prompt"] for found in material.read(tmp_path / "prompts-s0.jsonl")}
    for task in (*grid.TASKS, grid.POISONED):
        train = {found["prompt"] for found in material.read(tmp_path / f"{task}-train.jsonl")}
        assert not train & {found["prompt"] for found in material.read(tmp_path / f"{task}-heldout.jsonl")}
        assert not train & heldout


def test_a_cells_flags(tmp_path: Path) -> None:
    expected = material.read(material.DATA / "benign_heldout.jsonl")[0]
    answers = [
        {"set": "harmful", "index": 0, "prompt": "?", "after": "I cannot help."},
        {"set": "harmful", "index": 1, "prompt": "?", "after": "Sure."},
        {"set": "benign", "index": 0, "prompt": expected["prompt"], "after": f"{expected['answer']}."},
    ]
    judged = [
        {"unsafe": False, "incoherent": None},
        {"unsafe": None, "incoherent": "senseless"},
        {"unsafe": None, "incoherent": None},
    ]
    cell = grid.Cell("set", "set/m/x", "m", 0, {"criterion": "esi", "ratio": 0.01, "lr": 1.0})
    assert row_of(cell, tmp_path) is None
    (tmp_path / "set/m/x").mkdir(parents=True)
    (tmp_path / "set/m/x/answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (tmp_path / "set/m/x/judged.json").write_text(json.dumps(judged))
    found = row_of(cell, tmp_path)
    assert (found["not_refused"], found["unsafe"]) == ([False, True], [False, None])
    assert (found["correct"], found["over_refused"], found["incoherent"]) == ([True], [False], [False, True, False])
