"""SPA: tune all scored weights but those of a mask: ``python -m esi_ds.launch.spa --help``."""

from esi_ds.cli import leave, main

if __name__ == "__main__":
    leave(main("spa"))
