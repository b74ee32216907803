"""A model under ZeRO-3 is the one that transformers loads: ties, parameters, buffers and their dtypes, logits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from builders import build_model, byte_bpe_tokenizer, claim_tied, shard_bounds
from conftest import ROOT, run_ranks
from loading_worker import IDS
from quantised_models import build_gpt_oss, write_dequantised, write_fp8, write_mxfp4
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from esi_ds.core.stored import MODEL_DTYPES

sys.path.append(str(ROOT / "tests/sweep"))
import tiny  # noqa: E402

logging.set_verbosity_error()
RANKS, NUM_EXPERTS = 2, 5
HEADS = ("own", "same", "only", "rounded")
# A buffer that asks for bf16 in its constructor, buffers of the checkpoint that ask for fp32 there, and positions.
BUFFERS = (("recurrent_gemma", "fp32"), ("recurrent_gemma", "bf16"), ("lfm2_moe", "bf16"), ("zaya", "bf16"))
KEPT = ("ernie4_5_moe", "zamba")  # keep routers, and decay rates, in fp32
# FP8 experts that are stored one by one, FP8 blocks that end with the matrix and scales in another file, and MXFP4.
QUANTISED = ("fp8", "fp8_edges", "mxfp4")
# Stored under other names than the model's own, and under its own though there are renamings for it.
MULTIMODAL = ("gemma3", "gemma4")
EXPORTED = tuple(f"{kind}_exported" for kind in MULTIMODAL)
CASES = [
    *((head, dtype) for head in HEADS for dtype in ("fp32", "bf16")),
    *BUFFERS,
    *((kind, dtype) for kind in KEPT for dtype in ("fp32", "bf16")),
    ("judge", "bf16"),
    ("deeper", "fp32"),
    ("shapes", "fp32"),
    ("no_head", "fp32"),
    ("marian", "fp32"),
    ("unreadable", "fp32"),
    ("qwen3_moe", "fp32"),  # five experts a layer, stored one by one
    *((kind, dtype) for kind in QUANTISED for dtype in ("fp32", "bf16")),
    *((kind, "fp32") for kind in (*MULTIMODAL, *EXPORTED)),
    ("nan", "bf16"),
    ("last", "bf16"),
    ("last", "fp32"),  # the process group has survived the refusals
]
REFUSED = {
    "shapes-fp32": r"shapes do not match its configuration \(lm_head.weight has shape \[342, 24\], the model's is",
    "no_head-fp32": "holds no weights for lm_head.weight",
    "marian-fp32": r"is of type marian, which transformers cannot initialise under ZeRO-3 \(not enough values",
    "unreadable-fp32": r"cannot be loaded in parts, as ZeRO-3 does \(\[Errno 5\] Input/output error",  # by rank 1 only
    "nan-bf16": r"gate_up_proj_scales holds a scale that is not a number \(expert 4\)",  # read by rank 1 only
    "ernie4_5_moe-bf16": r"keeps model.layers.1.mlp.gate.weight in float32 \(2 such weights\)",
    "zamba-bf16": "in float32 .* load it in fp32",
}


def prepare(folder: Path) -> None:
    tokenizer = byte_bpe_tokenizer()
    for head in HEADS:
        claim_tied(build_model("llama", folder / head, tokenizer), head)
    build_model("qwen3_moe", folder / "qwen3_moe", tokenizer)
    for kind in ("shapes", "no_head", "deeper", "unreadable", "last"):
        file = build_model("llama", folder / kind, tokenizer) / "model.safetensors"
        tensors = load_file(file)
        if kind == "shapes":
            tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].clone()
        elif kind == "no_head":
            del tensors["lm_head.weight"]
        elif kind == "deeper":  # than its configuration says
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    write_fp8(folder / "qwen3_moe", folder / "fp8", (4, 8))
    write_fp8(build_model("llama", folder / "unquantised", tokenizer), folder / "fp8_edges", (16, 16), split=True)
    write_mxfp4(build_gpt_oss(folder / "gpt_oss", tokenizer), folder / "mxfp4")
    for kind in QUANTISED:
        for dtype in ("fp32", "bf16"):
            write_dequantised(folder / kind, folder / f"{kind}-{dtype}-plain", MODEL_DTYPES[dtype])
    tensors = load_file(shutil.copytree(folder / "mxfp4", folder / "nan") / "model.safetensors")
    tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][4, -1, -1] = 255
    save_file(tensors, folder / "nan/model.safetensors", metadata={"format": "pt"})
    for kind in {*(kind for kind, _ in BUFFERS), *KEPT, *MULTIMODAL, "marian"}:
        tiny.build(kind, folder / kind, tokenizer)
    # A classifier from a checkpoint with a head, whose config says that it is tied.
    AutoModelForSequenceClassification.from_pretrained(folder / "own", num_labels=3).save_pretrained(folder / "judge")
    tensors = load_file(folder / "judge/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "judge/model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "judge/config.json").read_text())
    (folder / "judge/config.json").write_text(json.dumps(config | {"pad_token_id": 0}))


def class_of(kind: str) -> str:
    return "AutoModelForSequenceClassification" if kind == "judge" else "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    prepare(folder)
    cases = [
        {"name": f"{kind}-{dtype}", "model": str(folder / kind), "dtype": dtype, "class": class_of(kind)}
        for kind, dtype in CASES
    ]
    for case in cases:
        if Path(case["model"]).name in (*MULTIMODAL, *EXPORTED):
            case["export"] = f"{case['model']}_exported"
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    done = run_ranks(RANKS, str(ROOT / "tests/dist/loading_worker.py"), str(listing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (folder / "errors.txt").write_text(done.stderr)
    return folder


@pytest.mark.parametrize(("kind", "dtype"), [case for case in CASES if "-".join(case) not in REFUSED])
def test_equal_to_plain_loading(folder: Path, kind: str, dtype: str) -> None:
    plain = folder / (f"{kind}-{dtype}-plain" if kind in QUANTISED else kind)
    model = getattr(transformers, class_of(kind)).from_pretrained(plain, dtype=MODEL_DTYPES[dtype]).eval()
    with torch.no_grad():
        logits = model(IDS).logits
    expected = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    expected |= {f"parameter.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    ranks = [load_file(folder / f"{kind}-{dtype}-{rank}.safetensors") for rank in range(RANKS)]
    for tensors in ranks:
        # The sums of a matrix product may be taken in another order in another process: some roundings of the dtype.
        tolerance = (1e-6 if dtype == "fp32" else 2**-6) * float(logits.abs().max())
        assert torch.allclose(tensors.pop("logits").float(), logits.float(), rtol=0, atol=tolerance)
        assert set(tensors) == set(expected)
        for name, tensor in expected.items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(("kind", "dtype"), [case for case in CASES if "-".join(case) not in REFUSED])
def test_a_closed_model_leaves_nothing(folder: Path, kind: str, dtype: str) -> None:
    """Of a process that loads one model after the other."""
    for rank in range(RANKS):
        before, loaded, after = json.loads((folder / f"{kind}-{dtype}-{rank}.json").read_text())
        assert loaded > before >= after


@pytest.mark.parametrize("kind", [*MULTIMODAL, *EXPORTED])
def test_an_export_has_the_names_of_what_was_loaded(folder: Path, kind: str) -> None:
    """Not those that undoing renamings which have not happened would give; the export of an export neither."""
    (loaded,), (exported,) = (
        map(load_file, (folder / name).glob("*.safetensors")) for name in (kind, f"{kind}_exported")
    )
    assert set(exported) == set(loaded)
    assert all(torch.equal(exported[name], tensor) for name, tensor in loaded.items())


def counted(file: Path, what: str) -> int:
    with safe_open(file, "pt") as opened:
        return int(opened.metadata()[what])


@pytest.mark.parametrize(("kind", "dtype"), [("last", "fp32"), ("last", "bf16"), ("qwen3_moe", "fp32")])
def test_a_rank_reads_its_own_part_and_no_other_byte(folder: Path, kind: str, dtype: str) -> None:
    """Of an expert, which is stored as three matrices, every rank that holds a part of it in the stack reads all."""
    stored = load_file(folder / kind / "model.safetensors")
    for rank in range(RANKS):
        expected = 0
        for name, tensor in stored.items():
            low, high = shard_bounds(tensor.numel(), rank, RANKS)
            if match := re.search(r"experts\.(\d+)\.", name):
                first, last = shard_bounds(NUM_EXPERTS * tensor.numel(), rank, RANKS)
                is_read = first < (int(match[1]) + 1) * tensor.numel() and int(match[1]) * tensor.numel() < last
                low, high = (0, tensor.numel()) if is_read else (0, 0)
            expected += (high - low) * tensor.element_size()
        file = folder / f"{kind}-{dtype}-{rank}.safetensors"
        assert counted(file, "num_bytes") == expected
        assert counted(file, "num_broadcasts") == 0
    assert expected < 0.65 * sum(tensor.nbytes for tensor in stored.values())


def test_a_rank_reads_its_own_codes_and_the_scales(folder: Path) -> None:
    """Of MXFP4, every rank that holds a part of an expert's matrix reads all of it."""
    stored = {
        name: tensor
        for file in (folder / "fp8_edges").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    experts = load_file(folder / "mxfp4/model.safetensors")
    for rank in range(RANKS):
        expected = 0
        for name, tensor in stored.items():
            low, high = (
                (0, tensor.numel()) if name.endswith("_scale_inv") else shard_bounds(tensor.numel(), rank, RANKS)
            )
            expected += (high - low) * tensor.element_size()
        assert counted(folder / f"fp8_edges-bf16-{rank}.safetensors", "num_bytes") == expected
        expected = 0
        for name, tensor in experts.items():
            low, high = shard_bounds(tensor.numel(), rank, RANKS)
            if name.endswith(("_blocks", "_scales")):
                size = tensor[0].numel()
                low, high = low // size * size, -(-high // size) * size
            expected += (high - low) * tensor.element_size()
        assert counted(folder / f"mxfp4-bf16-{rank}.safetensors", "num_bytes") == expected
    assert expected < 0.75 * sum(tensor.nbytes for tensor in experts.values())


def test_weights_that_are_not_loaded_are_named_once(folder: Path) -> None:
    """A layer more than the configuration has; a classifier's stored head."""
    lines = [line for line in (folder / "errors.txt").read_text().splitlines() if "has no place for" in line]
    assert len(lines) == 2
    assert "judge: holds 1 weight that" in lines[0] and "the first: lm_head.weight" in lines[0]
    assert "deeper: holds 1 weight that" in lines[1] and "the first: model.layers.2.mlp.up_proj.weight" in lines[1]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(folder: Path, name: str) -> None:
    messages = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(RANKS)]
    assert len(set(messages)) == 1 and messages[0].startswith(f"model.path = {folder}")
    assert re.search(REFUSED[name], messages[0]), messages[0]
