"""``esi-ds recipes list|show|copy``: the experiments that come with the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esi_ds import shipped
from esi_ds.errors import ends_with_message
from esi_ds.terminal import clean_output

DESCRIPTION = "Recipes are configs that come with the package. --config takes their names."


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="esi-ds recipes", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the names and what each runs (the default)")
    show = commands.add_parser("show", help="print a recipe")
    copy = commands.add_parser("copy", help="copy a recipe, or all of them, for you to change")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--field", default="NAME", help="how messages refer to NAME, for scripts (default: NAME)")
    copy.add_argument("name", metavar="NAME", nargs="?", help="a recipe's name (all, each in its folder)")
    copy.add_argument("--to", metavar="DIR", type=Path, default=Path("."), help="where to (this folder)")
    return parser


def summary(file: Path) -> str:
    """What a recipe's first comment says."""
    line = file.read_text().split("\n", 1)[0]
    return line.removeprefix("#").strip()


def run(arguments: argparse.Namespace) -> list[str]:
    """A command's output. Raises UserError."""
    if arguments.command == "show":
        return [shipped.recipe(arguments.name, arguments.field).read_text().rstrip("\n")]
    if arguments.command == "copy":
        if arguments.name is None:
            return [str(file) for file in shipped.copy(shipped.folder("configs"), arguments.to / "configs")]
        source = shipped.recipe(arguments.name, "NAME")
        return [str(file) for file in shipped.copy(source, arguments.to / source.name)]
    names = shipped.recipes()
    width = max(map(len, names))
    return [f"{name:{width}}  {summary(file)}" for name, file in names.items()]


@clean_output()
@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    print("\n".join(run(make_parser().parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
