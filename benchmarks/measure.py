"""Wall time and memory of what all ranks do together, on CPUs and on GPUs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import resident_bytes
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


def allocated_bytes() -> int:
    """Bytes of the tensors that this process holds now: on its GPU, or on the CPU where it has none."""
    return torch.cuda.memory_allocated() if runtime.device().type == "cuda" else resident_bytes()


class Stopwatch:
    """Seconds spent in named parts of a step. On a GPU events mark its stream, so that nothing waits between parts."""

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    def _mark(self) -> Any:
        if runtime.device().type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block to ``name``. A part within another one is counted to both."""
        begin = self._mark()
        yield
        self._marks.setdefault(name, []).append((begin, self._mark()))

    def watch(self, owner: object, method: str, name: str) -> None:
        """Count every call of ``owner``'s method to ``name`` from now on."""
        function = getattr(owner, method)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*arguments, **keywords)

        setattr(owner, method, counted)

    def take(self) -> dict[str, float]:
        """Part → seconds since the last call."""
        synchronize()
        marks, self._marks = self._marks, {}
        return {name: sum(_between(*pair) for pair in pairs) for name, pairs in marks.items()}


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
