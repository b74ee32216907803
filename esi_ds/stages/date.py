"""``model.date: auto``: one day for all ranks, kept for the restarts of a run (docs/design.md §5).

Chat templates of gpt-oss and Llama 3 write today's date into the system turn: on another day a run that goes on would
ask its model other prompts than it began with.
"""

from __future__ import annotations

from datetime import date

from esi_ds.config import Config
from esi_ds.errors import UserError
from esi_ds.stages.dtype import begun_model
from esi_ds.zero import runtime

FIELD = "model.date"


def with_date(config: Config) -> Config:
    """The config with ``model.date`` named: where it is auto, the day on which the run in ``run.output_dir`` began, or
    today. A run of an earlier version, which named none, goes on with the machine's clock."""
    if config.model.date != "auto":
        return config
    begun = begun_model(config)
    day = date.today().isoformat() if begun is None else begun.date
    return config.model_copy(update={"model": config.model.model_copy(update={"date": day})})


def check_same_date(config: Config) -> None:
    """Raise UserError, on every rank, where it is another day on other ranks: midnight, or another time zone. One
    gather."""
    days = sorted(set(runtime.gather_objects(config.model.date)))
    if len(days) > 1:
        problem = f"is {days[0]} on one rank and {days[1]} on another"
        raise UserError(FIELD, "auto", problem, "name the day for chat templates to write")
