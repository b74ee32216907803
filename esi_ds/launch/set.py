"""SET: tune only the weights of a mask: ``python -m esi_ds.launch.set --help``."""

from esi_ds.cli import leave, main

if __name__ == "__main__":
    leave(main("set"))
