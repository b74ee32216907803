"""Run the study: one run folder per cell, two processes at a time; finished cells are not run again.

python -m study.run                      # every cell that is not finished, then OUTPUT/pages
python -m study.run --only set/llama     # cells whose names start with this, and the cells they need
python -m study.run --estimate           # how long the whole study would take on this machine (estimate.py)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from esi_ds.artifacts import write_text_atomic
from esi_ds.errors import UserError, ends_with_message
from esi_ds.words import counted
from study.estimate import estimate
from study.execute import run_cell, settings
from study.grid import SEEDS, Cell, cells, with_needs
from study.material import ROOT, all_files
from study.material import write as write_files
from study.page import write

# Processes are replaced after so many cells: what an engine leaves behind in memory does not pile up.
CELLS_A_PROCESS = 60


def work(cell: Cell, output: Path) -> tuple[str, float, str | None]:
    """In a worker: (name of the cell, seconds, traceback of its failure or None)."""
    started = time.monotonic()
    try:
        run_cell(cell, output)
    except Exception:
        return cell.name, time.monotonic() - started, traceback.format_exc()
    return cell.name, time.monotonic() - started, None


def run_all(todo: list[Cell], output: Path, processes: int) -> list[str]:
    """Run the cells; names of those that failed or could not start. A cell starts once the cells it needs are done."""
    started, done, failed = time.monotonic(), set[str](), list[str]()
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=CELLS_A_PROCESS) as pool:
        waiting, running = list(todo), dict[Future, Cell]()
        while waiting or running:
            for cell in [c for c in waiting if done.issuperset(c.after)][: processes + 1 - len(running)]:
                waiting.remove(cell)
                running[pool.submit(work, cell, output)] = cell
            if not running:
                return failed + [cell.name for cell in waiting]
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(finished)
                name, seconds, problem = finished.result()
                if problem:
                    failed.append(name)
                    print(problem, file=sys.stderr)
                else:
                    done.add(cell.name)
                minutes = (time.monotonic() - started) / 60
                print(f"{minutes:6.1f} min  {len(done):4d}/{len(todo)}  {seconds:5.1f} s  {name}", flush=True)
    return failed


def prepare(output: Path, seeds: tuple[int, ...]) -> None:
    """Write the study's files and settings. Raises UserError, and writes nothing, where the folder's cells were run
    with other ones: a finished cell is not run again."""
    file, now = output / "settings.json", json.loads(json.dumps(settings()))
    before = json.loads(file.read_text()) if file.is_file() else now
    if absent := [name for name in now if name not in before]:
        problem = f"does not say with which {', '.join(absent)} its cells were run"
        raise UserError("--output", output, problem, "give another folder")
    if other := [name for name in now if before[name] != now[name]]:
        raise UserError("--output", output, f"holds cells with other {', '.join(other)}", "give another folder")
    write_files(output / "data", all_files(seeds))
    write_text_atomic(file, json.dumps(now, indent=1) + "\n")


def chosen_seeds(wanted: list[int]) -> tuple[int, ...]:
    """The seeds in order. Raises UserError for one that no page would show."""
    if unknown := sorted(set(wanted) - set(SEEDS)):
        known = ", ".join(map(str, SEEDS))
        raise UserError("--seeds", unknown[0], "is not a seed of the study", f"give some of {known}")
    return tuple(sorted(set(wanted)))


@ends_with_message
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/study")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="run only cells whose names start with NAME"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="run only some of the seeds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--estimate", action="store_true", help="time a few cells of every sort and stop")
    options = parser.parse_args()
    seeds = chosen_seeds(options.seeds)
    if options.estimate:
        estimate(cells(seeds), ROOT / "runs/study-estimate", options.processes, CELLS_A_PROCESS)
        return 0
    prepare(options.output, seeds)
    todo = with_needs(cells(seeds), options.only)
    failed = run_all(todo, options.output, options.processes)
    if failed:
        print(f"{counted(len(failed), 'cell')} failed: {', '.join(failed[:5])}", file=sys.stderr)
    # Not into docs/results: its published figures are of cells that this output may lack.
    pages = options.output / "pages"
    write(options.output, pages)  # from the finished cells; tiny.md counts the missing ones
    print(pages / "tiny.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
