"""The prefetch bucket of ZeRO-3 on CPUs: small enough for glibc to reuse its buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esi_ds.models.folder import ModelSource
from esi_ds.zero import engine, runtime
from esi_ds.zero.settings import CPU_PREFETCH, PREFETCH, PREFETCH_NAMES, check_settings, with_prefetch

MMAP_THRESHOLD_MAX = 32 << 20  # of 64-bit glibc, mallopt(3)


def settings(**zero: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}


def test_on_cpus_a_buffer_of_fp32_stays_in_the_heap() -> None:
    asked = settings()
    filled = with_prefetch(asked, "cpu")
    assert filled == settings(**{PREFETCH: CPU_PREFETCH})
    assert 4 * CPU_PREFETCH < MMAP_THRESHOLD_MAX
    assert asked == settings()  # the caller's mapping, which other models are loaded with, is as it was
    check_settings(filled)


def test_gpus_keep_deepspeeds_default() -> None:
    assert with_prefetch(settings(), "cuda") == settings()


@pytest.mark.parametrize("name", PREFETCH_NAMES)
def test_what_the_user_has_set_stands(name: str) -> None:
    check_settings(settings(**{name: 7}))  # DeepSpeed takes both names
    assert with_prefetch(settings(**{name: 7}), "cpu") == settings(**{name: 7})


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_models_are_read_and_run_with_it(monkeypatch: pytest.MonkeyPatch, device_type: str) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(runtime, "device", lambda: torch.device(device_type, 0))
    monkeypatch.setattr(engine, "read_partitioned", lambda source, dtype, settings, auto_class: seen.append(settings))
    monkeypatch.setattr(engine, "ShardedModel", lambda module, settings, optimizer, roles: seen.append(settings))
    engine.load_sharded(ModelSource("folder"), "fp32", settings())
    assert seen == [with_prefetch(settings(), device_type)] * 2
