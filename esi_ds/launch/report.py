"""Rewrite the ``report.html`` of finished runs from their ``report.json``.

For two or more runs this also writes a page that shows them side by side: ``overview.html`` in the folder they share.
Among several runs, unfinished ones and files beside them are left out and named.
With ``--tuned RUN...`` or ``--evaluated RUN...``, these runs are shown on the pages of the ESI runs instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from esi_ds.artifacts import (
    MANIFEST,
    MAX_NAME,
    check_result,
    may_write,
    read_manifest,
    renew_result,
    without_files,
    write_text_atomic,
)
from esi_ds.errors import UserError, ends_with_message
from esi_ds.reading import read_json, reading
from esi_ds.tensor_files import INDEX_NAME, tensor_folders
from esi_ds.terminal import clean_output, help_text, printable

if TYPE_CHECKING:
    from esi_ds.report.contents import Overlap


REPORT, OVERVIEW = "report.json", "overview.html"
REMEDY = "give the folder of a finished run, or finish it again"


def read(run: Path, field: str = "RUN") -> Any:
    """A run's report (``report/contents.py``).

    Raises UserError naming ``field`` for one that is missing, torn, was altered or holds something else.
    """
    if not os.path.isfile(run / REPORT):
        raise UserError(field, str(run), f"holds no {REPORT}", "give the folder of a finished run")
    check_result(run, REPORT, field, REMEDY)
    return read_json(run / REPORT, dict[str, Any], field, REMEDY)


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="esi-ds report",
        description=help_text(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the page of several runs")
    parser.add_argument("--tuned", nargs="*", type=Path, metavar="RUN", default=[], help="SET and SPA runs to show")
    parser.add_argument("--evaluated", nargs="*", type=Path, metavar="RUN", default=[], help="evaluations to show")
    return parser


@clean_output()
@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    write_pages(make_parser().parse_args(argv))
    return 0


def write_pages(arguments: argparse.Namespace) -> None:
    """Write every run's page, and the page of several runs. Raises UserError; then nothing is written."""
    run_paths, files = without_files(arguments.runs)
    paths = list({os.path.realpath(path): path for path in run_paths}.values())
    runs, left_out = split_finished(paths)
    reports = {run: read(run) for run in runs}
    tuned = reports_of("--tuned", arguments.tuned, "tuning")
    evaluated = reports_of("--evaluated", arguments.evaluated, "evaluation")
    if tuned or evaluated:
        for run, report in reports.items():
            check_kind("RUN", run, report, None)
    pages = {run / "report.html": page_of(run, report, tuned, evaluated) for run, report in reports.items()}
    if arguments.output or (len(reports) > 1 and not (tuned or evaluated)):
        overview = overview_file(runs, arguments.output)
        pages[overview] = overview_of(reports, overview, left_out)
    for file in files:
        print(f"left out: {file} is a file", file=sys.stderr)
    for run in left_out:
        print(f"left out: {run} has not finished", file=sys.stderr)
    for file, page in pages.items():
        write_text_atomic(file, page)
        if file.parent in reports:
            renew_result(file.parent, file.name, "RUN", REMEDY)
        print(file)


Linked = Sequence[tuple[Path, Any]]  # folders of runs, with their reports


def reports_of(option: str, folders: Sequence[Path], kind: str) -> Linked:
    """The runs that an option names. Raises UserError naming the option for a run that has not finished or is of
    another kind."""
    linked = []
    for folder in folders:
        if is_unfinished(folder):
            raise unfinished(option, folder)
        report = read(folder, option)
        check_kind(option, folder, report, kind)
        linked.append((folder, report))
    return linked


def page_of(run: Path, report: Any, tuned: Linked, evaluated: Linked) -> str:
    """A run's page, which shows the other runs, too. Raises UserError."""
    from esi_ds.report.html import render

    others = ([(link(folder / "report.html", run), shown) for folder, shown in linked] for linked in (tuned, evaluated))
    with reading("RUN", run / REPORT, REMEDY, "is not a report of this version"):
        return render(report, *others)


def link(file: Path, folder: Path) -> str:
    """The address of a file on a page in ``folder``."""
    return quote(os.fsencode(Path(os.path.relpath(file, folder)).as_posix()))


def split_finished(runs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(runs to show, runs that were begun and have not finished). A path that is not a run is among those to show,
    which reports the error.

    Raises UserError where none has finished.
    """
    left_out = [run for run in runs if is_unfinished(run)]
    if left_out and len(left_out) == len(runs):
        raise unfinished("RUN", left_out[0])
    return [run for run in runs if run not in left_out], left_out


def unfinished(field: str, run: Path) -> UserError:
    """The error for a run that was to be shown."""
    return UserError(field, str(run), "has not finished", "give its command again; it continues")


def is_unfinished(run: Path) -> bool:
    """Whether the folder holds a run that was begun and has not finished, by its manifest."""
    if not os.path.isfile(run / "config.yaml"):
        return False
    if (run / MANIFEST).is_file():
        return bool(read_manifest(run, "RUN").get("exit_state") != "done")
    return not (run / REPORT).is_file()  # a run that lost its manifest has a report all the same


def check_kind(field: str, run: Path, report: Any, kind: str | None) -> None:
    """Raise UserError naming ``field`` for a run of another kind; None: of ESI."""
    names = {"None": "an ESI run", "tuning": "a SET or SPA run", "evaluation": "an evaluation"}
    asked_for, actual = names[str(kind)], names.get(str(report.get("kind")), "a perturbation")
    if actual != asked_for:
        raise UserError(field, str(run), f"is {actual}, not {asked_for}", f"give {asked_for}")


def overview_file(runs: Sequence[Path], output: Path | None) -> Path:
    """Where the page of several runs goes. Raises UserError where no file can be written, or a run's own would be."""
    file = (output or shared_folder(runs) / OVERVIEW).absolute()
    field, value, remedy = "--output", str(output or file), "give the name of a new file"
    if os.path.isdir(file):
        raise UserError(field, value, "is a folder", remedy)
    is_of_a_run = os.path.realpath(file.parent) in {os.path.realpath(run) for run in runs}
    if is_of_a_run and os.path.lexists(file) and file.name != OVERVIEW:
        raise UserError(field, value, "is a file of a run", remedy)
    if not os.path.isdir(file.parent) or not may_write(file.parent) or len(os.fsencode(file.name)) > MAX_NAME:
        raise UserError(field, value, "is not in a writable folder", remedy)
    return file


def shared_folder(runs: Sequence[Path]) -> Path:
    """The folder that all runs lie in."""
    return Path(os.path.commonpath([run.absolute().parent for run in runs]))


def overview_of(reports: Mapping[Path, Any], output: Path, left_out: Sequence[Path]) -> str:
    """The page of several runs, with links to the page of each. left_out: runs that have not finished."""
    from esi_ds.report.html import render_overview
    from esi_ds.report.overview import FinishedRun

    shared = shared_folder(list(reports))
    names = {folder: printable(Path(os.path.relpath(folder, shared)).as_posix()) for folder in (*reports, *left_out)}
    runs = [
        FinishedRun(names[folder], link(folder / "report.html", output.parent), report, read_manifest(folder, "RUN"))
        for folder, report in reports.items()
    ]
    shared_weights = overlaps({names[folder]: folder for folder in reports})
    with reading("RUN", shared, REMEDY, "holds a report that is not of this version"):
        return render_overview(runs, shared_weights, [names[folder] for folder in left_out])


def mask_folders(name: str, run: Path) -> dict[str, Path]:
    """A run's masks by their names on the page: the run's name, and the criterion's where it has several."""
    folder = run / "mask"
    if not folder.is_dir():
        return {}
    several = [] if (folder / INDEX_NAME).is_file() else tensor_folders(folder)
    if several:  # as ``report.overview.masks`` names them
        return {f"{name}: {mask_name}" if len(several) > 1 else name: folder / mask_name for mask_name in several}
    return {name: folder}


def overlaps(folders: dict[str, Path]) -> list[Overlap]:
    """How many weights any two masks have in common, for models of the same shapes. folders: run folders by name."""
    from esi_ds.mask import count_units, load_sound
    from esi_ds.ranks import Ranks
    from esi_ds.report.tables import overlap

    alone = Ranks()
    paths = {label: path for name, folder in folders.items() for label, path in mask_folders(name, folder).items()}
    masks = {label: load_sound(path, alone) for label, path in paths.items()}
    rows: list[Overlap] = []
    for (first, first_mask), (second, second_mask) in combinations(masks.items(), 2):
        if first_mask.shapes != second_mask.shapes:
            continue
        _, counts = count_units([first_mask, second_mask], alone)
        of_first, of_second, both = counts.sum(0).tolist()
        scored, same_weights = first_mask.header.scored_numel, first_mask.fingerprint == second_mask.fingerprint
        rows.append(overlap((first, second), (of_first, of_second), both, scored, same_weights))
    return rows


if __name__ == "__main__":
    sys.exit(main())
