"""How fast one GPU's process reads and writes at 1 B, beside a plain copy of the same bytes, and what closing frees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.gpu_models import TOKENIZER, settings, shape, sharded_model
from benchmarks.measure import allocated_bytes, seconds
from esi_ds.models.folder import ModelSource
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.export import export_model
from esi_ds.zero.files import write_scores

Part = dict[str, Any]
LEFT = 1 << 14  # bytes that may stay after a model is closed, besides a hundredth of the model


def storage(tiny: bool) -> Iterator[Part]:
    """GB/s of export, scores and loading, and the memory that is held after each close of a loaded model."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = sharded_model(shape("Llama-3.2-1B", tiny), "bf16")
        yield written(model, folder / "model")
        yield written_scores(model, folder / "scores")
        model.close()
        del model
        yield from loads(folder / "model")


def written(model: ShardedModel, folder: Path) -> Part:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return rate("export", folder, seconds(lambda: export_model(model, folder, tokenizer, "Random weights.\n")))


def written_scores(model: ShardedModel, folder: Path) -> Part:
    scored = [parameter for parameter in model.parameters if parameter.scored]
    scores = {shard.name: torch.rand(shard.numel, device=runtime.device()) for shard in model.scored}
    metadata = {"format": "esi-scores/1"}
    return rate("scores", folder, seconds(lambda: write_scores(folder, scored, model.scored, scores, metadata)))


def loads(folder: Path, times: int = 3) -> Iterator[Part]:
    """Load a model several times, and close each before the next."""
    before, models, left = allocated_bytes(), list[ShardedModel](), []

    def load() -> None:
        models.append(load_sharded(ModelSource(str(folder)), "bf16", settings("bf16")))

    elapsed = []
    for _ in range(times):
        elapsed.append(seconds(load))
        size = allocated_bytes() - before
        models.pop().close()
        left.append(allocated_bytes() - before)
    yield rate("load", folder, sorted(elapsed)[times // 2])
    passed = size > 0 and max(left) <= size // 100 + LEFT
    yield {"part": "close", "passed": passed, "model_bytes": size, "bytes_left_after_each_close": left}


def rate(name: str, folder: Path, elapsed: float) -> Part:
    """GB/s (10^9 bytes) of the weights of ``folder`` in ``elapsed`` seconds, and of copying them, synced to disk."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    copied = seconds(lambda: [copy_synced(file, folder.with_name("copy")) for file in files])
    return {
        "part": name,
        "bytes": size,
        "gb_per_second": size / elapsed / 1e9,
        "copy_gb_per_second": size / copied / 1e9,
        "over_copy": elapsed / copied,
    }


def copy_synced(file: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    shutil.copyfile(file, target)
    with target.open("rb") as opened:
        os.fsync(opened.fileno())
