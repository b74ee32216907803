"""Cost of an ESI pass, as ratios within one run: time per token, resident bytes per weight, selection of 10^8 scores.

    python -m benchmarks.esi [--ranks 2]

starts itself on ZeRO-3 ranks and prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where.
"""

from __future__ import annotations

import gc
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import print_result, resident_bytes, run
from benchmarks.measure import machine, median_seconds
from benchmarks.scoring import make_examples, make_scoring
from esi_ds.core.select import Order, ScoreRun, select
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.models.folder import ModelSource
from esi_ds.stages.esi.score import ScoringPass
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel, load_replicated, load_sharded
from esi_ds.zero.gradients import GradientShards

BATCH, PROMPT, RESPONSE, STEPS = 4, 64, 64, 6
NUM_SCORES = 10**8


def make_models(folder: Path, dtype: torch.dtype) -> None:
    """A Llama of 36 M weights, and a guard a tenth of its size with the same vocabulary."""
    common = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    for name, sizes in (("model", (512, 1536, 10)), ("guard", (192, 512, 4))):
        hidden, intermediate, layers = sizes
        config = LlamaConfig(**common, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder / name)


def make_pass(folder: Path, dtype: str, autoep_size: int | None) -> tuple[ScoringPass, ShardedModel, GradientShards]:
    """A pass over random ids, its model, and its accumulator. autoep_size: ranks that share a mixture's experts."""
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    if autoep_size is not None:
        settings["expert_parallel"] = {"enabled": True, "autoep_size": autoep_size}
    guard = load_replicated(ModelSource(str(folder / "guard"), field="judge.path"), dtype)
    model = load_sharded(ModelSource(str(folder / "model")), dtype, settings)
    examples = make_examples(BATCH * runtime.world_size(), PROMPT, RESPONSE, 4096)
    scoring = make_scoring(folder, dtype, model, guard, examples, BATCH)
    return scoring, model, scoring.gradients


def time_esi(folder: Path, dtype: str, autoep_size: int | None = None) -> tuple[dict[str, float], list[list[int]]]:
    """Seconds of one ESI micro-batch on all ranks, of its judge alone, and what is held; and the rows it read."""
    scoring, model, gradients = make_pass(folder, dtype, autoep_size)

    def esi() -> None:
        scoring.state.position = 0
        scoring._step()

    def judge_only() -> None:
        scoring.objective.guard.judge([example.guard_input for example in scoring._my_examples()], runtime.device())

    with gradients.collecting():
        esi_seconds = median_seconds(esi, STEPS)
    scoring.state.position = 0
    judge_seconds = median_seconds(judge_only, STEPS)
    rows = [example.prompt_ids + example.response.ids[:-1] for example in scoring._my_examples()]
    weights = sum(parameter.numel for parameter in model.parameters)
    return {"weights": weights, "esi_s": esi_seconds, "of_which_judge_s": judge_seconds}, rows


def count_resident(folder: Path, autoep_size: int | None = None) -> dict[str, float]:
    """Bytes alive between micro-batches of a bf16 model, summed over ranks, per weight; the judge's are not counted."""
    before = resident_bytes()
    scoring, model, gradients = make_pass(folder, "bf16", autoep_size)
    with gradients.collecting():
        scoring._step()
    judge = sum(p.untyped_storage().nbytes() for p in scoring.objective.guard.model.parameters())
    held = runtime.all_reduce_sum(torch.tensor([float(resident_bytes() - before - judge)], dtype=torch.float64))
    weights = sum(parameter.numel for parameter in model.parameters)
    return {"dtype": "bf16", "bytes_per_weight_times_ranks": float(held) / weights}


def time_bare(folder: Path, dtype: str, rows: list[list[int]]) -> float:
    """Seconds of the stock ZeRO-3 engine's forward, backward and gradient reduction (fp32) of the same tokens."""
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1 << 22},
    }
    whole = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=MODEL_DTYPES[dtype])
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=whole, config=settings, optimizer=optimizer)
    ids = torch.tensor(rows, device=runtime.device())

    def bare() -> None:
        logits = engine(ids, use_cache=False, logits_to_keep=RESPONSE).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -RESPONSE:].flatten())
        engine.backward(loss)
        engine.optimizer.zero_grad()

    return median_seconds(bare, STEPS)


def time_pass(folder: Path, dtype: str) -> dict[str, float]:
    """The ESI pass over the bare one: same tokens, same ranks, same process."""
    measured, rows = time_esi(folder, dtype)
    gc.collect()
    bare = time_bare(folder, dtype, rows)
    esi, judge = measured["esi_s"], measured["of_which_judge_s"]
    return {
        **measured,
        "bare_s": bare,
        "esi_over_bare": esi / bare,
        "esi_without_judge_over_bare": (esi - judge) / bare,
    }


def time_selection(k: int) -> dict[str, float]:
    """Exact selection of 10^8 sharded scores against gathering them on rank 0 for torch.topk."""
    size, rank = NUM_SCORES // runtime.world_size(), runtime.rank()
    scores = torch.rand(size, generator=torch.Generator().manual_seed(rank)).square_().to(runtime.device())
    piece, traffic, outcome = ScoreRun(scores, rank * size), [], {}

    def reduce(counts: torch.Tensor) -> torch.Tensor:
        traffic.append(counts.numel() * counts.element_size())
        return runtime.all_reduce_sum(counts)

    def ours() -> None:
        traffic.clear()
        (outcome["cut"],) = select([[piece]], [k], Order("top"), NUM_SCORES - 1, reduce)
        outcome["bits"] = outcome["cut"].selects(scores.view(torch.int32), piece.position)

    def gather_and_topk() -> None:
        parts = [torch.empty_like(scores) for _ in range(runtime.world_size())] if rank == 0 else None
        if runtime.world_size() > 1:
            torch.distributed.gather(scores, parts)
        if rank == 0:
            outcome["top"] = torch.cat(parts).topk(k, sorted=False).values.min() if parts else scores.topk(k)

    ours_seconds = median_seconds(ours, 3)
    naive_seconds = median_seconds(gather_and_topk, 3)
    return {
        "scores": NUM_SCORES,
        "k": k,
        "select_s": ours_seconds,
        "gather_topk_s": naive_seconds,
        "select_over_gather_topk": ours_seconds / naive_seconds,
        "largest_pass_bytes": max(traffic),
        "passes": len(traffic),
    }


def worker(folder: Path) -> None:
    runtime.start()
    dtype = "bf16" if runtime.device().type == "cuda" else "fp32"
    if runtime.is_main():
        make_models(folder, torch.bfloat16 if dtype == "bf16" else torch.float32)
    runtime.barrier()
    results = {"ranks": runtime.world_size(), "dtype": dtype, **machine()}
    results["resident"] = count_resident(folder)
    gc.collect()
    results["pass"] = time_pass(folder, dtype)
    results["selection"] = time_selection(NUM_SCORES // 100)
    if runtime.is_main():
        print_result(results)
    runtime.stop()


if __name__ == "__main__":
    run("benchmarks.esi", __doc__, worker, prepare=lambda folder: None)
