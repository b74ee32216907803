"""Formulas of docs/scaling.md against measurements: what a rank holds, holds for a moment, and receives.

    python -m benchmarks.scaling [--ranks 1 2 4]

starts itself on ZeRO-3 ranks, with and without expert parallelism, and prints one table. It measures the storages of
the tensors alive between two micro-batches, the peak of what the allocator holds within one, and the sizes
of the collectives that torch is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.common import BIN, result_of
from benchmarks.received import Received


def worker(folder: Path, sizes: list[int | None]) -> None:
    received = Received()
    from benchmarks.scaling_cases import measure_cases  # loads DeepSpeed, which takes the collectives as they now are

    measure_cases(folder, sizes, received)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.sizes)
        return
    from benchmarks.scaling_cases import prepare

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for ranks in options.ranks:
            sizes = [None, *(size for size in (2, 4) if ranks % size == 0)]
            launcher = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={ranks}", "-m"]
            command = [*launcher, "benchmarks.scaling", "--worker", folder, "--sizes", json.dumps(sizes)]
            rows += result_of(command)
    print(table(rows))


if __name__ == "__main__":
    main()
