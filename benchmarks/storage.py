"""Speed of storage: loading, export, scores and checkpoints, beside a plain copy of as many bytes in the same run.

    python -m benchmarks.storage [--ranks 2]

starts itself on ZeRO-3 ranks and prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where. The
copy is that of one process, file by file, with an fsync of every file, as ours have. What is read has just been written
and lies in the host's page cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import ROOT
from benchmarks.common import print_result, run
from benchmarks.measure import machine, seconds
from esi_ds.models.folder import ModelSource
from esi_ds.zero import checkpoint, runtime
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.export import export_model
from esi_ds.zero.files import write_scores
from esi_ds.zero.weights import PartsReader

REPEATS = 3
TOKENIZER = ROOT / "examples/models/llama-aligned"
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def prepare(folder: Path) -> None:
    """A Llama of 443 M weights in bf16 (0.89 GB), in files of at most 300 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="300MB")


def copy(files: Iterable[Path], folder: Path) -> None:
    """A plain copy of files, on disk in the end. Rank 0 does it."""
    if runtime.is_main():
        folder.mkdir()
        for file in files:
            shutil.copyfile(file, folder / file.name)
            with (folder / file.name).open("rb") as opened:
                os.fsync(opened.fileno())


def load(folder: Path) -> tuple[ShardedModel, float, float]:
    """The sharded model; the seconds of loading it, and those that went into reading its weights."""
    models: list[ShardedModel] = []
    reading: list[float] = []
    fill = PartsReader.fill

    def timed_fill(parts: PartsReader) -> set[str]:
        names: list[set[str]] = []
        reading.append(seconds(lambda: names.append(fill(parts))))
        return names[0]

    with patch.object(PartsReader, "fill", timed_fill):
        whole = seconds(lambda: models.append(load_sharded(ModelSource(str(folder / "model")), "bf16", ZERO3)))
    return models[0], whole, reading[0]


def write_seconds(folder: Path, write: Callable[[Path], None]) -> float:
    """Seconds of writing into a folder that does not exist before."""
    target = folder / "written"
    if runtime.is_main():
        shutil.rmtree(target, ignore_errors=True)
    return seconds(lambda: write(target))


def ratios(folder: Path) -> dict[str, Any]:
    """Median seconds of every kind over those of a copy of as many bytes, and the GB/s of each."""
    model, *_ = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    files = sorted((folder / "model").glob("*.safetensors"))
    weight_bytes = sum(file.stat().st_size for file in files)
    scored = [parameter for parameter in model.parameters if parameter.scored]
    scores = {shard.name: torch.rand(shard.numel) for shard in model.scored}
    parts = {shard.parameter.name: [(shard.runs[0][0], scores[shard.name])] for shard in model.scored if shard.runs}
    score_bytes = 4 * sum(parameter.numel for parameter in scored)
    measured: dict[str, list[float]] = {}
    for _ in range(REPEATS):  # in turn, so that other work on the machine slows all of them
        other, whole, reading = load(folder)
        other.close()
        now = {
            "copy": write_seconds(folder, lambda target: copy(files, target)),
            "reading the weights": reading,
            "load": whole,
            "export": write_seconds(folder, lambda target: export_model(model, target, tokenizer, "")),
            "scores": write_seconds(folder, lambda target: write_scores(target, scored, model.scored, scores, {})),
            "checkpoint": write_seconds(folder, lambda target: checkpoint.save(target, 1, {}, parts)),
        }
        for name, value in now.items():
            measured.setdefault(name, []).append(value)
    size = {"scores": score_bytes, "checkpoint": score_bytes}
    speed = {n: size.get(n, weight_bytes) / sorted(values)[REPEATS // 2] / 1e9 for n, values in measured.items()}
    return {
        "weight bytes": weight_bytes,
        "score bytes": score_bytes,
        "GB/s": speed,
        "seconds a byte, over those of the copy": {name: speed["copy"] / value for name, value in speed.items()},
        "seconds": measured,
    }


def worker(folder: Path) -> None:
    runtime.start()
    results = {**machine(), "ranks": runtime.world_size(), **ratios(folder)}
    if runtime.is_main():
        print_result(results)
    runtime.stop()


if __name__ == "__main__":
    run("benchmarks.storage", __doc__, worker, prepare)
