"""Measure attack success, over-refusal and skill of models: ``python -m esi_ds.launch.eval --help``."""

from esi_ds.cli import leave, main

if __name__ == "__main__":
    leave(main("eval"))
