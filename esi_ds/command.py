"""``esi-ds COMMAND ...``: every command of the package under one name, also as ``python -m esi_ds``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from esi_ds import __version__
from esi_ds.options import STAGES
from esi_ds.terminal import clean_output

TOOLS = {  # command → (module, what it does)
    "report": ("esi_ds.launch.report", "rewrite the pages of finished runs, and compare several on one page"),
    "status": ("esi_ds.status", "show how far runs have come"),
    "mask": ("esi_ds.mask", "describe, check or compare masks, or make one from the same scores"),
    "patch": ("esi_ds.patch", "create, apply, revert or describe a patch of a tuned model"),
    "ask": ("esi_ds.ask", "ask an OpenAI-compatible server and write a file of its answers"),
    "doctor": ("esi_ds.doctor", "show what this machine has, what it lacks, and how to fix it"),
    "recipes": ("esi_ds.recipes", "list, show or copy the recipes (configs) that come with the package"),
    "slurm": ("esi_ds.slurm", "copy the batch scripts that come with the package"),
}


def usage() -> str:
    """What ``esi-ds --help`` prints."""
    about = {**STAGES, **{command: text for command, (_, text) in TOOLS.items()}}
    lines = [f"  {command:9}{text}" for command, text in about.items()]
    return "\n".join(
        [
            "usage: esi-ds COMMAND ...   (esi-ds COMMAND --help says more; esi-ds --version)",
            "",
            *lines,
            "",
            "The first five are stages; esi-ds runs them on one rank. For several ranks:",
            "  deepspeed --module esi_ds.launch.esi --config FILE",
        ]
    )


@clean_output()
def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 for an unknown one."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    command, arguments = words[0], words[1:]
    if command == "--version":
        print(__version__)
        return 0
    if command in STAGES:
        from esi_ds.cli import leave, main

        leave(main(command, arguments))
    if command in TOOLS:
        return importlib.import_module(TOOLS[command][0]).main(arguments)
    print(f"error: {command} is not a command; give one of {', '.join([*STAGES, *TOOLS])}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
