"""How fast one GPU scores and answers. docs/gpus.md has the formulas, benchmarks/RESULTS.md the goals."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.gpu_models import checkpoint, random_model, settings, shape, sharded_model
from benchmarks.measure import Stopwatch, allocated_bytes, median_seconds, peak_bytes, seconds
from benchmarks.scoring import make_examples, make_judge, make_scoring
from esi_ds.core.batch import left_pad
from esi_ds.models.decoding import greedy_ids
from esi_ds.models.roles import describe
from esi_ds.stages.esi.prepare import Example
from esi_ds.zero import memory, runtime
from esi_ds.zero.engine import ShardedModel, full_shapes, recompute_activations
from esi_ds.zero.generate import ready_to_generate

Part = dict[str, Any]
# Dense bf16 FLOP/s, from NVIDIA's data sheets; the first name that the device's name contains.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
MFU_GOAL, BARE_GOAL, STEPS = 0.40, 1.15, 5
MARGIN = 0.8  # share of the free memory that activations are planned for


def peak_flops() -> float | None:
    """FLOP/s that this rank's device can do in bf16; None where that is not known."""
    if runtime.device().type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def model_flops(config: PretrainedConfig, length: int, num_logits: int, scored_head: bool) -> float:
    """Useful FLOPs of a forward and backward pass of one row through a dense model whose matrices have gradients.

    6 a weight of a layer and token (2 forward, 2 for the input's gradient, 2 for the weight's), 6 or 4 a weight of the
    head and position with logits (4: without a gradient of its own), and for causal attention 2 · L² · heads · head_dim
    a layer forward and twice that backward. Embedding look-ups, norms and softmax count nothing, nor does what
    checkpointing computes twice.
    """
    return row_flops(config, length, 6, num_logits * (6 if scored_head else 4))


def judge_flops(config: PretrainedConfig, length: int) -> float:
    """The same of a frozen judge that is read at one position: 4 a weight, for its weights have no gradients."""
    return row_flops(config, length, 4, 4)


def row_flops(config: PretrainedConfig, length: int, per_weight: int, per_head_weight: int) -> float:
    heads = config.num_attention_heads * config.head_dim
    projections = 2 * config.hidden_size * (heads + config.num_key_value_heads * config.head_dim)
    layer = projections + 3 * config.hidden_size * config.intermediate_size
    attention = 6 * length**2 * heads
    total = config.num_hidden_layers * (per_weight * layer * length + attention)
    return float(total + per_head_weight * config.hidden_size * config.vocab_size)


class Bare:
    """Forward and backward of the plain model, without ZeRO, loss or judge: what scoring cannot be faster than.

    The same tokens, logits and gradients of the logits' shape; the scored matrices get gradients, in the model's dtype.
    """

    def __init__(self, module: PreTrainedModel, examples: list[Example]):
        self.module, self.examples = module, examples
        scored = {parameter.name for parameter in describe(module, full_shapes(module)) if parameter.scored}
        for name, tensor in module.named_parameters():
            tensor.requires_grad_(name in scored)
        self.scored_head = module.get_output_embeddings().weight.requires_grad
        self.scored_numel = sum(tensor.numel() for tensor in module.parameters() if tensor.requires_grad)

    def run(self, rows: int) -> None:
        fed = [example.prompt_ids + example.response.ids[:-1] for example in self.examples[:rows]]
        ids = torch.tensor(fed, device=runtime.device())
        count = len(self.examples[0].response.ids)
        logits: Tensor = self.module(ids, use_cache=False, logits_to_keep=count).logits
        logits.backward(torch.full_like(logits, 1e-4))
        self.module.zero_grad(set_to_none=True)


def throughput(tiny: bool) -> Iterator[Part]:
    """ESI at 8 B with a guard of 1 B: tokens a second, share of the peak, memory, and where the time goes."""
    prompt, response, dtype = (12, 8, "bf16") if tiny else (256, 256, "bf16")
    config = shape("Llama-3.1-8B", tiny)
    module, guard = random_model(config, dtype), random_model(shape("Llama-3.2-1B", tiny), dtype, seed=1)
    guard.requires_grad_(False)
    examples = make_examples(32, prompt, response, config.vocab_size)
    bare = Bare(module, examples)
    plans = []
    for checkpointing, most in ((False, 2), (True, 2)) if tiny else ((False, 8), (True, 32)):
        checkpoint(module, checkpointing)
        rows = planned_rows(bare, guard, most)
        plans.append((checkpointing, rows, median_seconds(lambda rows=rows: bare.run(rows), STEPS)))
        yield {"part": f"bare, {rows} rows, checkpointing {checkpointing}", "seconds": plans[-1][2]}
    checkpoint(module, False)
    model = ShardedModel(module, settings(dtype))
    for checkpointing, rows, bare_seconds in plans:
        if checkpointing:
            recompute_activations(model.module)
        figures = score_rows(model, guard, examples, rows)
        part = {"part": f"ESI, checkpointing {checkpointing}", "rows": rows, "bare_seconds": bare_seconds, **figures}
        yield part | goals(part, config, guard.config, prompt + response, response, bare.scored_head)
    model.close()


def planned_rows(bare: Bare, guard: PreTrainedModel, most: int) -> int:
    """Rows of a micro-batch, a power of two up to ``most``, that fit beside the sums of gradients of scoring.

    From the growth of the peak from one row to two, of the plain model and of the judge.
    """
    growth = []
    for run in (bare.run, lambda rows: judge_rows(guard, bare.examples[:rows])):
        run(1)
        growth.append(peak_bytes(lambda run=run: run(2)) - peak_bytes(lambda run=run: run(1)))
        gc.collect()
    torch.cuda.empty_cache()
    free = memory.free_memory_bytes() - 4 * bare.scored_numel
    fit = int(MARGIN * free / max(growth))
    rows = 1
    while 2 * rows <= min(fit, most):
        rows *= 2
    return rows


def judge_rows(guard: PreTrainedModel, examples: list[Example]) -> None:
    make_judge(guard).judge([example.judged for example in examples], runtime.device())


def score_rows(model: ShardedModel, guard: PreTrainedModel, examples: list[Example], rows: int) -> Part:
    """Seconds of a micro-batch of the scoring pass, what they are spent on, and bytes held and at the peak."""
    watch = Stopwatch()
    with TemporaryDirectory() as folder:
        scoring = make_scoring(Path(folder), "bf16", model, guard, examples[:rows], rows)
        objective, gradients = scoring.objective, scoring.gradients
        watch.watch(objective, "admit", "judge")
        watch.watch(objective, "forward", "forward and vocabulary")
        watch.watch(objective, "_surrogate", "vocabulary")
        watch.watch(scoring, "_forward_backward", "passes")
        watch.watch(gradients, "_collect", "hook")
        watch.watch(gradients, "flush", "hook")

        def step() -> None:
            scoring.state.position = 0
            scoring._step()

        with gradients.collecting():
            step_seconds = median_seconds(step, STEPS)
            watch.take()
            seconds(step)
            split = watch.take()
            resident, peak = allocated_bytes(), allocated_bytes() + peak_bytes(step)
    forward_judge = split["judge"] + split["forward and vocabulary"]
    return {
        "seconds": step_seconds,
        "split_seconds": {
            "judge": split["judge"],
            "forward": split["forward and vocabulary"] - split["vocabulary"],
            "vocabulary product": split["vocabulary"],
            "backward": split["passes"] - forward_judge - split["hook"],
            "hook": split["hook"],
        },
        "resident_bytes": resident,
        "peak_bytes": peak,
    }


def goals(
    part: Part, config: PretrainedConfig, judge: PretrainedConfig, length: int, response: int, scored_head: bool
) -> Part:
    """Tokens a second, shares of the peak, and ratios to the bare passes. length: of a row, prompt and response."""
    rows, own = part["rows"], model_flops(config, length - 1, response, scored_head)
    flops, peak = rows * (own + judge_flops(judge, length)), peak_flops()
    without_judge = part["seconds"] - part["split_seconds"]["judge"]
    ratio, mfu = part["seconds"] / part["bare_seconds"], flops / part["seconds"] / peak if peak else None
    return {
        "tokens_per_second": rows * (length - 1) / part["seconds"],
        "flops": flops,
        "mfu": mfu,
        "mfu_without_the_judge": rows * own / part["seconds"] / peak if peak else None,
        "bare_mfu": rows * own / part["bare_seconds"] / peak if peak else None,
        "esi_over_bare": ratio,
        "esi_without_judge_over_bare": without_judge / part["bare_seconds"],
        "goals_met": {
            f"mfu >= {MFU_GOAL}": mfu >= MFU_GOAL if mfu is not None else None,
            f"ESI <= {BARE_GOAL} x bare": ratio <= BARE_GOAL,
        },
    }


def decode(tiny: bool) -> Iterator[Part]:
    """Milliseconds a token of greedy answers at 8 B, at batches of 8 and 64, without reading the prompts."""
    length, tokens, batches = (8, 4, (2, 3)) if tiny else (128, 64, (8, 64))
    config = shape("Llama-3.1-8B", tiny)
    model = sharded_model(config, "bf16")
    with ready_to_generate(model, "gathered"):
        for batch_size in batches:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randint(5, config.vocab_size, (batch_size, length), generator=generator).tolist()
            batch = left_pad(rows, 0, runtime.device())

            def answer(new: int, batch: dict[str, Tensor] = batch) -> None:
                greedy_ids(model.module, batch, end_ids=(), pad_id=0, max_new_tokens=new)

            answer(2)
            first, all_tokens = seconds(lambda answer=answer: answer(1)), seconds(lambda answer=answer: answer(tokens))
            step = (all_tokens - first) / (tokens - 1)
            peak = allocated_bytes() + peak_bytes(lambda answer=answer: answer(2))
            yield {
                "part": f"batch {batch_size}",
                "milliseconds_per_token": 1000 * step,
                "tokens_per_second": batch_size / step,
                "prompts_seconds": first,
                "peak_bytes": peak,
            }
    model.close()
