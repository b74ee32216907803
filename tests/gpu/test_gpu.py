"""On a GPU: the checks of benchmarks.gpu, whose numbers the other tests prove on CPUs. `make gpu` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks, gpu_end_to_end
from esi_ds.zero import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]
CHECKS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "every attention kernel gives a ragged batch the gradients of its rows": gpu_checks.attention,
    "experts without tokens have a gradient of exactly zero": gpu_checks.experts,
    "noise, selections and masks have the CPU's bits": gpu_checks.bits,
    "no frozen bit changes from ESI to the exported models": (
        lambda tiny: gpu_end_to_end.end_to_end(tiny, num_hidden_layers=1)
    ),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with runtime.process_group():
        yield


@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "whole size"])
@pytest.mark.parametrize("check", CHECKS)
def test_gpu(check: str, tiny: bool) -> None:
    if not tiny and "frozen" in check:
        pytest.skip("a whole-size model is what benchmarks.gpu runs, for a minute and a half")
    parts = list(CHECKS[check](tiny))
    assert any(part.get("passed") for part in parts), parts
    assert not [part for part in parts if part.get("passed") is False]
