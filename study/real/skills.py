"""The loss of a saved model on right answers.

python -m study.real.skills --model FOLDER --rows FILE --output FILE
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from esi_ds.artifacts import read_jsonl, write_json_atomic
from real_models.twin import skill_loss


def main(argv: list[str] | None = None) -> int:
    """Write {name of the file: {"loss": nats a token of the answers, "rows": their number}}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    losses = {}
    for file in args.rows:
        pairs = [(row["prompt"], row["response"]) for row in read_jsonl(file)]
        losses[file.stem] = {"loss": skill_loss(args.model, pairs, args.device), "rows": len(pairs)}
    write_json_atomic(args.output, losses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
