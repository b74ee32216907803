"""``python -m esi_ds COMMAND ...``."""

import sys

from esi_ds.command import main

if __name__ == "__main__":
    sys.exit(main())
