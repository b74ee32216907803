"""Reading quantised checkpoints beside plain ones of the same models: time, and memory beside the weights themselves.

    python -m benchmarks.quantised [--ranks 2]

starts itself on ZeRO-3 ranks and prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where. Codes
are random and scales are small: the values do not matter to either measure. What is read lies in the page cache.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PretrainedConfig

from benchmarks.common import print_result, run
from benchmarks.measure import machine, seconds
from benchmarks.storage import ZERO3
from esi_ds.models.folder import ModelSource
from esi_ds.zero import runtime
from esi_ds.zero.engine import load_sharded
from esi_ds.zero.weights import PartsReader

REPEATS = 3
BLOCK = 128
LLAMA = LlamaConfig(vocab_size=8_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12)
GPT_OSS = GptOssConfig(
    vocab_size=8_000,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=32,
)
# folder → its model and its quantization_config
CHECKPOINTS: dict[str, tuple[PretrainedConfig, dict[str, object] | None]] = {
    "llama-bf16": (LLAMA, None),
    "llama-fp8": (LLAMA, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "gpt-oss-bf16": (GPT_OSS, None),
    "gpt-oss-mxfp4": (GPT_OSS, {"quant_method": "mxfp4"}),
}


def prepare(folder: Path) -> None:
    """Every checkpoint in one file."""
    for name, (config, section) in CHECKPOINTS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tensors: dict[str, torch.Tensor] = {}
        for key, weight in model.state_dict().items():
            tensors |= stored(key, weight, str(section["quant_method"]) if section else None)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        described = config.to_dict() | ({"quantization_config": section} if section else {})
        (folder / name / "config.json").write_text(json.dumps(described))


def stored(key: str, weight: torch.Tensor, method: str | None) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a weight."""
    if method == "fp8" and key.endswith("_proj.weight"):
        codes = torch.randint(0, 120, weight.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        shape = [-(-size // BLOCK) for size in weight.shape]
        return {key: codes, f"{key}_scale_inv": torch.full(shape, 1e-4)}
    if method == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")):
        experts, columns, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        return {f"{key}_blocks": blocks, f"{key}_scales": torch.full(blocks.shape[:-1], 120, dtype=torch.uint8)}
    return {key: torch.full(weight.shape, 0.01, dtype=torch.bfloat16)}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(folder: Path) -> tuple[float, float]:
    """Seconds of reading the weights on this rank, and bytes resident at most beside them, over those they take."""
    measured: list[tuple[float, int]] = []
    fill = PartsReader.fill

    def watched_fill(parts: PartsReader) -> set[str]:
        names: list[set[str]] = []
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        taken = seconds(lambda: names.append(fill(parts)))
        measured.append((taken, memory("VmHWM") - before))
        return names[0]

    with patch.object(PartsReader, "fill", watched_fill):
        model = load_sharded(ModelSource(str(folder)), "bf16", ZERO3)
    held = sum(layout.numel for layout in model.shards) * torch.bfloat16.itemsize
    model.close()
    return measured[0][0], measured[0][1] / held


def worker(folder: Path) -> None:
    """Every checkpoint in turn, several times."""
    runtime.start()
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in CHECKPOINTS}
    for _ in range(REPEATS):
        for name in CHECKPOINTS:
            rows[name].append(max(runtime.gather_objects(measure(folder / name))))
    times = {name: statistics.median(taken for taken, _ in measured) for name, measured in rows.items()}
    result = {
        "time of FP8 over bf16": times["llama-fp8"] / times["llama-bf16"],
        "time of MXFP4 over bf16": times["gpt-oss-mxfp4"] / times["gpt-oss-bf16"],
        "seconds": times,
        "most bytes that reading makes resident, over the weights' own": {
            name: max(share for _, share in measured) for name, measured in rows.items()
        },
        **machine(),
    }
    if runtime.is_main():
        print_result(result)
    runtime.stop()


if __name__ == "__main__":
    run("benchmarks.quantised", __doc__ or "", worker, prepare)
