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

from esi_ds.artifacts import MANIFEST, check_result, read_manifest, renew_result, write_text_atomic
from esi_ds.errors import UserError, ends_with_message
from esi_ds.reading import read_json, reading
from esi_ds.tensor_files import INDEX_NAME, tensor_folders
from esi_ds.terminal import clean_output, help_text

if TYPE_CHECKING:
    from esi_ds.report.contents import Overlap


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
    """Write every run's page, and the page of several runs. Raises UserError."""
    runs, left_out = split_finished(arguments.runs)
    for run in [*runs, *arguments.tuned, *arguments.evaluated]:
        if not (run / "report.json").is_file():
            raise UserError("RUN", str(run), "holds no report.json", "give the folder of a finished run")
    for run in left_out:
        print(f"left out: {run} has not finished", file=sys.stderr)
    from esi_ds.report.html import render

    for run in runs:
        tuned, evaluated = (
            [(os.path.relpath(other / "report.html", run), read(other)) for other in others]
            for others in (arguments.tuned, arguments.evaluated)
        )
        with reading("RUN", run / "report.json", REMEDY, "is not a report of this version"):
            page = render(read(run), tuned, evaluated)
        write_text_atomic(run / "report.html", page)
        renew_result(run, "report.html", "RUN", REMEDY)
        print(run / "report.html")
    if arguments.output or (len(runs) > 1 and not (arguments.tuned or arguments.evaluated)):
        folders = list(dict.fromkeys(run.absolute() for run in runs))
        print(write_overview(folders, arguments.output, [str(run) for run in left_out]))


def split_finished(runs: list[Path]) -> tuple[list[Path], list[Path]]:
    """(runs to show, runs that were begun and have not finished); all are to be shown where none has finished.

    What is no run, or has finished and lost its report, is to be shown: it is an error there.
    """
    left_out = [
        run
        for run in runs
        if (run / "config.yaml").is_file() and not any((run / name).is_file() for name in ("report.json", MANIFEST))
    ]
    return ([run for run in runs if run not in left_out], left_out) if len(left_out) < len(runs) else (runs, [])


def write_overview(folders: list[Path], output: Path | None, left_out: Sequence[str] = ()) -> Path:
    """Write the page of several runs, with links to the page of each. left_out: runs that have not finished."""
    from esi_ds.report.html import render_overview
    from esi_ds.report.overview import FinishedRun

    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    output = (output or shared / "overview.html").absolute()
    runs = []
    for folder in folders:
        manifest = read_manifest(folder, "RUN")
        link = Path(os.path.relpath(folder / "report.html", output.parent)).as_posix()
        runs.append(FinishedRun(folder.relative_to(shared).as_posix(), link, read(folder), manifest))
    shared_weights = overlaps({run.name: folder for run, folder in zip(runs, folders, strict=True)})
    with reading("RUN", shared, REMEDY, "holds a report that is not of this version"):
        page = render_overview(runs, shared_weights, left_out)
    write_text_atomic(output, page)
    return output


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
