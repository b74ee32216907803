"""Make the shipped tiny models: python -m tiny_models.train --output examples/models

Two single-threaded processes train side by side: one the four chat models, one the guard. Then everything is measured
from the saved folders, and the model cards, `figures.json` and the small data files are written.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("chat", "guard")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; parsed before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "examples/models", help="folder of the five model folders"
    )
    parser.add_argument(
        "--data-output", type=Path, default=None, help="folder of the data files (default: OUTPUT/../data)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all step counts, for quick trials")
    parser.add_argument("--only", choices=[*PARTS, "measure"], help="run one part alone")
    parser.add_argument(
        "--extra", type=Path, default=None, help="folder with outside benchmarks to measure as a side note"
    )
    return parser.parse_args(argv)


def train_part(args: argparse.Namespace) -> None:
    """Train one part in this process and note its seconds in OUTPUT/.times-PART.json."""
    import torch

    from tiny_models.recipes import train_chat, train_guard

    torch.set_num_threads(1)
    times = (train_chat if args.only == "chat" else train_guard)(args.output, args.seed, args.scale)
    (args.output / f".times-{args.only}.json").write_text(json.dumps(times, indent=1))


def train_all(args: argparse.Namespace) -> None:
    """Train both parts, each in a process of one thread. If one fails, the other is ended; raises RuntimeError."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-m",
        "tiny_models.train",
        "--output",
        str(args.output.resolve()),
        "--seed",
        str(args.seed),
        "--scale",
        str(args.scale),
    ]
    running = {part: subprocess.Popen([*command, "--only", part], cwd=ROOT, env=environment) for part in PARTS}
    try:
        while running:
            time.sleep(1.0)
            for part, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[part]
                if process.returncode:
                    raise RuntimeError(
                        f"training part {part!r} ended with code {process.returncode}; see its output above"
                    )
    finally:
        for process in running.values():
            process.terminate()


def main(argv: list[str] | None = None) -> None:
    """Train both parts and measure; with --only, do that part alone."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.only in PARTS:
        train_part(args)
        return
    if args.only is None:
        train_all(args)
    from tiny_models.measure import measure_all

    measure_all(args.output, args.data_output or args.output.parent / "data", args.seed, args.extra)


if __name__ == "__main__":
    main()
