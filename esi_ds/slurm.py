"""``esi-ds slurm copy [DIR]``: the batch scripts, into the folder that jobs are submitted from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esi_ds import shipped
from esi_ds.errors import ends_with_message
from esi_ds.terminal import clean_output


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="esi-ds slurm", description="Batch scripts that come with the package.")
    commands = parser.add_subparsers(dest="command", required=True)
    copy = commands.add_parser("copy", help="copy them to DIR/slurm; then edit slurm/env.sh and submit from DIR")
    copy.add_argument("to", metavar="DIR", type=Path, nargs="?", default=Path("."), help="where to (this folder)")
    return parser


@clean_output()
@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    print(*shipped.copy(shipped.folder("slurm"), make_parser().parse_args(argv).to / "slurm"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
