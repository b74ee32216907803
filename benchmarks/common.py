"""What the benchmarks share. Imports no DeepSpeed: benchmarks.scaling counts collectives before DeepSpeed is loaded."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT

RESULT = "RESULT "  # begins the line that a worker's result is printed on
BIN = Path(sys.executable).parent


def resident_bytes() -> int:
    """Bytes of every tensor storage alive in this process, each counted once; tensors on the meta device have none."""
    gc.collect()
    tensors = (item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.device.type != "meta")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def print_result(result: Any) -> None:
    """Print a worker's result for ``result_of`` to read. To be called on rank 0 only."""
    print(RESULT + json.dumps(result), flush=True)


def result_of(command: Sequence[str]) -> Any:
    """Run a launch command in the repository; the result its worker printed. Exits with the output where it did not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if RESULT not in done.stdout:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    return json.loads(done.stdout.partition(RESULT)[2].splitlines()[0])


def run(module: str, description: str, worker: Callable[[Path], None], prepare: Callable[[Path], None]) -> None:
    """The command line of a benchmark: ``prepare`` a folder, then ``worker`` in it on ZeRO-3 ranks; prints the JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(options.ranks), "--module"]
        print(json.dumps(result_of([*launcher, module, "--worker", folder]), indent=1))
