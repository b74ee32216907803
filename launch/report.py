"""Pages of finished runs from their ``report.json``: see ``--help`` and docs/outputs.md."""

import sys
from pathlib import Path

# The package beside this script, not some other copy that happens to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from esi_ds.launch.report import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
