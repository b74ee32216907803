"""This project's scoring pass against the paper's procedure: prompts a second, peak bytes, overlap of the masks.

    python -m benchmarks.reference_procedure

Model and guard of one vocabulary with random weights, the same prompts and responses for all; each pass in a process
of its own on one device. ``benchmarks/published.py`` is the paper's procedure. This project's pass runs twice: with
the estimator ``paper_code`` as the paper's code asks its guard (the same mathematics), and with its defaults, where
the guard reads the prompt too. On a GPU everything is bf16. On a CPU, which may emulate bf16, times are those of fp32,
and bytes and masks those of bf16. Prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import gpu_models, published
from benchmarks.common import print_result, resident_bytes, result_of
from benchmarks.measure import machine, peak_bytes, seconds
from benchmarks.published import Row
from benchmarks.scoring import make_example, make_scoring
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.models.folder import ModelSource
from esi_ds.zero import runtime
from esi_ds.zero.engine import load_replicated, load_sharded
from esi_ds.zero.score import Accumulated, score, select_weights, unit_sigmas

BATCH, RATIO = 8, 0.01  # BATCH: prompts of a micro-batch here; the paper's procedure takes one at a time
SIDES = ("paper's procedure", "this project, paper_code", "this project, defaults")
RATES = ("prompts_per_second", "prompts_per_cpu_second")
SAFE, UNSAFE = 7, 8
GUARD_BEFORE, GUARD_AFTER = 48, 16  # ids of the guard's own text
PROMPT, RESPONSE = (24, 64), {"cpu": (32, 64), "cuda": (64, 256)}  # shortest and longest
NUM_PROMPTS = {"cpu": 8, "cuda": 64}
# The vocabulary is as large beside the width as in Llama 3; on a GPU model and guard have Llama-3.2-1B's shape.
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "cuda": gpu_models.SHAPES["Llama-3.2-1B"],
}


def make_models(folder: Path, shape: dict[str, Any]) -> None:
    """A Llama as model and another one as guard, bf16."""
    for seed, name in enumerate(("model", "guard")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder / name)


def make_rows(count: int, vocabulary: int, response: tuple[int, int]) -> list[Row]:
    """Rows of random ids. response: the shortest and the longest."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(9, vocabulary, (length,), generator=generator).tolist()

    before, after = ids(GUARD_BEFORE, GUARD_BEFORE), ids(GUARD_AFTER, GUARD_AFTER)
    return [Row(ids(*PROMPT), ids(*response), before, after, SAFE) for _ in range(count)]


def num_selected(model: torch.nn.Module) -> int:
    """k = ⌊ratio · number of all parameters⌋."""
    return int(RATIO * sum(parameter.numel() for parameter in model.parameters()))


def timed(all_prompts: Callable[[], None], num_prompts: int, held: int) -> dict[str, float]:
    """Figures of a pass that finds ``held`` bytes of tensors. It runs twice: once for its peak, then for its time.

    The process's CPU time says on a loaded CPU what the wall time does not.
    """
    peak = held + peak_bytes(all_prompts)
    cpu_before = time.process_time()
    elapsed = seconds(all_prompts)
    cpu = time.process_time() - cpu_before
    return {
        "prompts_per_second": num_prompts / elapsed,
        "prompts_per_cpu_second": num_prompts / cpu,
        "peak_bytes": peak,
    }


def run_published(folder: Path, dtype: str, rows: list[Row]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of the paper's procedure, and its mask."""
    device, before = runtime.device(), resident_bytes()
    model, guard = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=MODEL_DTYPES[dtype]).to(device).eval()
        for name in ("model", "guard")
    )
    guard.requires_grad_(False)
    held = resident_bytes() - before

    def all_prompts() -> None:
        model.zero_grad(set_to_none=True)
        for row in rows:
            published.add_gradient(model, guard, row)

    figures = timed(all_prompts, len(rows), held)
    mask = published.selected(published.scores(model, len(rows)), num_selected(model))
    return figures, mask


def run_ours(folder: Path, dtype: str, rows: list[Row], defaults: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of this project's pass on one ZeRO-3 rank, and its mask."""
    before = resident_bytes()
    examples = [
        make_example(index, row.prompt, row.response, row.before + row.prompt * defaults, row.after, row.safe, UNSAFE)
        for index, row in enumerate(rows)
    ]
    guard = load_replicated(ModelSource(str(folder / "guard"), field="judge.path"), dtype)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
    }
    model = load_sharded(ModelSource(str(folder / "model")), dtype, settings)
    estimator, judge_score = ("soft", "margin") if defaults else ("paper_code", "logit")
    scoring = make_scoring(folder, dtype, model, guard, examples, BATCH, estimator, judge_score)
    sums = scoring.gradients.sums
    held = resident_bytes() - before

    def all_prompts() -> None:
        scoring.state.position = 0
        for values in sums.values():
            values.zero_()
        while scoring.state.position < len(examples):
            scoring._step()

    with scoring.gradients.collecting():
        figures = timed(all_prompts, len(rows), held)
    means = {"safety": Accumulated(sums, len(examples)).take_means()}
    scores = score(model, "esi", means, unit_sigmas(model), 0)
    chosen = select_weights(model, scores, ratio=RATIO, order="top", of="all", scope="model", seed=0)
    shapes = {parameter.name: parameter.shape for parameter in model.parameters}
    mask = {name: bits.view(shapes[name]) for name, bits in chosen.bits.items()}  # one rank holds whole parameters
    return figures, mask


def mask_file(folder: Path, side: str, dtype: str) -> Path:
    return folder / f"mask-{SIDES.index(side)}-{dtype}.safetensors"


def worker(folder: Path, side: str, dtype: str) -> None:
    """One pass: prints its figures, and writes its mask."""
    runtime.start()
    rows = [Row(**row) for row in json.loads((folder / "rows.json").read_text())]
    if side == SIDES[0]:
        figures, mask = run_published(folder, dtype, rows)
    else:
        figures, mask = run_ours(folder, dtype, rows, defaults=side == SIDES[2])
    save_file(
        {name: bits.to("cpu", torch.uint8).contiguous() for name, bits in mask.items()}, mask_file(folder, side, dtype)
    )
    print_result({**figures, **machine()})
    runtime.stop()


def overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Share of the weights selected by ``one`` that ``other`` selects too."""
    both = sum(int((bits & other[name]).sum()) for name, bits in one.items())
    return both / sum(int(bits.sum()) for bits in one.values())


def compare(folder: Path, kind: str) -> dict[str, Any]:
    """The figures of all passes, and the ratios. kind: cpu or cuda."""
    dtypes = ("fp32", "bf16") if kind == "cpu" else ("bf16",)
    launch = [sys.executable, "-m", "benchmarks.reference_procedure", "--worker", str(folder)]
    results = {
        dtype: {side: result_of([*launch, "--side", side, "--dtype", dtype]) for side in SIDES} for dtype in dtypes
    }
    masks = {(side, dtype): load_file(mask_file(folder, side, dtype)) for side in SIDES for dtype in dtypes}
    theirs, ratios = SIDES[0], {}
    for side in SIDES[1:]:
        time_of, bytes_of = ({name: results[dtype][name] for name in (theirs, side)} for dtype in (dtypes[0], "bf16"))
        ratios[side] = {
            **{f"{rate}, over the paper's": time_of[side][rate] / time_of[theirs][rate] for rate in RATES},
            "peak bytes, over the paper's": bytes_of[side]["peak_bytes"] / bytes_of[theirs]["peak_bytes"],
        }
    overlaps = {
        f"{one} in {dtype}; {other} in {other_dtype}": overlap(masks[one, dtype], masks[other, other_dtype])
        for (one, dtype), (other, other_dtype) in itertools.combinations(masks, 2)
    }
    return {"ratios": ratios, "overlaps of the masks": overlaps, "passes": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=sorted(MODEL_DTYPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.side, options.dtype)
        return
    kind = runtime.device().type
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, SHAPES[kind])
        rows = make_rows(NUM_PROMPTS[kind], SHAPES[kind]["vocab_size"], RESPONSE[kind])
        (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        print(json.dumps(compare(folder, kind), indent=1))


if __name__ == "__main__":
    main()
