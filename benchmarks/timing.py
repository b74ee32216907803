"""Wall time of what all ranks do together."""

from __future__ import annotations

import time
from collections.abc import Callable

from esi_ds.zero import runtime


def median_seconds(function: Callable[[], None], repeats: int) -> float:
    """Median wall time of ``repeats`` calls that all ranks make together, after one that warms up.

    Collective: two barriers a call.
    """
    function()
    seconds = []
    for _ in range(repeats):
        runtime.barrier()
        started = time.perf_counter()
        function()
        runtime.barrier()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]
