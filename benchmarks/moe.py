"""ESI on a mixture of experts, with and without expert parallelism: time per token and resident bytes, as ratios to the
stock ZeRO-3 engine's forward and backward of the same tokens in the same process.

    python -m benchmarks.moe [--ranks 2]

starts itself on ZeRO-3 ranks, all of which share a layer's experts where they are shared, and prints one JSON object.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from benchmarks.common import print_result, run
from benchmarks.esi import BATCH, PROMPT, RESPONSE, count_resident, time_bare, time_esi
from benchmarks.measure import machine
from esi_ds.zero import runtime


def make_models(folder: Path, dtype: torch.dtype) -> None:
    """A Qwen3-MoE of 39 M weights, 32 experts a layer and two a token, and a guard of the same vocabulary."""
    common = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = Qwen3MoeConfig(
        **common,
        hidden_size=384,
        head_dim=48,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_experts=32,
        num_experts_per_tok=2,
    )
    guard = LlamaConfig(**common, hidden_size=192, intermediate_size=512, num_hidden_layers=4)
    for name, config in (("model", model), ("guard", guard)):
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder / name)


def worker(folder: Path) -> None:
    runtime.start()
    dtype, ranks = "bf16" if runtime.device().type == "cuda" else "fp32", runtime.world_size()
    if runtime.is_main():
        make_models(folder, torch.bfloat16 if dtype == "bf16" else torch.float32)
    runtime.barrier()
    results = {"ranks": ranks, "dtype": dtype, **machine()}
    tokens, bare = BATCH * (PROMPT + RESPONSE) * ranks, None
    for label, size in (("without expert parallelism", None), (f"autoep_size {ranks}", ranks)):
        resident = count_resident(folder, size)
        gc.collect()
        measured, rows = time_esi(folder, dtype, size)
        gc.collect()
        bare = bare or time_bare(folder, dtype, rows)
        gc.collect()
        alone = measured["esi_s"] - measured["of_which_judge_s"]
        results[label] = {
            "ESI microseconds per token": 1e6 * measured["esi_s"] / tokens,
            "ESI over bare": measured["esi_s"] / bare,
            "ESI without its judge over bare": alone / bare,
            "bf16 bytes per weight x ranks": resident["bytes_per_weight_times_ranks"],
        }
    results |= {"weights": measured["weights"], "bare microseconds per token": 1e6 * bare / tokens}
    if runtime.is_main():
        print_result(results)
    runtime.stop()


if __name__ == "__main__":
    run("benchmarks.moe", __doc__, worker, prepare=lambda folder: None)
