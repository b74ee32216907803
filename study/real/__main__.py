"""Run the study of a real model: python -m study.real --hours 2

On a CPU no cell is started that is not expected to end within six hours; the next start goes on. Finished cells are
not run again, and killed ones continue. Then real.json and real.md are written
into OUTPUT/pages, or into the folder that --docs names.
--only where/smollm2/ runs the cells whose names start with this, and those that they need. --list shows what is left.
--collect only writes the pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esi_ds.errors import Interrupted, UserError, ends_with_message
from real_models.make import DEFAULT_DATA
from study.grid import with_needs
from study.real.cells import all_cells, in_running_order
from study.real.grid import ROOT, Cell, Folders, Plan, read_grid
from study.real.runner import EXIT_INTERRUPTED, Runner, check_models, counts, is_done, read_record, seconds_by_kind


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; parsed before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hours",
        type=float,
        help="start no cell that would not finish within so many hours (on a CPU 6, else everything is run)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PREFIX", help="run only cells whose names start with one of these"
    )
    parser.add_argument("--list", action="store_true", help="show cells, their state and expected minutes")
    parser.add_argument("--collect", action="store_true", help="write the pages from what is finished, run nothing")
    parser.add_argument("--models", type=Path, default=ROOT / "runs/real-models", help="folder of make real-models")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/real-study", help="folder of the cells")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_DATA if DEFAULT_DATA.is_dir() else None, help="folder of the data sets"
    )
    parser.add_argument("--docs", type=Path, help="folder of real.json and real.md (OUTPUT/pages)")
    args = parser.parse_args(argv)
    # Not docs/results: its published figures are of cells that this output may lack.
    args.docs = args.docs or args.output / "pages"
    return args


def show(plan: Plan, cells: list[Cell]) -> None:
    """One line a cell: state, minutes taken or expected, name."""
    seconds, total = seconds_by_kind(cells, plan.folders.output), 0.0
    for cell in cells:
        record = read_record(plan.folders.output / cell.name)
        is_finished = is_done(cell, plan.folders.output)
        taken = record["seconds"] if is_finished else plan.expected_s(cell, seconds)
        is_asked_for = not cell.facts.get("only_if")
        total += taken if is_asked_for and not is_finished else 0
        state = record.get("state", "not run" if is_asked_for else "if asked")
        print(f"{state:8s} {taken / 60:6.1f} min  {cell.name}")
    print(f"{len(cells)} cells, {total / 3600:.1f} hours left without those that the finished ones may ask for")


def asked_for(cell: Cell, plan: Plan, everything: list[Cell]) -> bool:
    """Whether a cell is to be run, as far as the finished ones tell by now."""
    if not cell.facts.get("only_if"):
        return True
    from study.real.tune_results import is_due, tuned_rows

    output = plan.folders.output
    finished = [one for one in everything if one.part == "set" and is_done(one, output)]
    return is_due(cell, tuned_rows(finished, output, "set"), plan.size.seeds[0])


@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """Run, then collect; the exit code: 0, 1 if a cell failed, 2 for a mistake of the user's, 75 after a signal."""
    args = parse(argv)
    if args.hours is not None and not args.hours > 0:
        raise UserError("--hours", args.hours, "is not positive", "give hours, such as 2")
    folders = Folders(args.models.resolve(), args.output.resolve())
    plan = Plan(read_grid(), args.device, folders)
    everything = all_cells(plan, args.data)
    cells = in_running_order(with_needs(everything, args.only), plan.grid.first)
    if not cells:
        raise UserError("--only", args.only, "is not the start of any cell's name", "see --list")
    check_models(plan, everything, models_needed=not (args.list or args.collect))
    if args.list:
        show(plan, cells)
        return 0
    outcomes = []
    if not args.collect:
        from real_models.sources import Data
        from study.material import write
        from study.real.material import all_files

        write(folders.data, all_files(plan, Data(args.data)))
        try:
            outcomes = Runner(plan, due=lambda cell: asked_for(cell, plan, everything)).run(
                cells, everything, args.hours or plan.size.hours
            )
        except Interrupted as error:
            print(f"interrupted: {error}", file=sys.stderr)
            return EXIT_INTERRUPTED
        for outcome in outcomes:
            if outcome.state in ("failed", "waits"):
                print(f"{outcome.state}: {outcome.cell}: {outcome.reason}", file=sys.stderr)
        print(", ".join(f"{number} {state}" for state, number in counts(outcomes).items()) or "nothing to do")
    from study.real.page import write_pages

    write_pages(plan, everything, args.docs)
    print(args.docs / "real.md")
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
