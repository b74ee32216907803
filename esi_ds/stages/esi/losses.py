"""The rows of objectives that are losses: read and checked before any weight is loaded (docs/method.md §2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esi_ds.config import Config
from esi_ds.core.criteria import objectives
from esi_ds.data.conversations import TuningSet
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.stages.tune.prepare import load_training_tokenizer, read_tuning_set


@dataclass(frozen=True)
class LossRows:
    """The rows of ``data.<name>``, as the model reads them. pad: id of the padding token."""

    name: str
    path: str
    rows: TuningSet
    pad: int

    def describe(self) -> str:
        """One line for the log."""
        return f"data.{self.name}: {len(self.rows.sequences)} rows of columns {self.rows.columns} from {self.path}"

    @property
    def source(self) -> dict[str, Any]:
        """Path, hash and columns, for the manifest."""
        return {
            self.name: self.path,
            f"{self.name}_sha256": self.rows.sha256,
            f"{self.name}_columns": self.rows.columns,
        }


def prepare_losses(config: Config) -> list[LossRows]:
    """Rows of every loss that a criterion needs, in the order of its passes. Raises UserError. Reads only."""
    names = [name for name in objectives(config.select.criteria, config.select.contrastive) if name != "safety"]
    if not names:
        return []
    model_config = load_model_config(ModelSource.of(config.model))
    tokenizer = load_training_tokenizer(config.model)
    losses = []
    for name in names:
        section = getattr(config.data, name)
        rows = read_tuning_set(
            config, section, f"data.{name}", tokenizer, model_config, section.max_length, section.limit
        )
        losses.append(LossRows(name, section.path, rows, tokenizer.pad_token_id))
    return losses
