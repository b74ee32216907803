"""Cost of SET and SPA, as ratios within one run: resident bytes, the optimizer step, the whole step, bytes reduced.

    python -m benchmarks.tune [--ranks 2]

starts itself on ZeRO-3 ranks and prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from builders import build_mask
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import print_result, resident_bytes, run
from benchmarks.measure import machine, median_seconds, seconds
from esi_ds import Mask
from esi_ds.core.adamw import masked_adamw
from esi_ds.core.trained import Trained
from esi_ds.models.folder import ModelSource
from esi_ds.zero import runtime
from esi_ds.zero.dense import DenseTuner
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.optimizer import MaskedAdamW
from esi_ds.zero.sparse import SparseTuner
from esi_ds.zero.tuner import Rule, Tuner, summed_loss

BATCH, LENGTH, STEPS, RATIO = 4, 128, 7, 0.01
ZERO3 = {
    "train_micro_batch_size_per_gpu": BATCH,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 5_000_000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "overlap_comm": False,
    },
}
STANDARD = {
    **ZERO3,
    "gradient_clipping": 1.0,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
OptimizerMaker = Callable[[torch.nn.Module], torch.optim.Optimizer]
RULE = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def make_model(folder: Path) -> None:
    """A Llama of 134 M weights in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels, [BATCH, LENGTH] each, of one micro-batch that differs from rank to rank."""
    ids = torch.randint(5, 4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(runtime.rank()))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], 1)
    return {key: value.to(runtime.device()) for key, value in inputs.items()}, labels.to(runtime.device())


def loaded(
    folder: Path, mask: Mask, train: str, settings: dict[str, Any], make_optimizer: OptimizerMaker | None = None
) -> tuple[ShardedModel, Trained]:
    """The sharded model, and which of its weights are trained."""
    model = load_sharded(ModelSource(str(folder / "model")), "bf16", settings, make_optimizer)
    return model, Trained(mask, train, "freeze", {p.name: p.shape for p in model.parameters})


def run_tuner(tuner: Tuner) -> tuple[float, float]:
    """Median seconds of a whole step, and of its update alone. The optimizer state exists afterwards."""
    inputs, labels = batch()
    updates = []

    def step() -> None:
        loss = summed_loss(tuner.forward(inputs, LENGTH), labels) / labels.numel()
        tuner.backward(loss)
        updates.append(seconds(lambda: tuner.step(1e-4)))

    with tuner.running():
        whole = median_seconds(step, STEPS)
    return whole, sorted(updates[1:])[STEPS // 2]


def figures(model: ShardedModel, tuner: Tuner, before: int, num_reduced: int) -> dict[str, float]:
    """Resident bytes above ``before`` per weight, times the ranks; seconds; bytes reduced per step."""
    whole, update = run_tuner(tuner)
    model.release()
    total = sum(parameter.numel for parameter in model.parameters)
    return {
        "bytes_per_weight_x_ranks": (resident_bytes() - before) * runtime.world_size() / total,
        "whole_seconds": whole,
        "update_seconds": update,
        "reduced_bytes": 4 * num_reduced,
        "weights": total,
    }


def set_figures(folder: Path, mask: Mask) -> dict[str, float]:
    """SET at 1 %."""
    before = resident_bytes()
    model, trained = loaded(folder, mask, "selected", ZERO3)
    tuner = SparseTuner(model, trained, Rule(**RULE, clip=1.0), "compact")
    return figures(model, tuner, before, trained.total)


def standard_figures(folder: Path, mask: Mask, masked: bool) -> dict[str, float]:
    """The standard engine on the same parameters: with the masked AdamW (SPA) or torch's own."""
    optimizers: list[MaskedAdamW] = []

    def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = MaskedAdamW(module, mask, "complement", lr=1e-4, **RULE)  # freezes embeddings and norms in both
        optimizers.append(optimizer)
        trains = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return optimizer if masked else torch.optim.AdamW(trains, lr=1e-4, foreach=False, **RULE)

    before = resident_bytes()
    model, trained = loaded(folder, mask, "complement", STANDARD, make_optimizer)
    tuner = DenseTuner(model, optimizers[0]) if masked else plain_tuner(model, trained)
    return figures(model, tuner, before, sum(p.numel for p in model.parameters if trained.count(p.name)))


def plain_tuner(model: ShardedModel, trained: Trained) -> DenseTuner:
    """The engine with torch's AdamW: no mask, and no check of what changes."""

    class PlainTuner(DenseTuner):
        def __init__(self) -> None:
            self.model, self.trained = model, trained

        def step(self, lr: float) -> float:
            self.model.engine.step()
            return float(self.model.engine.get_global_grad_norm())

    return PlainTuner()


def dense_update_seconds(weights: int) -> float:
    """Seconds of torch.optim.AdamW on fp32 masters of a rank's share of all weights, and of copying them to bf16.

    SET's update, with its reduction and write-back, is compared with this.
    """
    values = torch.zeros(-(-weights // runtime.world_size()), device=runtime.device(), requires_grad=True)
    model = torch.zeros_like(values, dtype=torch.bfloat16, requires_grad=False)
    values.grad = torch.ones_like(values)
    optimizer = torch.optim.AdamW([values], lr=1e-4, foreach=False)

    def update() -> None:
        optimizer.step()
        model.copy_(values.detach())

    return median_seconds(update, STEPS)


def masked_over_dense(weights: int) -> float:
    """Seconds of SPA's update with a random half of a rank's weights frozen, over those of the same rule on all."""
    size, device = -(-weights // runtime.world_size()), runtime.device()
    values, gradient = torch.zeros(size, device=device), torch.ones(size, device=device)
    bits = torch.randint(256, (-(-size // 8),), dtype=torch.uint8, device=device)

    def update_seconds(trained: torch.Tensor | None) -> float:
        moments, rule = [torch.zeros_like(values) for _ in range(2)], {"step": 1, "lr": 1e-4, **RULE}
        return median_seconds(lambda: masked_adamw(values, gradient, *moments, trained, **rule), STEPS)

    return update_seconds(bits) / update_seconds(None)


def worker(folder: Path) -> None:
    runtime.start()
    mask = Mask.load(folder / "mask")
    sparse = set_figures(folder, mask)
    gc.collect()
    dense_seconds = dense_update_seconds(sparse["weights"])
    masked_share = masked_over_dense(sparse["weights"])
    plain = standard_figures(folder, mask, masked=False)
    gc.collect()
    masked = standard_figures(folder, mask, masked=True)
    ranks = runtime.world_size()
    if runtime.is_main():
        results = {
            "ranks": ranks,
            **machine(),
            "weights": sparse["weights"],
            "SET resident bytes per weight x ranks": sparse["bytes_per_weight_x_ranks"],
            "goal of that": 2.2 + 0.08 * ranks,
            "dense AdamW update / SET update": dense_seconds / sparse["update_seconds"],
            "the engine's AdamW update / SET update": plain["update_seconds"] / sparse["update_seconds"],
            "SET bytes reduced per step / dense": sparse["reduced_bytes"] / plain["reduced_bytes"],
            "SPA resident bytes per weight x ranks": masked["bytes_per_weight_x_ranks"],
            "SPA resident bytes over AdamW": masked["bytes_per_weight_x_ranks"] - plain["bytes_per_weight_x_ranks"],
            "SPA update, half frozen / the same on all weights": masked_share,
            "SPA whole step / AdamW whole step": masked["whole_seconds"] / plain["whole_seconds"],
            "seconds": {"SET": sparse, "AdamW": plain, "SPA": masked, "dense update": dense_seconds},
        }
        print_result(results)
    runtime.stop()


def prepare(folder: Path) -> None:
    make_model(folder / "model")
    build_mask(folder / "mask", folder / "model", ratio=RATIO)


if __name__ == "__main__":
    run("benchmarks.tune", __doc__, worker, prepare)
