"""Safety Preserving Adaptation: train all scored weights but those of a mask. See ``--help`` and docs/running.md."""

import sys
from pathlib import Path

# The package beside this script, not some other copy that happens to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from esi_ds.cli import leave, main  # noqa: E402

if __name__ == "__main__":
    leave(main("spa"))
