"""The run folder before the run: checks that every stage makes before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from esi_ds import launch_environment
from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.deepspeed_config import resolve_deepspeed


def open_folder(
    config: Config, stage: str, source: dict[str, Any], field: str, unread: Collection[str] = ()
) -> RunFolder:
    """The run's folder, if this config may run in it. Raises UserError, also for an invalid DeepSpeed config.

    source: paths and hashes of the data. field: the config section to name where an interrupted run in this folder
    read other data. unread: keys of the run's source that are not known yet, and compared later.
    """
    folder = RunFolder(config.run.output_dir)
    folder.check(config)
    folder.check_stage(stage)
    resolve_deepspeed(config, launch_environment.read().world_size, stage)
    folder.check_same("data_hashes", source, field, unread)
    return folder
