"""Formulas of docs/scaling.md against measurements: what a rank holds, holds for a moment, and receives.

    python benchmarks/scaling.py [--ranks 1 2 4]

starts itself on ZeRO-3 ranks, with and without expert parallelism, and prints one table. Measured are the storages of
tensors that are alive between two micro-batches, the highest sum of what the allocator gave out and took back within
one (CPU), and the sizes of the collectives that torch was asked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from esi import resident_bytes  # noqa: E402

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS, RATIO, BUCKET = 3, 64, 2, 256, 256, 16, 0.02, 1_000_000
RULE = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
CASES = ("ESI", "SET compact", "SET scatter", "SPA")


def make_model(folder: Path) -> None:
    """A Qwen3-MoE of 39 M weights in bf16, nearly all of them in routed experts."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

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


def settings(autoep_size: int | None) -> dict:
    """Nothing is kept for reuse or fetched ahead: the transient alone is seen."""
    found = {
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
        found["expert_parallel"] = {"enabled": True, "autoep_size": autoep_size}
    return found


class Received:
    """Bytes that this rank receives in ring collectives, by what they are for; laid over torch.distributed before
    DeepSpeed takes its functions."""

    def __init__(self):
        import torch.distributed as distributed

        self.bytes = dict.fromkeys(("gathers", "gradients", "tokens"), 0.0)
        self._ranks = distributed.get_world_size
        for name, what, index in (
            ("all_gather_into_tensor", "gathers", 0),
            ("reduce_scatter_tensor", "gradients", 1),
            ("all_to_all_single", "tokens", 0),
            ("all_reduce", "gradients", 0),
        ):
            setattr(distributed, name, self._counted(getattr(distributed, name), name, what, index))

    def _counted(self, function, name: str, what: str, index: int):
        def call(*arguments, **keywords):
            tensors = [*arguments, *keywords.values()]
            # Counts and losses of a few numbers are no traffic that a formula should know.
            if tensors[index].is_floating_point() and tensors[index].numel() > 64:
                ranks = self._ranks(keywords.get("group"))
                times = 2 if name == "all_reduce" else 1
                self.bytes[what] += times * tensors[index].nbytes * (ranks - 1) / ranks
            return function(*arguments, **keywords)

        return call

    @contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        before, found = dict(self.bytes), {}
        yield found
        found.update({what: self.bytes[what] - before[what] for what in before})


def peak_bytes(function) -> int:
    """The highest sum of bytes given out less bytes taken back while ``function`` runs, on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def batch():
    """Ids and labels of one row, another one on every rank."""
    import torch

    from esi_ds.zero import runtime

    ids = torch.randint(5, 500, (1, TOKENS), generator=torch.Generator().manual_seed(runtime.rank()))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def open_case(case: str, folder: Path, mask, given: dict):
    """(model, trained, context to run in, micro-batch, optimizer step) of one stage."""
    from contextlib import nullcontext

    from esi_ds.core.trained import Trained
    from esi_ds.models.folder import ModelSource
    from esi_ds.zero import runtime
    from esi_ds.zero.dense import DenseTuner
    from esi_ds.zero.engine import load_sharded
    from esi_ds.zero.gradients import GradientShards
    from esi_ds.zero.optimizer import MaskedAdamW
    from esi_ds.zero.sparse import SparseTuner
    from esi_ds.zero.tuner import Rule, summed_loss

    inputs, labels = batch()
    made = []

    def make_optimizer(module):
        made.append(MaskedAdamW(module, mask, "complement", lr=1e-4, **RULE))
        return made[0]

    model = load_sharded(ModelSource(str(folder / "model")), "bf16", given, make_optimizer if case == "SPA" else None)
    trained = Trained(
        mask, "complement" if case == "SPA" else "selected", "freeze", {p.name: p.shape for p in model.parameters}
    )
    if case == "ESI":
        gradients = GradientShards(model, runtime.device())

        def micro_batch() -> None:
            logits = model.module(**inputs, use_cache=False).logits
            summed_loss(logits, labels).backward()
            gradients.flush()
            model.release()

        return model, trained, gradients, gradients.collecting(), micro_batch, lambda: None
    tuner = DenseTuner(model, trained, made[0]) if case == "SPA" else SparseTuner(
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


def measure(case: str, folder: Path, mask, autoep_size: int | None, received: Received) -> dict[str, float]:
    """The most of any rank."""
    import torch

    from esi_ds.zero import runtime

    before = resident_bytes()
    model, trained, keep, context, micro_batch, step = open_case(case, folder, mask, settings(autoep_size))
    model.enable_gradient_checkpointing()
    with context:
        for _ in range(2):  # the first one traces the model, the second gathers as every later one does
            micro_batch()
            step()
        model.release()
        found = {"resident": float(resident_bytes() - before)}
        found["transient"] = float(peak_bytes(micro_batch))
        step()
        with received.counting() as bytes_:
            micro_batch()
            step()
    found |= bytes_
    del keep
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    return {"predicted": predict(case, model, trained, autoep_size), "measured": dict(
        zip(found, runtime.all_reduce_max(values).tolist(), strict=True)
    )}  # fmt: skip


def predict(case: str, model, trained, autoep_size: int | None) -> dict[str, float]:
    from esi_ds.core import footprint as formulas
    from esi_ds.zero import runtime

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


def worker(folder: Path, sizes: list[int | None]) -> None:
    import torch.distributed  # noqa: F401

    received = Received()
    from esi_ds import Mask
    from esi_ds.zero import gradients, runtime

    gradients.BUCKET_NUMEL = 1 << 16  # else this small model's gradients would wait for one another, 8 MiB together
    runtime.start()
    mask = Mask.load(folder / "mask")
    rows = []
    for size in sizes:
        for case in CASES:
            rows.append({"ranks": runtime.world_size(), "autoep_size": size, "stage": case})
            rows[-1] |= measure(case, folder, mask, size, received)
            gc.collect()
    if runtime.is_main():
        print("RESULT " + json.dumps(rows), flush=True)
    runtime.barrier()
    os._exit(0)


def table(rows: list[dict]) -> str:
    """Predicted and measured side by side, in MB (10^6 bytes)."""
    kinds = ("resident", "transient", "gathers", "gradients", "tokens")
    lines = ["| ranks | autoep_size | stage | " + " | ".join(kinds) + " |", "|" + "---|" * (3 + len(kinds))]
    for row in rows:
        cells = [
            "–"
            if not row["predicted"][kind] and not row["measured"][kind]
            else f"{row['predicted'][kind] / 1e6:.3f} / {row['measured'][kind] / 1e6:.3f}"
            for kind in kinds
        ]
        lines.append(f"| {row['ranks']} | {row['autoep_size'] or '–'} | {row['stage']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.sizes)
        return
    from builders import build_mask

    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        build_mask(Path(name) / "mask", Path(name) / "model", ratio=RATIO)
        for ranks in arguments.ranks:
            sizes = [None, *(size for size in (2, 4) if ranks % size == 0)]
            launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={ranks}"]
            command = [*launcher, __file__, "--worker", name, "--sizes", json.dumps(sizes)]
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if "RESULT " not in done.stdout:
                sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
            rows += json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])
    print(table(rows))


if __name__ == "__main__":
    main()
