"""``model.dtype: auto``: one type for all ranks, kept for the restarts of a run (docs/design.md §5)."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from esi_ds.config import Config, Model, begun_config
from esi_ds.errors import UserError
from esi_ds.models.native import computes_bf16
from esi_ds.zero import runtime

FIELD = "model.dtype"


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
    begun = begun_model(config)
    if begun is not None:
        dtype, reason = begun.dtype, f"as the run in {config.run.output_dir} began"
    else:
        dtype = "bf16" if computes_bf16() else "fp32"
        reason = f"this machine {'computes' if dtype == 'bf16' else 'does not compute'} bf16 natively"
    if dry_run:
        reason += "; for other machines, name the type"
    print(f"model.dtype: auto is {dtype} ({reason})", flush=True)
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def begun_model(config: Config) -> Model | None:
    """``model`` of the run that began in the config's folder; None where there is none, or none that can be read:
    whoever opens the folder says so."""
    with suppress(UserError, OSError):
        begun = begun_config(Path(config.run.output_dir))
        return None if begun is None else begun.model
    return None


def check_same_dtype(config: Config) -> None:
    """Raise UserError, on every rank, where ranks have chosen other types: hosts are unlike. One gather."""
    chosen = runtime.gather_objects((config.model.dtype, socket.gethostname()))
    first, host = chosen[0]
    for dtype, other in chosen:
        if dtype != first:
            problem = f"is {first} on {host} and {dtype} on {other}"
            raise UserError(FIELD, "auto", problem, "name the type for all ranks to compute in")
