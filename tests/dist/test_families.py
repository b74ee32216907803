"""Every family of mixtures on ZeRO-3 partitions: scores, σ and names against the oracle, an expert that no token
chooses, and the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import FAMILIES as OTHERS
from builders import NEVER_ROUTED, PAIRS, build_guard, build_model, byte_bpe_tokenizer, claim_tied
from conftest import ROOT, run_ranks
from reference import esi_scores, num_selected, units
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from esi_ds import Mask

logging.set_verbosity_error()
FAMILIES = (*OTHERS, "mixtral", "qwen3_moe")
# Llamas whose config says that the head is tied: to a stored head of other values, of the same, and where only the head
# is stored. Their guard, sharded, has a head of its own that its config denies.
TIES = ("own", "same", "only")
# As in test_scores.py: fp32 sums in another order. Measured: at most 1.3e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for kind in FAMILIES:
        build_model(kind, folder / kind, byte_bpe_tokenizer(), leave_out=True)
    for head in TIES:
        claim_tied(build_model("llama", folder / head, byte_bpe_tokenizer()), head)
    build_guard(folder / "guard", byte_bpe_tokenizer())
    claim_tied(build_guard(folder / "guard-own", byte_bpe_tokenizer()), "own")
    rows = ({"prompt": prompt, "response": response} for prompt, response in PAIRS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def judge(folder: Path, kind: str) -> dict[str, str]:
    if kind in TIES:
        return {"path": str(folder / "guard-own"), "placement": "sharded"}
    return {"path": str(folder / "guard"), "placement": "replicated"}


@pytest.fixture(scope="module")
def scored(folder: Path) -> tuple[int, Path]:
    """One launch scores and exports every family on two ranks, which cut experts; one rank is that of test_scores."""
    ranks = 2
    cases = [
        {
            "name": kind,
            "export": True,
            "config": {
                "run": {"output_dir": str(folder / f"w{ranks}-{kind}"), "tensorboard": False},
                "model": {"path": str(folder / kind), "dtype": "fp32"},
                "judge": judge(folder, kind),
                "data": {"responses": str(folder / "pairs.jsonl")},
                "esi": {"batch_size": 2},
                "select": {"ratio": 0.03},
            },
        }
        for kind in (*FAMILIES, *TIES)
    ]
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps(cases))
    done = run_ranks(ranks, str(ROOT / "tests/dist/score_worker.py"), str(listing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return ranks, folder


_oracle: dict[str, dict[str, torch.Tensor]] = {}


def oracle(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    if kind not in _oracle:
        _oracle[kind] = esi_scores(folder / kind, Path(judge(folder, kind)["path"]), PAIRS)[0]
    return _oracle[kind]


@pytest.mark.parametrize("kind", (*FAMILIES, *TIES))
def test_scores_sigma_and_names(scored: tuple[int, Path], kind: str) -> None:
    ranks, folder = scored
    run, expected = folder / f"w{ranks}-{kind}", oracle(folder, kind)
    got = load_file(run / "scores/model-00001-of-00001.safetensors")
    assert {name: v.shape for name, v in got.items()} == {name: v.shape for name, v in expected.items()}
    square = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in expected)
    assert (square / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5 <= TOLERANCE

    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    rows = json.loads((run / "report.json").read_text())["units"]
    # The oracle's matrices and ours, each under its parameter, whatever the order in it: the same set of σ.
    for name in expected:
        wanted = sorted(unit.sigma for unit in units(model) if unit.parameter_name == name)
        sigmas = sorted(row["sigma"] for row in rows if row["parameter"] == name)
        assert sigmas == pytest.approx(wanted, rel=1e-9), name  # float64 moments, merged over ranks


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_expert_that_no_token_chooses(scored: tuple[int, Path], kind: str) -> None:
    """Its scores are zero, its matrices keep their names, numbers and σ, and k counts it as ever."""
    ranks, folder = scored
    run = folder / f"w{ranks}-{kind}"
    rows = [row for row in json.loads((run / "report.json").read_text())["units"] if row["expert"] is not None]
    assert {row["expert"] for row in rows} == set(range(5))
    scores = load_file(run / "scores/model-00001-of-00001.safetensors")
    for name in {row["parameter"] for row in rows}:
        used = [bool(scores[name][expert].any()) for expert in range(5)]
        assert not used[NEVER_ROUTED] and sum(used) >= 3, (name, used)
    idle = [row for row in rows if row["expert"] == NEVER_ROUTED]
    assert all(row["sigma"] > 0 and row["max_score"] == 0 and row["selected"] == 0 for row in idle)
    mask = Mask.load(run / "mask")
    assert mask.k == num_selected(AutoModelForCausalLM.from_pretrained(folder / kind), 0.03)
    assert set(mask.names) == set(oracle(folder, kind))


def test_a_head_that_the_checkpoint_unties_is_scored(scored: tuple[int, Path]) -> None:
    ranks, folder = scored
    assert ["lm_head.weight" in Mask.load(folder / f"w{ranks}-{kind}/mask").names for kind in TIES] == [True, 0, 0]


@pytest.mark.parametrize("kind", (*FAMILIES, *TIES))
def test_the_exported_folder_is_the_model(scored: tuple[int, Path], kind: str) -> None:
    ranks, folder = scored
    if kind in FAMILIES:  # every rank has written its part of the file that safetensors would write
        (file,) = (folder / f"w{ranks}-{kind}" / "model").glob("*.safetensors")
        assert file.read_bytes() == (folder / kind / "model.safetensors").read_bytes()
    ids = torch.arange(3, 40).view(1, -1)
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
        for path in (folder / kind, folder / f"w{ranks}-{kind}" / "model")
    ]
    assert torch.equal(*logits)
