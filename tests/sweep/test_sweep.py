"""A sample of the sweep over architectures (``make sweep`` runs all of it): those that are right must stay right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CHECKS = ("units", "rows", "loading", "answers", "scores")
# Separate and interleaved projections, learned positions with an offset, masked recurrence beside attention, a
# multi-head latent attention with routed and shared experts, experts whose gate and up alternate.
SAMPLE = ("llama", "gpt_neox", "opt", "olmo2", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Verdicts by architecture. In a process of its own: the sweep forks, and wants to have no other thread."""
    file: Path = tmp_path_factory.mktemp("sweep") / "results.jsonl"
    command = [sys.executable, str(ROOT / "tests/sweep/sweep.py"), "--results", str(file), *SAMPLE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = (json.loads(line) for line in file.read_text().splitlines())
    return {row["model_type"]: row for row in rows}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_an_architecture_is_right(results: dict[str, dict[str, str]], model_type: str) -> None:
    verdicts = {check: results[model_type][check] for check in CHECKS}
    assert all(verdict.partition(":")[0] == "right" for verdict in verdicts.values()), verdicts
