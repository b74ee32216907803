"""The run folder before the run: what every stage refuses without loading anything heavy."""

from __future__ import annotations

from typing import Any

from esi_ds import launch_environment
from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.deepspeed_config import resolve_deepspeed


def open_folder(config: Config, stage: str, source: dict[str, Any], field: str) -> RunFolder:
    """The run's folder; what a stage's run refuses is refused here, before anything heavy is loaded. Raises UserError.

    field: the config section to name where ``source`` is not what an interrupted run of this folder read.
    """
    folder = RunFolder(config.run.output_dir)
    folder.check(config)
    resolve_deepspeed(config, launch_environment.read().world_size, stage)
    folder.check_same("data_hashes", source, field)
    return folder
