"""Two criteria in one run against two runs: CPU seconds and peak memory of ``launch/esi.py``, as a user starts it.

    python -m benchmarks.several_masks

A Llama of 29.4 M random weights, the shipped guard, fixed responses; one rank on the CPU; every run is a process of its
own, and the three come in turn, twice. Prints one JSON object. benchmarks/RESULTS.md holds what it printed, and where.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks import ROOT
from benchmarks.gpu_end_to_end import GUARD, LAUNCHER, ROWS
from benchmarks.gpu_models import save_model, shape
from benchmarks.measure import machine

NUM_ROWS, REPEATS = 48, 2
CRITERIA: dict[str, str | list[str]] = {"esi": "esi", "snip": "snip", "both": ["esi", "snip"]}
SIZES = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def prepare(folder: Path) -> None:
    """The model, the responses and a configuration for each run, in ``folder``."""
    save_model(shape("Llama-3.2-1B", False, **SIZES), "fp32", folder / "model")
    (folder / "rows.jsonl").write_text("".join(ROWS.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    for name, criterion in CRITERIA.items():
        for number in range(REPEATS):
            config = {
                "run": {"output_dir": str(folder / f"{name}-{number}"), "tensorboard": False},
                "model": {"path": str(folder / "model"), "dtype": "fp32"},
                "judge": {"family": "llama-guard-3", "path": str(GUARD)},
                "data": {"responses": str(folder / "rows.jsonl")},
                "esi": {"batch_size": 4},
                "select": {"criterion": criterion, "ratio": 0.01},
                "deepspeed": str(ROOT / "ds_configs/zero3.json"),
            }
            (folder / f"{name}-{number}.yaml").write_text(yaml.safe_dump(config))


def run(config: Path) -> tuple[float, int]:
    """CPU seconds and the most resident bytes of one run. Exits with the end of its output where it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    output = config.with_suffix(".out")
    with output.open("w") as opened:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch/esi.py"), "--config", str(config)],
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=opened,
            stderr=opened,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(output.read_text()[-4000:])
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def main() -> None:
    """The command line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        runs = {(kind, number): run(folder / f"{kind}-{number}.yaml") for number in range(REPEATS) for kind in CRITERIA}
        bits = [(folder / f"{kind}/digests.json").read_bytes() for kind in ("both-0/mask/snip", "snip-0/mask")]
        assert bits[0] == bits[1]
    seconds = {kind: min(runs[kind, number][0] for number in range(REPEATS)) for kind in CRITERIA}
    peaks = {kind: max(runs[kind, number][1] for number in range(REPEATS)) for kind in CRITERIA}
    result = {
        "cpu_seconds": seconds,
        "peak_resident_bytes": peaks,
        "both, over one run of esi": {
            "cpu seconds": seconds["both"] / seconds["esi"],
            "peak bytes": peaks["both"] / peaks["esi"],
        },
        "both, over two runs": {"cpu seconds": seconds["both"] / (seconds["esi"] + seconds["snip"])},
        **machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
