"""Write ``report.html`` of finished runs again from their ``report.json``: ``python launch/report.py RUN...``"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from esi_ds.artifacts import write_text_atomic  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs = parser.parse_args(argv).runs
    for run in runs:
        if not (run / "report.json").is_file():
            print(f"error: RUN = {run}: holds no report.json; give the folder of a finished run", file=sys.stderr)
            return 2
    from esi_ds.report.html import render

    for run in runs:
        write_text_atomic(run / "report.html", render(json.loads((run / "report.json").read_text())))
        print(run / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
