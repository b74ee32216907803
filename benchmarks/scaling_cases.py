"""The cases of benchmarks.scaling: each is set up, measured and predicted on its rank."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from builders import build_mask
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.common import print_result, resident_bytes
from benchmarks.measure import peak_bytes
from benchmarks.received import Received
from esi_ds import Mask
from esi_ds.core import footprint as formulas
from esi_ds.core.trained import Trained
from esi_ds.models.folder import ModelSource
from esi_ds.zero import gradients, runtime
from esi_ds.zero.dense import DenseTuner
from esi_ds.zero.engine import ShardedModel, load_sharded, recompute_activations
from esi_ds.zero.gradients import GradientShards
from esi_ds.zero.optimizer import MaskedAdamW
from esi_ds.zero.sparse import SparseTuner
from esi_ds.zero.tuner import Rule, summed_loss

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS, RATIO, BUCKET = 3, 64, 2, 256, 256, 16, 0.02, 1_000_000
RULE = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
CASES = ("ESI", "SET compact", "SET scatter", "SPA")


def make_model(folder: Path) -> None:
    """A Qwen3-MoE of 39 M weights in bf16, nearly all of them in routed experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def prepare(folder: Path) -> None:
    """The model and a random mask, below ``folder``."""
    make_model(folder / "model")
    build_mask(folder / "mask", folder / "model", ratio=RATIO)


def settings(autoep_size: int | None) -> dict[str, Any]:
    """A DeepSpeed config that keeps nothing for reuse and fetches nothing ahead: only the transient remains visible."""
    raw = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "overlap_comm": False,
        },
    }
    if autoep_size is not None:
        raw["expert_parallel"] = {"enabled": True, "autoep_size": autoep_size}
    return raw


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels, [1, TOKENS] each, of one row that differs from rank to rank."""
    ids = torch.randint(5, 500, (1, TOKENS), generator=torch.Generator().manual_seed(runtime.rank()))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: value.to(runtime.device()) for key, value in inputs.items()}, labels.to(runtime.device())


def open_case(
    case: str, folder: Path, mask: Mask, deepspeed_settings: dict[str, Any]
) -> tuple[ShardedModel, Trained, object, AbstractContextManager[Any], Callable[[], None], Callable[[], Any]]:
    """(model, trained, what must stay alive, context to run in, micro-batch, optimizer step) of one stage."""
    inputs, labels = batch()
    optimizers: list[MaskedAdamW] = []

    def make_optimizer(module: torch.nn.Module) -> MaskedAdamW:
        optimizers.append(MaskedAdamW(module, mask, "complement", lr=1e-4, **RULE))
        return optimizers[0]

    model = load_sharded(
        ModelSource(str(folder / "model")), "bf16", deepspeed_settings, make_optimizer if case == "SPA" else None
    )
    trained = Trained(
        mask, "complement" if case == "SPA" else "selected", "freeze", {p.name: p.shape for p in model.parameters}
    )
    if case == "ESI":
        shards = GradientShards(model, runtime.device())

        def micro_batch() -> None:
            logits = model.module(**inputs, use_cache=False).logits
            summed_loss(logits, labels).backward()
            shards.flush()
            model.release()

        return model, trained, shards, shards.collecting(), micro_batch, lambda: None
    tuner = DenseTuner(model, optimizers[0]) if case == "SPA" else SparseTuner(
        model, trained, Rule(**RULE, clip=1.0), case.removeprefix("SET ")
    )  # fmt: skip

    def micro_batch() -> None:
        tuner.backward(summed_loss(tuner.forward(inputs, TOKENS), labels) / TOKENS)

    return (
        model,
        trained,
        tuner,
        tuner.running() if hasattr(tuner, "running") else nullcontext(),
        micro_batch,
        (lambda: tuner.step(1e-4)),
    )


def measure(
    case: str, folder: Path, mask: Mask, autoep_size: int | None, received: Received
) -> dict[str, dict[str, float]]:
    """Bytes predicted, and bytes measured: of each kind the most that any rank has. Collective: one all-reduce."""
    before = resident_bytes()
    model, trained, keep, context, micro_batch, step = open_case(case, folder, mask, settings(autoep_size))
    recompute_activations(model.module)
    with context:
        for _ in range(2):  # the first one traces the model, the second gathers as every later one does
            micro_batch()
            step()
        model.release()
        measured = {"resident": float(resident_bytes() - before), "transient": float(peak_bytes(micro_batch))}
        step()
        with received.counting() as bytes_:
            micro_batch()
            step()
    measured |= bytes_
    del keep
    most = runtime.all_reduce_max(torch.tensor(list(measured.values()), dtype=torch.float64)).tolist()
    return {
        "predicted": predict(case, model, trained, autoep_size),
        "measured": dict(zip(measured, most, strict=True)),
    }


def predict(case: str, model: ShardedModel, trained: Trained, autoep_size: int | None) -> dict[str, float]:
    """The bytes that the formulas of docs/scaling.md give for this rank."""
    where = formulas.Topology(1, runtime.world_size())
    cut = formulas.gathered_tensors(model.parameters, where.ranks, autoep_size)
    counts = {p.name: trained.count(p.name) for p in model.parameters}
    if case == "ESI":
        counts = {p.name: p.numel for p in model.parameters if p.scored}
    compact = case == "SET compact"
    if case == "ESI":
        resident = formulas.esi_resident(cut, 2)
    elif case == "SPA":
        resident = formulas.spa_resident(cut, 2, counts, BUCKET)
    else:
        resident = formulas.set_resident(cut, 2, counts, compact)
    reduced = (formulas.compact_traffic if compact else formulas.reduce_traffic)(cut, counts, where)
    tokens = 0.0
    if autoep_size is not None:
        tokens = formulas.token_traffic(LAYERS, TOKENS, TOP_K, HIDDEN, 2, autoep_size, where, times=6).rank
    return {
        "resident": resident.total,
        "transient": formulas.transient(cut, 2, counts, case.split()[0].lower(), compact).total,
        "gathers": formulas.gather_traffic(cut, 2, where, times=3).rank,
        "gradients": reduced.rank,
        "tokens": tokens,
    }


def measure_cases(folder: Path, sizes: list[int | None], received: Received) -> None:
    """Print one row per case and number of ranks that share the experts (None: no expert parallelism)."""
    gradients.BUCKET_NUMEL = 1 << 16  # else this small model's gradients would wait for one another, 8 MiB together
    runtime.start()
    mask = Mask.load(folder / "mask")
    rows = []
    for size in sizes:
        for case in CASES:
            about = {"ranks": runtime.world_size(), "autoep_size": size, "stage": case}
            rows.append(about | measure(case, folder, mask, size, received))
            gc.collect()
    if runtime.is_main():
        print_result(rows)
    runtime.barrier()
