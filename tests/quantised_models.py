"""Tiny checkpoints in the formats of DeepSeek-V3 (FP8 with block scales) and of gpt-oss (MXFP4), and a slow oracle."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from builders import model_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

FP8_MAX = 448.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def fp8_of(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., R, C] and scales; the last blocks of a matrix may be smaller."""
    *leading, rows, columns = weight.shape
    scales = torch.empty(*leading, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            values = weight[(..., *part)].float()
            scales[..., i, j] = values.abs().amax((-2, -1)).clamp(min=1e-12) / FP8_MAX
            codes[(..., *part)] = (values / scales[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return codes, scales


def plain_of_fp8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The float32 weight, one element at a time."""
    if codes.ndim > 2:
        return torch.stack([plain_of_fp8(*pair, block) for pair in zip(codes, scales, strict=True)])
    values, factors = codes.float().numpy(), scales.float().numpy()
    rows, columns = codes.shape
    return torch.tensor(
        [[values[i, j] * factors[i // block[0], j // block[1]] for j in range(columns)] for i in range(rows)]
    )


def mxfp4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [E, R, G, 16] and exponents [E, R, G] of a weight [E, 32 G, R]."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2).clamp(-127, 127)
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def plain_of_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The float32 weight [E, 32 G, R], one element at a time."""
    codes, powers = blocks.tolist(), exponents.tolist()
    experts, rows, groups, _ = blocks.shape

    def value(e: int, r: int, c: int) -> float:
        byte = codes[e][r][c // 32][c % 32 // 2]
        return FP4_VALUES[byte >> 4 if c % 2 else byte & 15] * 2.0 ** (powers[e][r][c // 32] - 127)

    return torch.tensor([[[value(e, r, c) for r in range(rows)] for c in range(32 * groups)] for e in range(experts)])


def build_gpt_oss(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random gpt-oss whose experts' axes are whole groups of 32."""
    torch.manual_seed(0)
    config = model_config("gpt_oss", len(tokenizer) + 3)
    config.intermediate_size = 32
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_fp8(plain: Path, folder: Path, block: tuple[int, int] = (8, 8), split: bool = False) -> Path:
    """A model whose projections are FP8. split: its scales lie in another file than its codes."""
    return _write(plain, folder, {"quant_method": "fp8", "weight_block_size": list(block)}, split)


def write_mxfp4(plain: Path, folder: Path) -> Path:
    """A gpt-oss whose experts are MXFP4."""
    return _write(plain, folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, False)


def _write(plain: Path, folder: Path, section: dict, split: bool) -> Path:
    shutil.copytree(plain, folder)
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if section["quant_method"] == "fp8" and name.endswith("_proj.weight"):
            tensors[name], scales[f"{name}_scale_inv"] = fp8_of(tensor, tuple(section["weight_block_size"]))
        elif section["quant_method"] == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], scales[f"{name}_scales"] = mxfp4_of(tensor)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    assert scales
    if not split:
        save_file(tensors | scales, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
        for file, content in files.items():
            save_file(content, folder / file, metadata={"format": "pt"})
        weight_map = {name: file for file, content in files.items() for name in content}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section, "dtype": "bfloat16"}))
    return folder


def write_dequantised(quantised: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The model of a quantised one by the oracle, what was quantised in ``dtype`` and the rest as it is."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(quantised, folder, ignore=ignored)
    config = json.loads((quantised / "config.json").read_text())
    section = config.pop("quantization_config")
    stored: dict[str, torch.Tensor] = {}
    for file in quantised.glob("*.safetensors"):
        stored |= load_file(file)
    tensors = {}
    for name, tensor in stored.items():
        if f"{name}_scale_inv" in stored:
            block = tuple(section["weight_block_size"])
            tensors[name] = plain_of_fp8(tensor, stored[f"{name}_scale_inv"], block).to(dtype)
        elif name.endswith("_blocks"):
            plain = plain_of_mxfp4(tensor, stored[name.replace("_blocks", "_scales")])
            tensors[name.removesuffix("_blocks")] = plain.to(dtype)
        elif not name.endswith(("_scale_inv", "_scales")):
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
