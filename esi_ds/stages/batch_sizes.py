"""Batch sizes of a run: numbers of the config, or what ``auto`` has chosen once and the manifest keeps.

A restart goes on with what the manifest says, whatever memory is free then: rows that share a batch may round each
other's results differently. A number in the config replaces it, for a run that is out of memory with what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Literal

from esi_ds.config import Config, begun_config
from esi_ds.config.checks import BATCH_SIZES
from esi_ds.core.batch_size import generation_bytes
from esi_ds.models.widths import widths
from esi_ds.zero import runtime
from esi_ds.zero.batching import fitting_rows
from esi_ds.zero.engine import ShardedModel

KEY = "batch_sizes"  # of the manifest: purpose → rows


class BatchSize:
    """Rows that a rank takes at a time for one purpose. chosen: what ``auto`` has chosen so far, by purpose; record:
    writes it down."""

    def __init__(
        self,
        setting: int | Literal["auto"],
        purpose: str,
        chosen: MutableMapping[str, int],
        record: Callable[[], None],
    ):
        self.setting, self.purpose, self._chosen, self._record = setting, purpose, chosen, record

    def resolve(self, fitting: Callable[[], int]) -> int:
        """The number, the same on every rank. Collectives: those of ``fitting``, where ``auto`` has yet to choose."""
        if self.setting != "auto":
            return self.setting
        if self.purpose not in self._chosen:
            self._chosen[self.purpose] = fitting()
            self._record()
        return self._chosen[self.purpose]

    @property
    def note(self) -> str:
        """For the log: what was chosen, and by whom; empty for a number of the config."""
        if self.setting != "auto":
            return ""
        return f"{self._chosen[self.purpose]} at a time on a rank, chosen by auto from the free memory"


class GenerationBatch:
    """Prompts that a rank answers at a time. longest: tokens of the longest prompt of the run."""

    def __init__(self, size: BatchSize, longest: int):
        self.size, self.longest = size, longest

    def rows(self, model: ShardedModel, mode: str, max_new_tokens: int) -> int:
        """To be called inside ``ready_to_generate``: a model that is gathered takes its memory then.

        mode: of ``choose_mode``. Collectives: at most one all-reduce.
        """

        def fitting() -> int:
            sizes = widths(model.module.config)
            row = generation_bytes(sizes, model.weight_bytes, self.longest, max_new_tokens)
            return fitting_rows(row, 0.0 if mode == "gathered" else model.passing_bytes(backward=False))

        return self.size.resolve(fitting)


def changed_batch_sizes(run: Path, config: Config) -> list[str]:
    """A line for each of ``BATCH_SIZES`` that is not the one with which the run in the folder was started before.

    Raises UserError for a ``config.yaml`` that cannot be read.
    """
    begun = begun_config(run)
    if begun is None:
        return []
    before, now = begun.model_dump(), config.model_dump()
    lines = []
    for section, key in (name.split(".") for name in BATCH_SIZES):
        old, new = ((sections[section] or {}).get(key) for sections in (before, now))
        if old != new:
            lines.append(
                f"{section}.{key} is {_shown(new)} from this start on, and was {_shown(old)} before: rows that share "
                "a batch may round each other's results differently"
            )
    return lines


def _shown(setting: int | str | None) -> str:
    return "null" if setting is None else str(setting)


def generation_setting(
    generation_batch_size: int | Literal["auto"] | None, batch_size: int | Literal["auto"]
) -> int | Literal["auto"]:
    """What ``generation_batch_size: null`` means on this device: ``auto`` on GPUs, else ``batch_size``."""
    if generation_batch_size is not None:
        return generation_batch_size
    return "auto" if runtime.device().type != "cpu" else batch_size


def longest_prompt(prompt_ids: Iterable[Sequence[int] | str], limit: int | None) -> int:
    """Tokens of the longest prompt that can be answered; 1 without any. limit: the most tokens that the model reads."""
    lengths = [len(ids) for ids in prompt_ids if not isinstance(ids, str)]
    return max((length for length in lengths if limit is None or length < limit), default=1)
