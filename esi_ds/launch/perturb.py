"""Add noise to the weights of a mask and measure what becomes of safety: ``python -m esi_ds.launch.perturb --help``."""

from esi_ds.cli import leave, main

if __name__ == "__main__":
    leave(main("perturb"))
