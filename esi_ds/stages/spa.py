"""SPA: train everything but the mask's weights."""

from __future__ import annotations

from esi_ds.cli import Options
from esi_ds.config import Config
from esi_ds.stages.tune import run_tuning


def run(config: Config, options: Options) -> None:
    run_tuning(config, options, "spa")
