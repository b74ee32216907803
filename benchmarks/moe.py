"""ESI on a mixture of experts, with and without expert parallelism: time per token and resident bytes, as ratios to the
stock ZeRO-3 engine's forward and backward of the same tokens in the same process.

    python benchmarks/moe.py [--ranks 2]

starts itself on ZeRO-3 ranks, all of which share a layer's experts where they are shared, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from esi import BATCH, PROMPT, RESPONSE, count_resident, launched, time_bare, time_esi  # noqa: E402


def make_models(folder: Path, dtype) -> None:
    """A Qwen3-MoE of 39 M weights, 32 experts a layer and two a token, and a guard of the same vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

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
    import torch

    from esi_ds.zero import runtime

    runtime.start()
    dtype, ranks = "bf16" if runtime.device().type == "cuda" else "fp32", runtime.world_size()
    if runtime.is_main():
        make_models(folder, torch.bfloat16 if dtype == "bf16" else torch.float32)
    runtime.barrier()
    found = {"ranks": ranks, "device": str(runtime.device()), "dtype": dtype, "torch": torch.__version__}
    tokens, bare = BATCH * (PROMPT + RESPONSE) * ranks, None
    for label, size in (("without expert parallelism", None), (f"autoep_size {ranks}", ranks)):
        resident = count_resident(folder, size)
        gc.collect()
        measured, rows = time_esi(folder, dtype, size)
        gc.collect()
        bare = bare or time_bare(folder, dtype, rows)
        gc.collect()
        alone = measured["esi_s"] - measured["of_which_judge_s"]
        found[label] = {
            "ESI microseconds per token": 1e6 * measured["esi_s"] / tokens,
            "ESI over bare": measured["esi_s"] / bare,
            "ESI without its judge over bare": alone / bare,
            "bf16 bytes per weight x ranks": resident["bytes_per_weight_times_ranks"],
        }
    found |= {"weights": measured["weights"], "bare microseconds per token": 1e6 * bare / tokens}
    if runtime.is_main():
        print("RESULT " + json.dumps(found, indent=1), flush=True)
    runtime.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker)
        return
    print(launched(__file__, arguments.ranks))


if __name__ == "__main__":
    main()
