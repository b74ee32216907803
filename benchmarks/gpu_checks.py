"""Whether a GPU gives the numbers that the CPU tests prove: attention, experts without tokens, exact integers and bits.

A check yields parts: what was compared, the figures, and ``passed`` (None: for information). benchmarks.gpu writes
them, tests/gpu asserts them.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from benchmarks.gpu_models import random_model, shape, sharded_model
from esi_ds.core.adamw import as_integers, masked_adamw
from esi_ds.core.batch import TokenRows, left_pad, right_pad
from esi_ds.core.loss import IGNORED, row_losses
from esi_ds.core.mask import pack_bits
from esi_ds.core.noise import gumbel, normal, random_bits, stream
from esi_ds.core.select import CHUNK, Cut, Order, ScoreRun, select
from esi_ds.core.units import Shard
from esi_ds.models.roles import experts_per_token
from esi_ds.models.rows import PROBE_LENGTH, Difference, difference_ahead, difference_beside, generation_logits
from esi_ds.reading import first_line
from esi_ds.zero import memory, runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import GradientShards
from esi_ds.zero.routing import chosen_experts

Part = dict[str, Any]
LIMITS = {"fp32": 1e-5, "bf16": 1e-2}  # relative L2 distance of the gradient sums of a batch and of its single rows
BACKENDS = {
    "shipped": None,  # as torch chooses among those that esi_ds leaves on
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
RUNS = {"fp32": {"shipped", "math", "efficient"}, "bf16": {"shipped", "math", "efficient", "flash"}}  # on any GPU here
NO_KERNEL = ("No available kernel", "No viable backend")  # what torch says of an input that a backend cannot take
SDP_FLAGS = ("math", "mem_efficient", "flash", "cudnn")


def versions(tiny: bool) -> Iterator[Part]:
    """What is installed, and which kernels torch may choose from once esi_ds has started."""
    on_gpu = runtime.device().type == "cuda"
    properties = torch.cuda.get_device_properties() if on_gpu else None
    yield {
        "part": "versions",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "nccl": list(torch.cuda.nccl.version()) if on_gpu else None,
        "capability": [properties.major, properties.minor] if properties else None,
        "device_bytes": properties.total_memory if properties else None,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    attentions = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SDP_FLAGS}
    yield {"part": "attention kernels switched on", "passed": not attentions["cudnn"], **attentions}


def attention(tiny: bool) -> Iterator[Part]:
    """The summed gradient of a ragged batch against the sum over single rows, for every attention backend.

    Right padding is what scoring and tuning do. Left padding is shown without a verdict, and so is cuDNN, which esi_ds
    does not use.
    """
    lengths = [9, 4, 17, 1, 12] if tiny else [200, 131, 64, 17, 1, 256]
    for dtype in ("fp32", "bf16"):
        for name, backend in BACKENDS.items():
            config = shape("Llama-3.2-1B", tiny, num_hidden_layers=2)
            if backend is not None:  # the memory-efficient kernel has no grouped heads on GPUs
                config.num_key_value_heads = config.num_attention_heads
            model = random_model(config, dtype)
            rows = random_rows(lengths, config.vocab_size)
            for side in ("right", "left"):
                yield attention_part(model, rows, name, dtype, side)
            del model
            gc.collect()


def attention_part(model: PreTrainedModel, rows: TokenRows, name: str, dtype: str, side: str) -> Part:
    """Of one of ``BACKENDS``. A kernel of ``RUNS`` fails the check on a GPU if torch says that it cannot run."""
    part: Part = {"part": f"{name} {dtype} padded on the {side}", "passed": None}
    backend, has_verdict = BACKENDS[name], side == "right" and name != "cudnn"
    context: AbstractContextManager[None] = nullcontext() if backend is None else sdpa_kernel([backend])
    try:
        with context:
            figures = compare_with_rows(model, rows, side, masked=name != "flash" or side == "left")
    except RuntimeError as error:
        if name != "cudnn" and not any(words in str(error) for words in NO_KERNEL):
            raise
        if has_verdict and name in RUNS[dtype] and runtime.device().type == "cuda":
            part["passed"] = False
        return part | {"kernel": f"none for this input: {first_line(error)}"}
    if has_verdict:
        part["passed"] = figures["nan"] == 0 and figures["distance"] <= LIMITS[dtype]
    return part | figures | {"limit": LIMITS[dtype]}


def random_rows(lengths: list[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, vocabulary, (length + 1,), generator=generator).tolist() for length in lengths]


def compare_with_rows(model: PreTrainedModel, rows: TokenRows, side: str, masked: bool = True) -> dict[str, float]:
    """Relative L2 distance of the batch's gradient sum from the single rows', and the number of its values that are not
    finite. masked: whether attention is told the padding, as flash's kernel cannot be; a causal model that is padded on
    the right need not be."""
    single: list[Tensor] | None = None
    for row in rows:
        gradients = [gradient.float() for gradient in summed_gradients(model, [row], side, masked)]
        single = gradients if single is None else [total.add_(g) for total, g in zip(single, gradients, strict=True)]
    assert single is not None
    batch = summed_gradients(model, rows, side, masked)
    squares = torch.zeros(2, dtype=torch.float64, device=batch[0].device)
    not_finite = 0
    for expected, gradient in zip(single, batch, strict=True):
        difference = gradient.float() - expected
        squares += torch.stack([value.double().square().sum() for value in (difference, expected)])
        not_finite += int((~gradient.isfinite()).sum())
    return {"distance": float((squares[0] / squares[1]).sqrt()), "nan": not_finite}


def summed_gradients(model: PreTrainedModel, rows: TokenRows, side: str, masked: bool) -> list[Tensor]:
    """Gradient of every weight of the rows' summed cross entropies, in the model's dtype."""
    pad, device = right_pad if side == "right" else left_pad, runtime.device()
    batch = pad([row[:-1] for row in rows], 0, device)
    labels = pad([row[1:] for row in rows], 0, device)["input_ids"]
    labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if side == "left":  # as generation derives them from the mask
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if not masked:
        del batch["attention_mask"]
    model.zero_grad(set_to_none=True)
    row_losses(model(**batch, use_cache=False).logits, labels).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


def experts(tiny: bool) -> Iterator[Part]:
    """Experts without tokens have a gradient of exactly zero, in every implementation that transformers has."""
    config = shape("Qwen3-MoE", tiny)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model = sharded_model(config, "bf16")
        model.module.set_experts_implementation(implementation)
        # Few tokens, so that many experts get none.
        figures = idle_experts(model, random_rows([3] if tiny else [15], config.vocab_size))
        passed = figures["idle"] > 0 and figures["idle_not_zero"] == 0 and figures["used_all_zero"] == 0
        yield {"part": implementation, "passed": passed and figures["not_finite"] == 0, **figures}
        model.close()


def idle_experts(model: ShardedModel, rows: TokenRows) -> dict[str, int]:
    """``idle_counts`` of a backward pass. Memory is filled with NaN before it, so that what a kernel leaves unwritten
    shows."""
    chosen = tokens_per_expert(model, rows)
    gradients = GradientShards(model, runtime.device())
    batch = right_pad(rows, 0, runtime.device())
    with gradients.collecting():
        logits = model.module(**batch, use_cache=False).logits
        fill_free_memory()
        logits.float().square().mean().backward()
        gradients.flush()
        model.release()
    return idle_counts(model.scored, gradients.sums, chosen)


def idle_counts(
    shards: Iterable[Shard], sums: Mapping[str, Tensor], chosen: Mapping[int | None, Sequence[int]]
) -> dict[str, int]:
    """Matrices of experts without tokens, those of them with a sum that is not exactly zero, and the other way round.

    sums: gradients by shard's name. chosen: layer → number of tokens of each expert.
    """
    counts = {"idle": 0, "idle_not_zero": 0, "used_all_zero": 0, "not_finite": 0}
    for shard in shards:
        counts["not_finite"] += int((~sums[shard.name].isfinite()).sum())
        for unit in shard.parameter.units:
            if unit.expert is not None:
                is_zero = not bool(shard.elements(unit, sums[shard.name]).any())
                is_idle = chosen[unit.layer][unit.expert] == 0
                counts["idle"] += is_idle
                counts["idle_not_zero"] += is_idle and not is_zero
                counts["used_all_zero"] += is_zero and not is_idle
    return counts


@torch.no_grad()
def tokens_per_expert(model: ShardedModel, rows: TokenRows) -> dict[int | None, list[int]]:
    """Layer → number of tokens of each expert."""
    config = model.module.config
    counts: list[list[int]] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        chosen = chosen_experts(output, experts_per_token(config))
        counts.append(torch.bincount(chosen.flatten(), minlength=config.num_experts).tolist())

    handles = [router.register_forward_hook(keep) for router in model.routers.values()]
    try:
        model.module(**right_pad(rows, 0, runtime.device()), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.release()
    return dict(enumerate(counts))


def fill_free_memory() -> None:
    """Write NaN into memory that torch may hand out next: up to 8 GiB of a GPU's, and blocks of every small size."""
    device = runtime.device()
    most = 8 << 30 if device.type == "cuda" else 1 << 20
    numel = min(memory.free_memory_bytes() // 2, most) // 4
    blocks = [torch.full((numel // 4,), torch.nan, device=device) for _ in range(4)]
    blocks += [torch.full((1 << power,), torch.nan, device=device) for power in range(6, 20)]
    del blocks


def neighbours(tiny: bool) -> Iterator[Part]:
    """How much logits in bf16 change with the rows beside a row, and with what follows: stages refuse a model, or read
    its rows one at a time, beyond ``limit`` (``models/rows.py``).

    A mixture is where rounding grows most: its routers choose other experts. Weights are random, which says little of
    trained ones; the depth is that of Qwen3-30B-A3B.
    """
    for name, layers in (("Llama-3.2-1B", 16), ("Qwen3-MoE", 48)):
        config = shape(name, tiny, num_hidden_layers=2 if tiny else layers)
        model = random_model(config, "bf16")
        (row,) = random_rows([PROBE_LENGTH - 1], config.vocab_size)
        for what, difference in logit_differences(model, row).items():
            yield {"part": f"{name}, {what}", "passed": difference.is_rounding, **difference._asdict()}
        del model
        gc.collect()


def logit_differences(model: PreTrainedModel, row: list[int]) -> dict[str, Difference]:
    """What the stages ask of a model, by what the row's logits might depend on."""

    @torch.no_grad()
    def logits(rows: TokenRows) -> list[Tensor]:
        values = model(**right_pad(rows, 0, runtime.device()), use_cache=False).logits
        return [of_row[: len(ids)] for of_row, ids in zip(values, rows, strict=True)]

    def generated(rows: TokenRows) -> Tensor:
        return generation_logits(model, rows, 0)

    return {
        "what follows": difference_ahead(logits, row),
        "a longer row": difference_beside(logits, row),
        "a longer prompt, in generation": difference_beside(generated, row),
        "equal prompts, in generation": difference_beside(generated, row, equal_length=True),
    }


def bits(tiny: bool) -> Iterator[Part]:
    """Noise, selections and masks of 10^8 scores have the same bits on the device as on the CPU."""
    count = 10**5 if tiny else 10**8
    if not tiny:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the CPU's half would take minutes on one
    yield from noise(count)
    scores = made_scores(count)
    for name in ("top", "bottom", "random"):
        cuts, digests = zip(*(selected(scores.to(device), name) for device in ("cpu", runtime.device())), strict=True)
        same = cuts[0] == cuts[1] and digests[0] == digests[1]
        yield {"part": f"selection and mask, {name}", "passed": same, "scores": count, "k": cuts[0].count}
    yield frozen_bits(count // 10)


def noise(count: int) -> Iterator[Part]:
    """Numbers that depend on (seed, position) alone, of ``count`` positions; of gumbel, which takes torch's logarithm,
    for information."""
    key = stream(3, 0x9E27)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "random_bits": lambda positions: random_bits(key, positions, 53),
        "normal": lambda positions: normal(key, positions),
        "gumbel": lambda positions: gumbel(key, positions[:: 1 << 10], 1 << 10),
    }
    for name, function in kinds.items():
        different, largest = 0, 0.0
        for first in range(0, count, CHUNK):
            positions = torch.arange(first, min(first + CHUNK, count))
            expected, values = function(positions), function(positions.to(runtime.device())).cpu()
            is_different = expected != values
            different += int(is_different.sum())
            if bool(is_different.any()):
                largest = max(largest, float((expected - values).abs().max()))
        yield {
            "part": f"noise, {name}",
            "passed": different == 0 if name != "gumbel" else None,
            "numbers": count,
            "different": different,
            "largest_difference": largest,
        }


def made_scores(count: int) -> Tensor:
    """float32 [count] on the CPU, half of them rounded, so that thousands are equal wherever a cut falls."""
    scores = torch.rand(count, generator=torch.Generator().manual_seed(2)).square_()
    rounded = scores[::2].mul(4096).floor_().div_(4096)
    scores[::2] = rounded
    return scores


def selected(scores: Tensor, order: str) -> tuple[Cut, str]:
    """The cut of the first 1 % in ``order``, and the sha256 of the packed mask, computed where ``scores`` are."""
    ordering, count = Order(order, seed=5), len(scores)
    run = ScoreRun(scores, 0)
    (cut,) = select([[run]], [count // 100], ordering, count - 1, lambda counts: counts)
    digest = hashlib.sha256()
    for first in range(0, count, CHUNK):
        keys = ordering.keys(scores[first : first + CHUNK], first)
        digest.update(pack_bits(cut.selects(keys, first)).numpy().tobytes())
    return cut, digest.hexdigest()


def frozen_bits(count: int) -> Part:
    """AdamW on the device under a packed mask: frozen weights keep their bits, although their gradients are NaN."""
    device = runtime.device()
    generator = torch.Generator().manual_seed(4)
    packed = torch.randint(256, (-(-count // 8),), generator=generator, dtype=torch.uint8)
    weight = torch.randn(count, generator=generator).to(device)
    trained = packed.repeat_interleave(8)[:count] >> (torch.arange(count) % 8).to(torch.uint8) & 1
    is_trained = trained.bool().to(device)
    gradient = torch.where(is_trained, torch.ones((), device=device), torch.nan)
    before, moments = weight.clone(), [torch.zeros_like(weight) for _ in range(2)]
    rule = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for step in (1, 2):
        masked_adamw(weight, gradient, *moments, packed.to(device), step=step, **rule)
    moved = as_integers(weight) != as_integers(before)
    figures = {
        "frozen": int((~is_trained).sum()),
        "frozen_changed": int((moved & ~is_trained).sum()),
        "trained_unchanged": int((~moved & is_trained).sum()),
    }
    passed = figures["frozen_changed"] == 0 and figures["trained_unchanged"] == 0 and bool(weight.isfinite().all())
    return {"part": "AdamW under a mask", "passed": passed, **figures}
