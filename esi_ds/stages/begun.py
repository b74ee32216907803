"""What a run that goes on keeps of its start (docs/design.md §5): its models' commits on the hub, though their branches
may have moved, and what ``model.dtype: auto`` and ``model.date: auto`` were. Both are the same on all ranks.

Chat templates of gpt-oss and Llama 3 write today's date into the system turn: on another day a run that goes on would
ask its model other prompts than it began with.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

from esi_ds.artifacts import RunFolder
from esi_ds.config import Config, Model, begun_config
from esi_ds.errors import Interrupted, UserError
from esi_ds.models import hub
from esi_ds.models.native import computes_bf16
from esi_ds.zero import runtime


def keep_commits(config: Config) -> None:
    """Pin the hub models of the run in ``run.output_dir`` to the commits it started with."""
    commits: dict[str, str] = {}
    with suppress(UserError, OSError):  # whoever opens the folder says so
        commits = RunFolder(config.run.output_dir).commits()
    hub.keep(commits)


def with_dtype(config: Config, dry_run: bool = False) -> Config:
    """The config with ``model.dtype`` named: where it is auto, as the run in ``run.output_dir`` began, or as this
    machine computes. Prints what was chosen, and a warning for bf16 on a CPU that emulates it."""
    if config.model.dtype != "auto":
        if config.model.dtype == "bf16" and not dry_run and not computes_bf16():
            print(
                "warning: model.dtype = bf16: this machine emulates bf16, which is many times slower than fp32; "
                "model.dtype: auto takes fp32 here",
                flush=True,
            )
        return config
    begun = _begun_model(config)
    if begun is not None:
        dtype, reason = begun.dtype, f"as the run in {config.run.output_dir} began"
    else:
        dtype = "bf16" if computes_bf16() else "fp32"
        reason = f"this machine {'computes' if dtype == 'bf16' else 'does not compute'} bf16 natively"
    if dry_run:
        reason += "; for other machines, name the type"
    print(f"model.dtype: auto is {dtype} ({reason})", flush=True)
    return _with(config, dtype=dtype)


def with_date(config: Config) -> Config:
    """The config with ``model.date`` named: where it is auto, the day on which the run in ``run.output_dir`` began, or
    today. A run of an earlier version, which named none, goes on with the machine's clock."""
    if config.model.date != "auto":
        return config
    begun = _begun_model(config)
    return _with(config, date=date.today().isoformat() if begun is None else begun.date)


def _with(config: Config, **values: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def _begun_model(config: Config) -> Model | None:
    """``model`` of the run that began in the config's folder; None where there is none, or none that can be read:
    whoever opens the folder says so."""
    with suppress(UserError, OSError):
        begun = begun_config(Path(config.run.output_dir))
        return None if begun is None else begun.model
    return None


def check_same_on_all_ranks(config: Config) -> None:
    """Raise UserError, on every rank, if ranks have chosen different types, because their hosts differ, or different
    days, because their time zones differ; Interrupted if midnight has passed between them. One gather."""
    remedies = {
        "dtype": "name the type for all ranks to compute in",
        "date": "name the day for chat templates to write",
    }
    local = {key: getattr(config.model, key) for key in remedies}
    (first, zone, host), *others = runtime.gather_objects((local, time.localtime().tm_gmtoff, socket.gethostname()))
    for chosen, other_zone, other in others:
        for key, remedy in remedies.items():
            if chosen[key] != first[key]:
                if key == "date" and zone == other_zone:
                    raise Interrupted("midnight passed while the ranks started; start again, on one day")
                problem = f"is {first[key]} on {host} and {chosen[key]} on {other}"
                raise UserError(f"model.{key}", "auto", problem, remedy)
