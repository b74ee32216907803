"""Cost of SET and SPA, as ratios within one run: resident bytes, the optimizer step, the whole step, bytes reduced.

    python benchmarks/tune.py [--ranks 2]

starts itself on ZeRO-3 ranks and prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from esi import median_seconds, resident_bytes  # noqa: E402

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
RULE = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def make_model(folder: Path) -> None:
    """A Llama of 134 M weights in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

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


def batch():
    """Ids and labels of one micro-batch, other ones on every rank."""
    import torch

    from esi_ds.zero import runtime

    ids = torch.randint(5, 4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(runtime.rank()))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], 1)
    return {key: value.to(runtime.device()) for key, value in inputs.items()}, labels.to(runtime.device())


def loaded(folder: Path, mask, train: str, settings: dict, make_optimizer=None):
    """The sharded model and what trains of it."""
    from esi_ds.core.trained import Trained
    from esi_ds.models.folder import ModelSource
    from esi_ds.zero.engine import load_sharded

    model = load_sharded(ModelSource(str(folder / "model")), "bf16", settings, make_optimizer)
    return model, Trained(mask, train, "freeze", {p.name: p.shape for p in model.parameters})


def run_tuner(tuner) -> tuple[float, float]:
    """Median seconds of a whole step, and of its update alone. State exists afterwards."""
    import time

    from esi_ds.zero import runtime
    from esi_ds.zero.tuner import summed_loss

    inputs, labels = batch()
    updates = []

    def step() -> None:
        loss = summed_loss(tuner.forward(inputs, LENGTH), labels) / labels.numel()
        tuner.backward(loss)
        runtime.barrier()
        started = time.perf_counter()
        tuner.step(1e-4)
        runtime.barrier()
        updates.append(time.perf_counter() - started)

    with tuner.running():
        whole = median_seconds(step, STEPS)
    return whole, sorted(updates[1:])[STEPS // 2]


def figures(model, tuner, before: int, num_reduced: int) -> dict[str, float]:
    """Resident bytes a weight × ranks above ``before``, seconds, bytes reduced a step."""
    from esi_ds.zero import runtime

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


def set_figures(folder: Path, mask) -> dict[str, float]:
    """SET at 1 %."""
    from esi_ds.zero.sparse import SparseTuner
    from esi_ds.zero.tuner import Rule

    before = resident_bytes()
    model, trained = loaded(folder, mask, "selected", ZERO3)
    tuner = SparseTuner(model, trained, Rule(**RULE, clip=1.0), "compact")
    return figures(model, tuner, before, trained.total)


def standard_figures(folder: Path, mask, masked: bool) -> dict[str, float]:
    """The standard engine on the same parameters: with the masked AdamW (SPA) or torch's own."""
    import torch

    from esi_ds.zero.dense import DenseTuner
    from esi_ds.zero.optimizer import MaskedAdamW

    made = []

    def make_optimizer(module):
        optimizer = MaskedAdamW(module, mask, "complement", lr=1e-4, **RULE)  # freezes embeddings and norms in both
        made.append(optimizer)
        trains = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return optimizer if masked else torch.optim.AdamW(trains, lr=1e-4, foreach=False, **RULE)

    before = resident_bytes()
    model, trained = loaded(folder, mask, "complement", STANDARD, make_optimizer)
    tuner = DenseTuner(model, trained, made[0]) if masked else plain_tuner(model, trained)
    return figures(model, tuner, before, sum(p.numel for p in model.parameters if trained.count(p.name)))


def plain_tuner(model, trained):
    """The engine with torch's AdamW: no mask, nothing watched."""
    from esi_ds.zero.dense import DenseTuner

    class PlainTuner(DenseTuner):
        def __init__(self):
            self.model, self.trained = model, trained

        def step(self, lr: float) -> float:
            self.model.engine.step()
            return float(self.model.engine.get_global_grad_norm())

    return PlainTuner()


def dense_update_seconds(weights: int) -> float:
    """torch.optim.AdamW on fp32 masters of a rank's share of all weights, and their way into the bf16 weights: what
    SET's update, its reduction and write-back included, is held against."""
    import torch

    from esi_ds.zero import runtime

    values = torch.zeros(-(-weights // runtime.world_size()), requires_grad=True)
    model = torch.zeros(len(values), dtype=torch.bfloat16)
    values.grad = torch.ones_like(values)
    optimizer = torch.optim.AdamW([values], lr=1e-4, foreach=False)

    def update() -> None:
        optimizer.step()
        model.copy_(values.detach())

    return median_seconds(update, STEPS)


def masked_over_dense(weights: int) -> float:
    """SPA's update with every second weight of a rank frozen, in no order, over the same rule on all of them."""
    import torch

    from esi_ds.core.adamw import masked_adamw
    from esi_ds.zero import runtime

    size = -(-weights // runtime.world_size())
    values, gradient, bits = torch.zeros(size), torch.ones(size), torch.randint(256, (-(-size // 8),)).to(torch.uint8)

    def seconds(trained: torch.Tensor | None) -> float:
        moments, rule = [torch.zeros(size) for _ in range(2)], {"step": 1, "lr": 1e-4, **RULE}
        return median_seconds(lambda: masked_adamw(values, gradient, *moments, trained, **rule), STEPS)

    return seconds(bits) / seconds(None)


def worker(folder: Path) -> None:
    import gc

    from esi_ds import Mask
    from esi_ds.zero import runtime

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
        found = {
            "ranks": ranks,
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
        print(json.dumps(found, indent=1))
    runtime.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        worker(arguments.folder)
        return
    from builders import build_mask

    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        build_mask(Path(name) / "mask", Path(name) / "model", ratio=RATIO)
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(arguments.ranks)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        subprocess.run([*launcher, __file__, "--folder", name], env=environment, check=True)


if __name__ == "__main__":
    main()
