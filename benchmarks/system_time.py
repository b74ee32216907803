"""System time of a step of SET, SPA and ESI on CPUs: DeepSpeed's prefetch bucket against this project's smaller one.

    python -m benchmarks.system_time [--ranks 2]

A Llama in SmolLM2-135M's shape, random weights, fp32, few tokens: what ZeRO-3 does around the computation shows most.
Starts itself on ZeRO-3 ranks, anew for every row, and prints one JSON object. benchmarks/RESULTS.md holds what it
printed, and where.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from builders import build_mask
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import BIN, print_result, result_of
from benchmarks.measure import machine, seconds
from benchmarks.tune import RULE, STANDARD
from esi_ds import Mask
from esi_ds.core.trained import Trained
from esi_ds.deepspeed_config import REDUCE_BUCKET
from esi_ds.models.folder import ModelSource
from esi_ds.models.rows import last_logits
from esi_ds.zero import runtime
from esi_ds.zero.dense import DenseTuner
from esi_ds.zero.engine import load_sharded
from esi_ds.zero.gradients import GradientShards
from esi_ds.zero.optimizer import MaskedAdamW
from esi_ds.zero.settings import PREFETCH
from esi_ds.zero.sparse import SparseTuner
from esi_ds.zero.tuner import Rule, Tuner, summed_loss

BATCH, LENGTH, WARM_UP, STEPS, RATIO = 4, 8, 2, 3, 0.01
DEEPSPEED_PREFETCH = 50_000_000
STAGES = ("SET", "SPA", "ESI")
Step = Callable[[], object]


def make_model(folder: Path) -> None:
    """A Llama in SmolLM2-135M's shape, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels, [BATCH, LENGTH] each, of one micro-batch that differs from rank to rank."""
    ids = torch.randint(5, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(runtime.rank()))
    labels = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], 1).to(runtime.device())
    ids = ids.to(runtime.device())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def settings(stage: str, prefetch: int | None) -> dict[str, Any]:
    """The DeepSpeed config as ``resolve_deepspeed`` makes it of ds_configs/zero3.json. prefetch: None names none."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    if prefetch is not None:
        zero[PREFETCH] = prefetch
    if stage != "SPA":
        return {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": zero}
    return {**STANDARD, "bf16": {"enabled": False}, "zero_optimization": {**zero, "reduce_bucket_size": REDUCE_BUCKET}}


def make_tuner(stage: str, folder: Path, mask: Mask, prefetch: int | None) -> Tuner:
    """SET's or SPA's."""
    optimizers: list[MaskedAdamW] = []

    def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
        optimizers.append(MaskedAdamW(module, mask, "complement", lr=1e-4, **RULE))
        return optimizers[0]

    source = ModelSource(str(folder / "model"))
    model = load_sharded(source, "fp32", settings(stage, prefetch), make_optimizer if stage == "SPA" else None)
    train = "complement" if stage == "SPA" else "selected"
    trained = Trained(mask, train, "freeze", {p.name: p.shape for p in model.parameters})
    if stage == "SPA":
        return DenseTuner(model, optimizers[0])
    return SparseTuner(model, trained, Rule(**RULE, clip=1.0), "compact")


def tune(stage: str, folder: Path, mask: Mask, prefetch: int | None) -> dict[str, float]:
    """Figures of SET's or SPA's steps."""
    tuner = make_tuner(stage, folder, mask, prefetch)
    inputs, labels = batch()

    def step() -> float:
        tuner.backward(summed_loss(tuner.forward(inputs, LENGTH), labels) / labels.numel())
        return tuner.step(1e-4)

    with tuner.running():
        return {**measure(step), "gradient norm of the next step": step()}


def accumulate(folder: Path, prefetch: int | None) -> dict[str, float]:
    """Figures of ESI's steps without its judge: forward, backward, reduction into the sums."""
    model = load_sharded(ModelSource(str(folder / "model")), "fp32", settings("ESI", prefetch))
    gradients = GradientShards(model, runtime.device())
    inputs, labels = batch()

    def step() -> float:
        (summed_loss(last_logits(model.module, inputs, LENGTH), labels) / labels.numel()).backward()
        gradients.flush()
        model.release()
        return gradients.take_norm_squared()

    with gradients.collecting():
        return {**measure(step), "squared gradient norm of the next step": step()}


def measure(step: Step) -> dict[str, float]:
    """Per step: means over ``STEPS`` after some that warm up, and over the ranks. peak: of the larger rank so far.

    Collectives: those of the steps, and two all-reduces.
    """
    for _ in range(WARM_UP):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    elapsed = seconds(lambda: [step() for _ in range(STEPS)])
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    local = torch.tensor([user, system, after.ru_minflt - before.ru_minflt], dtype=torch.float64)
    user, system, faults = (runtime.all_reduce_sum(local) / runtime.world_size() / STEPS).tolist()
    peak = torch.tensor(after.ru_maxrss / 2**20, dtype=torch.float64)
    return {
        "user s": user,
        "system s": system,
        "system share of CPU time": system / (user + system),
        "page faults": faults,
        "wall s": elapsed / STEPS,
        "peak resident GiB": float(runtime.all_reduce_max(peak)),
    }


def worker(folder: Path, stage: str, prefetch: int | None) -> None:
    runtime.start()
    if stage == "ESI":
        figures = accumulate(folder, prefetch)
    else:
        figures = tune(stage, folder, Mask.load(folder / "mask"), prefetch)
    if runtime.is_main():
        print_result({**figures, **machine()})
    runtime.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--prefetch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.stage, options.prefetch)
        return
    launcher = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={options.ranks}", "-m"]
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        build_mask(folder / "mask", folder / "model", ratio=RATIO)
        for stage in STAGES:
            command = [*launcher, "benchmarks.system_time", "--worker", name, "--stage", stage]
            results[f"{stage}, this project's prefetch"] = result_of(command)
            results[f"{stage}, DeepSpeed's prefetch"] = result_of([*command, "--prefetch", str(DEEPSPEED_PREFETCH)])
    print(json.dumps({"ranks": options.ranks, **results}, indent=1))


if __name__ == "__main__":
    main()
