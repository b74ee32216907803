"""Write ``report.html`` of finished runs again from their ``report.json``: ``python launch/report.py RUN...``

``--tuned RUN...`` and ``--evaluated RUN...`` show these tuning runs and evaluations on the pages of ESI runs.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from esi_ds.artifacts import write_text_atomic  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--tuned", nargs="*", type=Path, metavar="RUN", default=[], help="SET and SPA runs to show")
    parser.add_argument("--evaluated", nargs="*", type=Path, metavar="RUN", default=[], help="evaluations to show")
    arguments = parser.parse_args(argv)
    for run in [*arguments.runs, *arguments.tuned, *arguments.evaluated]:
        if not (run / "report.json").is_file():
            print(f"error: RUN = {run}: holds no report.json; give the folder of a finished run", file=sys.stderr)
            return 2
    from esi_ds.report.html import render

    def read(run: Path) -> dict:
        return json.loads((run / "report.json").read_text())

    for run in arguments.runs:
        tuned, evaluated = (
            [(os.path.relpath(other / "report.html", run), read(other)) for other in others]
            for others in (arguments.tuned, arguments.evaluated)
        )
        write_text_atomic(run / "report.html", render(read(run), tuned, evaluated))
        print(run / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
