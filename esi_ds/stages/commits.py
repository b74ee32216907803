"""Models on the hub of a run that goes on: of the commits that it began with, though their branches may have moved."""

from __future__ import annotations

from contextlib import suppress

from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.errors import UserError
from esi_ds.models import hub


def keep_commits(config: Config) -> None:
    """Pin the hub models of the run in ``run.output_dir`` to the commits it started with."""
    commits: dict[str, str] = {}
    with suppress(UserError, OSError):  # whoever opens the folder says so
        commits = RunFolder(config.run.output_dir).commits()
    hub.keep(commits)
