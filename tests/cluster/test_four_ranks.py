"""Every stage on four ranks, more than this machine may have cores, against the same on two."""

from __future__ import annotations

import json

import pytest
import torch
from reference import relative_error
from safetensors.torch import load_file
from small_stages import SmallStages

from esi_ds import Mask
from esi_ds.artifacts import read_jsonl

FILE = "model-00001-of-00001.safetensors"


def test_esi(stages: SmallStages) -> None:
    four, two = (stages.undisturbed("esi", ranks) for ranks in (4, 2))
    assert json.loads((four / "manifest.json").read_text())["world_size"] == 4
    scores = [load_file(run / "scores" / FILE) for run in (four, two)]
    assert scores[0].keys() == scores[1].keys()
    # fp32 sums of the same gradients in another order, as in test_resume.py.
    assert relative_error(*scores) <= 1e-5
    said = [[row["response"] for row in read_jsonl(run / "responses.jsonl")] for run in (four, two)]
    assert said[0] == said[1]


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_tuning_freezes_the_same_bits(stages: SmallStages, stage: str) -> None:
    base, mask = load_file(stages.inputs["model"] / "model.safetensors"), Mask.load(stages.inputs["mask"])
    for ranks in (2, 4):
        tuned = load_file(stages.undisturbed(stage, ranks) / "model" / FILE)
        assert tuned.keys() == base.keys()
        changed = 0
        for name, values in tuned.items():
            selected = mask.tensor(name) if name in mask.names else None
            moved = values.view(torch.int32) != base[name].view(torch.int32)
            if stage == "set":  # unscored parameters are frozen
                may_move = selected if selected is not None else torch.zeros_like(moved)
            else:
                may_move = ~selected if selected is not None else torch.zeros_like(moved)
            assert not (moved & ~may_move).any(), name
            changed += int(moved.sum())
        assert changed > 0


@pytest.mark.parametrize("stage", ["eval", "perturb"])
def test_answers_and_verdicts(stages: SmallStages, stage: str) -> None:
    """Greedy in fp32: the same answers; a guard's score may differ in its last digits, read in other batches."""
    four, two = (stages.undisturbed(stage, ranks) for ranks in (4, 2))
    assert (four / "answers.jsonl").read_text() == (two / "answers.jsonl").read_text()
    rows = [read_jsonl(run / "verdicts.jsonl") for run in (four, two)]
    assert len(rows[0]) > 0
    for got, expected in zip(*rows, strict=True):
        score = expected.pop("score")
        assert got.pop("score") == (None if score is None else pytest.approx(score, rel=1e-5))
        assert got == expected
