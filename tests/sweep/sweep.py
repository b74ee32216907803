"""Checks every causal architecture of transformers and writes docs/architectures.md: ``make sweep``.

One JSON line per architecture is appended to the results as it is done, so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: what is forked must have one thread
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import examine
import table
from checks import CHECKS
from tiny import MODEL_TYPES
from transformers import logging

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "runs" / "sweep" / "results.jsonl", ROOT / "docs" / "architectures.md"
# Stacked and interleaved and gated projections, mixtures of each layout, shared experts, latent attention, a hybrid.
TWO_RANKS = ("llama", "gpt_neox", "phi3", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "qwen3_next", "gemma2")


def read_rows(file: Path) -> dict[tuple[str, int], dict]:
    """The latest result of each (architecture, number of ranks)."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {(row["model_type"], row["ranks"]): row for row in rows}


def sweep(cases: Iterable[tuple[str, int]], file: Path) -> None:
    """Check what the file lacks, and append it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = read_rows(file)
    for model_type, ranks in cases:
        if (model_type, ranks) in done:
            continue
        started = time.monotonic()
        verdicts = examine.run(model_type, ranks)
        row = {"model_type": model_type, "ranks": ranks, "seconds": round(time.monotonic() - started, 1), **verdicts}
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        words = (f"{check} {verdicts[check].partition(':')[0]}" for check in CHECKS)
        print(f"{model_type} on {ranks}: {', '.join(words)} ({row['seconds']} s)", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="transformers' model types; none: all, and the table is written")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL of results (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="ZeRO-3 ranks, where model types are named")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.model_types:
        sweep([(model_type, options.ranks) for model_type in options.model_types], options.results)
        return
    sweep([*((model_type, 1) for model_type in MODEL_TYPES), *((name, 2) for name in TWO_RANKS)], options.results)
    PAGE.write_text(table.page(read_rows(options.results)), encoding="utf-8")
    print(f"table: {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
