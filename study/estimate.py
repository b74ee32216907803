"""How long the whole study takes on two idle cores, from the CPU seconds of a few cells of every sort.

python -m study.run --estimate           # about ten CPU minutes, in one process; works beside other jobs

It measures CPU seconds of the worker (user and system) rather than wall time, as they hardly depend on other load. A
cell keeps one core busy, so they equal its wall time on an idle core. The page at the end is not included.
"""

from __future__ import annotations

import dataclasses
import heapq
import resource
import shutil
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from study.execute import run_cell
from study.grid import CONTRASTIVE, NEEDS_CONTROL, NEEDS_RESPONSES, NEEDS_TUNING_ROWS, Cell
from study.material import all_files, write

SAMPLES = {"mask": 1, "set": 3, "lora": 1, "spa": 2, "perturb": 1}  # of each sort
# A perturb cell asks all prompts this often: once a triple of order, ratio, noise and seed, and once without noise.
NUM_NOISES, NUM_NOISES_SAMPLED = 3 * 2 * 3 * 3, 3 * 2


def sort_of(cell: Cell) -> str:
    """Cells of one sort do the same work: the passes of a mask, the rows and the model of a tuning."""
    family, facts = cell.model.split("-")[0], cell.facts
    if cell.kind == "spa":
        return f"spa {family} {facts['task']}"
    if cell.kind != "mask":
        return f"{cell.kind} {family}" + (" all weights" if facts.get("criterion") == "all" else "")
    criterion = str(facts["criterion"])
    plain = criterion.removesuffix(CONTRASTIVE)
    passes = []
    if plain in NEEDS_RESPONSES:
        generated = f"{facts.get('prompts', 'all')} responses made"
        passes.append("responses read" if cell.after else generated)
    passes += ["16 draws"] if plain == "esi-gumbel-16" else []
    passes += ["tuning rows"] if plain in NEEDS_TUNING_ROWS else []
    passes += ["benign rows"] if criterion != plain or plain in NEEDS_CONTROL else []
    return f"mask {family} {', '.join(passes) or 'weights only'}"


def sample_of(grid: Sequence[Cell]) -> list[Cell]:
    """A few cells of every sort, spread over the grid, none of which needs a cell that is not in the sample."""
    by_sort, chosen = defaultdict(list), list[Cell]()
    for cell in grid:
        by_sort[sort_of(cell)].append(cell)
    # Every tuned cell needs one of these.
    first_seed = min(cell.seed for cell in grid)
    masks = [cell for cell in grid if (cell.kind, cell.facts, cell.seed) == ("mask", {"criterion": "esi"}, first_seed)]
    for sort, cells in by_sort.items():
        known = {cell.name for cell in (*masks, *chosen)}
        ready = [cell for cell in cells if known.issuperset(cell.after)]
        if not ready:
            raise ValueError(f"no cell of the sort {sort!r} can be sampled")
        wanted = SAMPLES[cells[0].kind]
        chosen += [ready[len(ready) * number // wanted] for number in range(min(wanted, len(ready)))]
    return list({cell.name: cell for cell in (*masks, *chosen)}.values())


def cpu_seconds() -> float:
    """User and system time of this process and of those it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(cell: Cell, output: Path) -> tuple[float, float]:
    """In the worker: CPU seconds of the process so far, before and after the cell."""
    before = cpu_seconds()
    run_cell(cell, output)
    return before, cpu_seconds()


def measure(sample: Sequence[Cell], output: Path) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each sampled cell by sort, and the CPU seconds that a fresh process adds to its first cell."""
    seconds, first = defaultdict(list), sample[0]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        _, started = pool.submit(measured, dataclasses.replace(first, name=f"first/{first.name}"), output).result()
        for number, cell in enumerate(sample, 1):
            before, after = pool.submit(measured, cell, output).result()
            spent = after - before
            if cell.kind == "perturb":  # sampled with fewer cells of noise inside
                spent *= (NUM_NOISES + 1) / (NUM_NOISES_SAMPLED + 1)
            seconds[sort_of(cell)].append(spent)
            print(f"{number:3d}/{len(sample)}  {after - before:6.1f} CPU s  {cell.name}", flush=True)
    return dict(seconds), started - seconds[sort_of(first)][0]


def schedule(grid: Sequence[Cell], seconds: dict[str, float], processes: int) -> float:
    """Seconds until all cells are done, in ``run_all``'s order: a cell starts when a process is free and those it
    needs are done."""
    now, waiting, done = 0.0, list(grid), set[str]()
    running: list[tuple[float, str]] = []
    while waiting or running:
        for cell in [c for c in waiting if done.issuperset(c.after)][: processes - len(running)]:
            waiting.remove(cell)
            heapq.heappush(running, (now + seconds[sort_of(cell)], cell.name))
        now, name = heapq.heappop(running)
        done.add(name)
    return now


def estimate(grid: Sequence[Cell], output: Path, processes: int, cells_a_process: int) -> float:
    """Print the table of sorts; returns the minutes that the whole grid takes."""
    shutil.rmtree(output, ignore_errors=True)
    write(output / "data", all_files(tuple(sorted({cell.seed for cell in grid}))))
    sample = [
        dataclasses.replace(cell, facts={**cell.facts, "noise": [1.0], "seeds": [0]})
        if cell.kind == "perturb"
        else cell
        for cell in sample_of(grid)
    ]
    seconds, start = measure(sample, output)
    counts: dict[str, int] = defaultdict(int)
    for cell in grid:
        counts[sort_of(cell)] += 1
    mean = {sort: sum(values) / len(values) for sort, values in seconds.items()}
    print(f"\n{'sort':44} {'cells':>5} {'sampled':>7} {'CPU s each':>10} {'minutes':>8}")
    for sort, count in counts.items():
        print(f"{sort:44} {count:5d} {len(seconds[sort]):7d} {mean[sort]:10.1f} {count * mean[sort] / 60:8.1f}")
    starts = -(-len(grid) // cells_a_process)
    print(f"{'a fresh process':44} {starts:5d} {1:7d} {start:10.1f} {starts * start / 60:8.1f}")
    minutes = (schedule(grid, mean, processes) + starts * start / processes) / 60
    print(f"\n{len(grid)} cells on {processes} idle cores: {minutes:.0f} minutes (without the page)")
    return minutes
