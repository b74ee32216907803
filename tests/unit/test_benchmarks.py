"""The benchmarks' helpers, and that every benchmark still fits the package: no other test imports them all."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from esi_ds.zero import runtime

MODULES = sorted(file.stem for file in Path(measure.__file__).parent.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_is_importable(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_time_ends_when_the_gpu_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(runtime, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(len(calls)))
    elapsed = measure.seconds(lambda: calls.append("function"))
    assert calls == ["synchronize", "barrier", "function", "synchronize", "barrier"]
    assert elapsed == 3.0  # from after the first barrier to after the last


def test_the_peak_is_what_is_held_at_once() -> None:
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.append(torch.ones(1 << 20))
        torch.ones(1 << 21)  # freed at once
        torch.ones(1 << 20)

    assert measure.peak_bytes(work) == 4 * (1 << 20) + 4 * (1 << 21)
