"""The prefetch bucket of ZeRO-3 on CPUs: small enough for glibc to reuse its buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ROOT

from esi_ds.cli import main
from esi_ds.core.footprint import CPU_PREFETCH, GPU_PREFETCH, gathered_tensors, window_bytes
from esi_ds.core.units import Parameter, Unit
from esi_ds.models.folder import ModelSource
from esi_ds.zero import engine, runtime
from esi_ds.zero.settings import PREFETCH, PREFETCH_NAMES, check_settings, with_prefetch

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


@pytest.mark.parametrize("prefix", ["stage3_", ""])
def test_the_plan_counts_what_a_run_on_either_device_keeps(prefix: str) -> None:
    """2·10^9 weights, more than what DeepSpeed's defaults keep; of a run on CPUs the bucket is what it fills in."""
    size = 2_000_000_000
    parameter = Parameter("p", (size,), 0, "mlp.up", (Unit("p", "mlp.up", 0, None, 0, size),))
    tensors = gathered_tensors([parameter], 4)
    reused = {f"{prefix}max_reuse_distance": 3_000}
    assert window_bytes(tensors, 2, {}) == 2 * (1_000_000_000 + GPU_PREFETCH)
    assert window_bytes(tensors, 2, reused) == 2 * (3_000 + GPU_PREFETCH)
    on_cpus = 2 * (3_000 + CPU_PREFETCH)
    assert window_bytes(tensors, 2, reused, CPU_PREFETCH) == on_cpus
    assert window_bytes(tensors, 2, with_prefetch(settings(**reused), "cpu")["zero_optimization"]) == on_cpus
    for prefetch in (GPU_PREFETCH, CPU_PREFETCH):
        asked = {**reused, f"{prefix}prefetch_bucket_size": 7}
        assert window_bytes(tensors, 2, asked, prefetch) == 2 * 3_007


def test_a_dry_run_shows_the_window_of_cpus_where_it_differs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs/moe/mixtral-8x22b-set.yaml"), "--dry-run", "--nodes", "2"]
    arguments += [f"model.path={ROOT / 'configs/moe/architectures/mixtral-8x22b'}", "model.revision=null"]
    assert main("set", arguments) == 0
    shown = capsys.readouterr().out
    kept = next(line for line in shown.splitlines() if line.startswith("kept for reuse and prefetch"))
    assert "1.956 GiB" in kept and "on CPUs, kept for reuse and prefetch: 1.866 GiB" in shown
    assert main("set", [*arguments, "deepspeed={zero_optimization: {stage: 3, stage3_prefetch_bucket_size: 7}}"]) == 0
    assert "on CPUs" not in capsys.readouterr().out
