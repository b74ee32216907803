"""Wall time and memory of what all ranks do together, on CPUs and on GPUs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import torch
from torch.profiler import ProfilerActivity, profile

from esi_ds.zero import runtime

VERSIONS = ("torch", "transformers", "deepspeed")


def synchronize() -> None:
    """Wait until this rank's GPU has done what it was asked to do; on a CPU nothing is ever pending."""
    if runtime.device().type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call that all ranks make together, until the last rank's device is idle.

    Collective: two barriers.
    """
    synchronize()
    runtime.barrier()
    started = time.perf_counter()
    function()
    synchronize()
    runtime.barrier()
    return time.perf_counter() - started


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``repeats`` calls that all ranks make together, after one that warms up.

    Collective: two barriers a call.
    """
    function()
    return sorted(seconds(function) for _ in range(repeats))[repeats // 2]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that are allocated at once on this rank's device while ``function`` runs, beyond those before."""
    if runtime.device().type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> dict[str, str]:
    """What a figure was measured on: date, device, versions."""
    device = torch.cuda.get_device_name() if runtime.device().type == "cuda" else f"CPU ({platform.machine()})"
    versions = {name: version(name) for name in VERSIONS}
    return {"date": str(date.today()), "device": device, "python": platform.python_version(), **versions}
