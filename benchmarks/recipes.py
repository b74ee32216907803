"""``docs/recipes.md``: what the recipes of configs/dense and configs/moe would hold and take, planned and not measured.

    python -m benchmarks.recipes docs/recipes.md

Bytes are those of ``--dry-run``. Times are arithmetic, the greater of two: 2 operations a weight and token forward, 4
backward, 2 to recompute, of the weights that a token meets, at ``MFU`` of an H100's bf16 peak; and what a rank
receives, at ``BANDWIDTH``. Generation, judging and an optimizer's step on the host are left out.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from pathlib import Path

from transformers import PretrainedConfig

from esi_ds import shipped
from esi_ds.cli import main as run_stage
from esi_ds.config import load_config
from esi_ds.core.units import Parameter
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import meta_parameters

PEAK, MFU = 989e12, 0.4  # operations a second; the share of them that is hoped for
BANDWIDTH = {True: 300e9, False: 50e9}  # bytes a second and GPU: within one node, and among nodes (400 Gbit/s)
GPUS = {  # of 80 GB each, in nodes of eight where there are more than one
    "llama3.2-1b": 1,
    "qwen3-0.6b": 1,
    "gemma3-1b": 1,
    "smollm2-135m": 1,
    "llama3-70b": 16,
    "gpt-oss-120b": 16,
    "mixtral-8x22b": 16,
    "qwen3-235b-a22b": 32,
    "deepseek-v3": 128,
    "kimi-k2": 256,
}
PROMPTS, TOKENS = 520, 300  # AdvBench's, with the longest answers; a row of GSM8K is about as long, SET's are shorter
STEPS = {"set": 100, "spa": 1000}  # as most recipes have them; the table says where one has others
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
HEAD = f"""# Recipes

The recipes of `configs/dense` and `configs/moe`. `NAME` runs ESI, and `NAME-set`, `NAME-spa` and `NAME-eval` run the
other stages; `esi-ds recipes` lists them all. The figures are **planned, not measured**: nothing here has run on a GPU.

Bytes are what `--dry-run` counts for each GPU of 80 GB, without activations, with the DeepSpeed config that the recipe
names. For your own nodes and settings, ask `--dry-run --nodes N`; without `--nodes` it plans for one GPU. Before any
download, give it the model's configuration: `model.path=configs/dense/architectures/NAME` or
`model.path=configs/moe/architectures/NAME`. These folders are in a checkout; elsewhere `esi-ds recipes copy`, without a
name, makes them.

Times are calculated without generation and judging, for prompts (with their answers) and rows of {TOKENS} tokens: a
pass at {MFU:.0%} of an H100's bf16 peak, or the traffic of ZeRO-3 at 300 GB/s per GPU within a node and 50 GB/s between
nodes, whichever takes longer. Where a recipe runs the optimizer on the hosts (marked
with *), add several seconds a step. This page is made by `python -m benchmarks.recipes docs/recipes.md`.

| recipe | weights | active weights | nodes × GPUs | ESI, GiB per GPU | SET, GiB per GPU | SPA, GiB per GPU | \
ESI: scoring {PROMPTS} prompts | SET: training {STEPS["set"]:,} steps | SPA: training {STEPS["spa"]:,} steps |
|---|---|---|---|---|---|---|---|---|---|
"""


def active(parameters: tuple[Parameter, ...], config: PretrainedConfig) -> float:
    """Weights that a token meets: of the routed experts only as many as it is sent to."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    share = config.num_experts_per_tok / experts if experts else 1.0
    return sum(p.numel * (share if re.search(r"\.experts\.", p.name) else 1.0) for p in parameters)


def planned(name: str, stage: str, architecture: Path, gpus: int) -> tuple[float, float]:
    """(bytes held, bytes received a step) of a GPU, as ``--dry-run`` counts them for a stage.

    The figures are those with experts on different ranks where the recipe distributes them.
    """
    shape = ["--world-size", "1"] if gpus == 1 else ["--nodes", str(gpus // 8)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run_stage(stage, ["--config", name, "--dry-run", *shape, f"model.path={architecture}"])
    assert code == 0, printed.getvalue()
    table = -1 if "autoep" in str(load_config(name, []).deepspeed) else 0
    column = ("esi", "set", "spa").index(stage)
    values = []
    for title in ("together, without activations", "received per rank and step"):
        lines = re.findall(rf"^{title} +(.*)$", printed.getvalue(), re.MULTILINE)
        if not lines:  # one rank receives nothing
            values.append(0.0)
            continue
        value, unit = re.findall(r"([\d.]+) (B|KiB|MiB|GiB|TiB)", lines[table])[column]
        values.append(float(value) * UNITS[unit])
    return values[0], values[1]


def duration(operations: float, received: float, gpus: int) -> str:
    """The time of so many operations on all GPUs and bytes to each, in words a reader can plan with."""
    traffic = received / BANDWIDTH[gpus <= 8] if gpus > 1 else 0.0
    seconds = max(operations / (gpus * PEAK * MFU), traffic)
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def training(stage: str, recipe: str, met: float, received: float, gpus: int) -> str:
    """How long SET or SPA trains. received: bytes, by a GPU in one micro-batch."""
    tune = load_config(recipe, []).tune
    assert tune is not None
    micro_batches = tune.max_steps * tune.gradient_accumulation
    rows = micro_batches * tune.batch_size * gpus
    on_host = "*" if stage == "spa" and "offload" in str(load_config(recipe, []).deepspeed) else ""
    steps = f" ({tune.max_steps:,} steps)" if tune.max_steps != STEPS[stage] else ""
    return f"{duration(8 * met * rows * TOKENS, micro_batches * received, gpus)}{on_host}{steps}"


def row(name: str) -> str:
    """One model's line of the table. name: of its ESI recipe, with its folder."""
    kind, model = name.split("/")
    architecture, gpus = shipped.folder("configs") / kind / "architectures" / model, GPUS.get(model, 8)
    source = ModelSource(str(architecture), None, trust_remote_code=False, field="model.path")
    config = load_model_config(source)
    parameters = meta_parameters(config, source)
    met, total = active(parameters, config), sum(parameter.numel for parameter in parameters)
    stages = {"esi": name, "set": f"{name}-set", "spa": f"{name}-spa"}
    plans = {stage: planned(recipe, stage, architecture, gpus) for stage, recipe in stages.items()}
    esi = load_config(name, []).esi
    assert isinstance(esi.batch_size, int)
    passes = math.ceil(PROMPTS / (esi.batch_size * gpus))
    cells = [
        f"`{model}`",
        f"{total / 1e9:,.0f} B" if total >= 1e12 else f"{total / 1e9:.3g} B",
        f"{met / 1e9:.3g} B",
        f"{max(gpus // 8, 1)} × {min(gpus, 8)}",
        *(f"{held / UNITS['GiB']:.3g}" for held, _ in plans.values()),
        duration(8 * met * PROMPTS * TOKENS, passes * plans["esi"][1], gpus),
        *(training(stage, stages[stage], met, plans[stage][1], gpus) for stage in STEPS),
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    suffixes = ("-set", "-spa", "-eval")
    names = [name for name in shipped.recipes() if name.startswith(("dense/", "moe/")) and not name.endswith(suffixes)]
    Path(sys.argv[1]).write_text(HEAD + "".join(map(row, names)))


if __name__ == "__main__":
    main()
