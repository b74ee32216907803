"""Score weights by their Expected Safety Impact, and select: ``python -m esi_ds.launch.esi --help``."""

from esi_ds.cli import leave, main

if __name__ == "__main__":
    leave(main("esi"))
