"""Score a model's weights by their Expected Safety Impact, select, and report: see ``--help`` and the README."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("esi_ds") is None:  # not installed: run from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from esi_ds.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main("esi"))
