"""On a GPU: the checks of benchmarks.gpu, whose numbers the other tests prove on CPUs. `make gpu` runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks, gpu_end_to_end, gpu_storage
from esi_ds.zero import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
    pytest.mark.skipif(os.environ.get("DS_ACCELERATOR") == "cpu", reason="the tests compute on the CPU: run make gpu"),
]
Check = Callable[[], Iterator[dict[str, Any]]]
# Kernels depend on sizes. What is slow at whole size is left to benchmarks.gpu, which `make gpu` runs before.
CHECKS: dict[str, Check] = {
    "every attention kernel gives a ragged batch the gradients of its rows": lambda: gpu_checks.attention(tiny=False),
    "experts without tokens have a gradient of exactly zero": lambda: gpu_checks.experts(tiny=False),
    "noise, selections and masks have the CPU's bits": lambda: gpu_checks.bits(tiny=True),
    "no frozen bit changes from ESI to the exported models": (
        lambda: gpu_end_to_end.end_to_end(tiny=True, num_hidden_layers=1)
    ),
    "a closed model leaves no memory allocated": lambda: gpu_storage.storage(tiny=True),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with runtime.process_group():
        yield


@pytest.fixture(autouse=True)
def local_rank(launcher_variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads it whenever a model is loaded, and ``launcher_variables`` has removed what the group set."""
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize("check", CHECKS)
def test_gpu(check: str) -> None:
    parts = list(CHECKS[check]())
    assert any(part.get("passed") for part in parts), parts
    assert not [part for part in parts if part.get("passed") is False]
