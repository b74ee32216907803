"""Noise on ZeRO-3 partitions against one whole model: the same on every world size, and gone without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import build_mask, build_model, byte_bpe_tokenizer
from conftest import run_ranks
from perturb_worker import IDS
from reference import perturb
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from esi_ds import Mask
from esi_ds.core.noise import normal, stream

logging.set_verbosity_error()
KINDS = ("llama", "llama_tied", "qwen3_moe", "mixtral", "needle")
NOISE, SEED = 1.5, 11
PERSIST = {"stage3_param_persistence_threshold": 10**6}
CASES = [
    *((kind, "fp32", {}) for kind in KINDS),
    ("qwen3_moe", "bf16", {}),
    ("llama", "fp32", PERSIST),
    ("llama", "bf16", {"zero_hpz_partition_size": 2}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("perturb")
    for kind in KINDS:
        build_model(kind, folder / kind, byte_bpe_tokenizer(), dtype=torch.bfloat16)
        spoil_zeros(folder / kind)
        build_mask(folder / f"{kind}-mask", folder / kind, ratio=0.3)
    return folder


def spoil_zeros(folder: Path) -> None:
    """Some −0.0 among the weights: restoring by arithmetic would turn them into +0.0."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] = -0.0
    model.save_pretrained(folder)


def launch(folder: Path, ranks: int, wanted: list[tuple], **more) -> dict[tuple, dict[str, torch.Tensor]]:
    cases = []
    for number, (kind, dtype, zero) in enumerate(wanted):
        out = folder / f"w{ranks}-{number}{''.join(more)}.safetensors"
        about = {"model": str(folder / kind), "mask": str(folder / f"{kind}-mask"), "dtype": dtype, "zero": zero}
        cases.append({**about, "noise": NOISE, "seed": SEED, "out": str(out), **more})
    file = folder / f"cases-{ranks}.json"
    file.write_text(json.dumps(cases))
    done = run_ranks(ranks, "tests/dist/perturb_worker.py", str(file))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {(kind, dtype, str(zero)): load_file(c["out"]) for (kind, dtype, zero), c in zip(wanted, cases, strict=True)}


def expected(folder: Path, kind: str, dtype: str) -> AutoModelForCausalLM:
    """The whole model with its noise, in one process."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / kind, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16
    )
    mask, offset, chosen, drawn = Mask.load(folder / f"{kind}-mask"), 0, {}, {}
    for name, parameter in model.named_parameters():
        if name in mask.shapes:
            positions = torch.arange(offset, offset + parameter.numel())
            chosen[name] = mask.tensor(name)
            drawn[name] = normal(stream(SEED, 0x9E27), positions).reshape(parameter.shape)
        offset += parameter.numel()
    perturb(model, chosen, drawn, NOISE)
    return model


@pytest.fixture(scope="module", params=[1, 2, 3])
def tensors_of_cases(request, folder: Path) -> dict[tuple, dict[str, torch.Tensor]]:
    # hpZ needs a world size that its group size divides.
    return launch(folder, request.param, [case for case in CASES if "hpz" not in str(case) or request.param == 2])


def test_disturbed_as_one_process_does_it_and_restored_to_the_bit(folder: Path, tensors_of_cases: dict) -> None:
    for (kind, dtype, _), tensors in tensors_of_cases.items():
        model = expected(folder, kind, dtype)
        plain = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=model.dtype)
        for (name, wanted), original in zip(model.named_parameters(), plain.parameters(), strict=True):
            inside, after = tensors[f"inside/{name}"], tensors[f"after/{name}"]
            bits = torch.int16 if dtype == "bf16" else torch.int32
            assert torch.equal(after.view(bits), original.detach().view(bits)), name
            # σ is merged over ranks: its last bit in float32 may differ, and with it that of the sum; in bf16 the
            # rounding hides it but for the rare tie.
            torch.testing.assert_close(inside, wanted.detach(), rtol=1e-6 if dtype == "fp32" else 8e-3, atol=1e-7)
            assert (inside != original).any() == bool(wanted.ne(original).any())
        with torch.no_grad():
            logits = model(torch.tensor(IDS)).logits.float()
        close = {"rtol": 1e-3, "atol": 1e-3} if dtype == "fp32" else {"rtol": 0.1, "atol": 0.5}
        torch.testing.assert_close(tensors["inside"], logits, **close)
        assert torch.equal(tensors["before"], tensors["after"])
        assert (tensors["inside"] - tensors["before"]).abs().max() > 0.3  # the noise is seen


def test_second_copies_would_hide_the_noise(folder: Path) -> None:
    """What publishing is for: without it hpZ answers from its second copies, as if nothing had been done."""
    ((_, tensors),) = launch(folder, 2, [("llama", "fp32", {"zero_hpz_partition_size": 2})], drop="publish").items()
    assert torch.equal(tensors["inside"], tensors["before"])
