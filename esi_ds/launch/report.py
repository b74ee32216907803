"""Rewrite the ``report.html`` of finished runs from their ``report.json``.

For two or more runs this also writes a page that shows them side by side: ``overview.html`` in the folder they share.
Of several runs, those that have not finished are left out, and named.
With ``--tuned RUN...`` or ``--evaluated RUN...``, these runs are shown on the pages of the ESI runs instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esi_ds.artifacts import MANIFEST, check_result, may_write, read_manifest, renew_result, write_text_atomic
from esi_ds.errors import UserError, ends_with_message
from esi_ds.reading import read_json, reading
from esi_ds.tensor_files import INDEX_NAME, tensor_folders
from esi_ds.terminal import clean_output, help_text

if TYPE_CHECKING:
    from esi_ds.report.contents import Overlap


OVERVIEW = "overview.html"
REMEDY = "give the folder of a finished run, or finish it again"


def read(run: Path, name: str = "report.json") -> Any:
    """A JSON file of a run: what its stage's report holds (``report/contents.py``).

    Raises UserError for one that is torn, was altered or holds something else.
    """
    check_result(run, name, "RUN", REMEDY)
    return read_json(run / name, dict[str, Any], "RUN", REMEDY)


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
    """Write every run's page, and the page of several runs. Raises UserError before anything is written."""
    runs, left_out = split_finished(without_pages(arguments.runs))
    reports = {run: check_run("RUN", run) for run in runs}
    shown = [("--tuned", arguments.tuned, "tuning"), ("--evaluated", arguments.evaluated, "evaluation")]
    for option, others, kind in shown:
        for other in others:
            check_kind(option, other, check_run(option, other), kind)
    if arguments.tuned or arguments.evaluated:
        for run, report in reports.items():
            check_kind("RUN", run, report, None)
    is_several = len(reports) > 1 and not (arguments.tuned or arguments.evaluated)
    overview = overview_file(list(reports), arguments.output) if arguments.output or is_several else None
    for run in left_out:
        print(f"left out: {run} has not finished", file=sys.stderr)
    from esi_ds.report.html import render

    for run, report in reports.items():
        tuned, evaluated = (
            [(os.path.relpath(other / "report.html", run), read(other)) for other in others] for _, others, _ in shown
        )
        with reading("RUN", run / "report.json", REMEDY, "is not a report of this version"):
            page = render(report, tuned, evaluated)
        write_text_atomic(run / "report.html", page)
        renew_result(run, "report.html", "RUN", REMEDY)
        print(run / "report.html")
    if overview is not None:
        write_overview(list(reports), overview, [str(run) for run in left_out])
        print(overview)


def without_pages(paths: list[Path]) -> list[Path]:
    """The folders, each once; RUNS/* also holds the page of several runs that an earlier call has written."""
    pages = [path for path in paths if path.name == OVERVIEW and path.is_file()]
    if len(pages) == len(paths):
        return paths
    return list({path.resolve(): path for path in reversed(paths) if path not in pages}.values())[::-1]


def split_finished(runs: list[Path]) -> tuple[list[Path], list[Path]]:
    """(runs to show, runs that were begun and have not finished). What is no run is to be shown: it is an error there.

    Raises UserError where none has finished.
    """
    left_out = [run for run in runs if is_unfinished(run)]
    if left_out and len(left_out) == len(runs):
        raise UserError("RUN", str(runs[0]), "has not finished", "give its command again; it continues")
    return [run for run in runs if run not in left_out], left_out


def is_unfinished(run: Path) -> bool:
    """Whether the folder holds a run that was begun and has not finished, by its manifest."""
    if not (run / "config.yaml").is_file():
        return False
    if (run / MANIFEST).is_file():
        return bool(read_manifest(run, "RUN").get("exit_state") != "done")
    return not (run / "report.json").is_file()  # a run that lost its manifest has a report all the same


def check_run(field: str, run: Path) -> Any:
    """The report of a finished run. Raises UserError naming ``field``."""
    if not (run / "report.json").is_file():
        raise UserError(field, str(run), "holds no report.json", "give the folder of a finished run")
    return read(run)


def check_kind(field: str, run: Path, report: Any, kind: str | None) -> None:
    """Raise UserError naming ``field`` for a run of another kind; None: of ESI."""
    names = {None: "an ESI run", "tuning": "a SET or SPA run", "evaluation": "an evaluation"}
    if report.get("kind") != kind:
        problem = f"is {names.get(report.get('kind'), 'a perturbation')}, not {names[kind]}"
        raise UserError(field, str(run), problem, f"give {names[kind]}")


def overview_file(runs: list[Path], output: Path | None) -> Path:
    """Where the page of several runs goes. Raises UserError where no file can be written."""
    file = (output or Path(os.path.commonpath([run.absolute().parent for run in runs])) / OVERVIEW).absolute()
    if file.is_dir():
        raise UserError("--output", str(output or file), "is a folder", "give the name of a file")
    if not file.parent.is_dir() or not may_write(file.parent):
        raise UserError("--output", str(output or file), "is in no folder that can be written to", "give another file")
    return file


def write_overview(folders: list[Path], output: Path, left_out: Sequence[str] = ()) -> None:
    """Write the page of several runs, with links to the page of each. left_out: runs that have not finished."""
    from esi_ds.report.html import render_overview
    from esi_ds.report.overview import FinishedRun

    folders = [folder.absolute() for folder in folders]
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs = []
    for folder in folders:
        manifest = read_manifest(folder, "RUN")
        link = Path(os.path.relpath(folder / "report.html", output.parent)).as_posix()
        runs.append(FinishedRun(folder.relative_to(shared).as_posix(), link, read(folder), manifest))
    shared_weights = overlaps({run.name: folder for run, folder in zip(runs, folders, strict=True)})
    with reading("RUN", shared, REMEDY, "holds a report that is not of this version"):
        page = render_overview(runs, shared_weights, left_out)
    write_text_atomic(output, page)


def mask_folders(name: str, run: Path) -> dict[str, Path]:
    """A run's masks by their names on the page: the run's name, and the criterion's where it has several."""
    folder = run / "mask"
    if not folder.is_dir():
        return {}
    several = [] if (folder / INDEX_NAME).is_file() else tensor_folders(folder)
    if several:  # as ``report.overview.masks`` names them
        return {f"{name}: {one}" if len(several) > 1 else name: folder / one for one in several}
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
    for (first, one), (second, other) in combinations(masks.items(), 2):
        if one.shapes != other.shapes:
            continue
        _, counts = count_units([one, other], alone)
        of_first, of_second, both = counts.sum(0).tolist()
        scored, same_weights = one.header.scored_numel, one.fingerprint == other.fingerprint
        rows.append(overlap((first, second), (of_first, of_second), both, scored, same_weights))
    return rows


if __name__ == "__main__":
    sys.exit(main())
