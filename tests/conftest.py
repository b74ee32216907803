"""Shared fixtures: where the tests find real data, and how they start ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights that lie beside some checkouts and are never part of the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (real data and weights) is not beside this checkout")
    return folder


def run_ranks(ranks: int, script: str, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """A script under the deepspeed launcher; output and exit code come back, a hang becomes a failure."""
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(29600 + os.getpid() % 1000),
        script,
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
