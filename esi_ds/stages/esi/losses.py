"""The rows of objectives that are losses: read and checked before any weight is loaded (docs/method.md §2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esi_ds.config import Config, LossData
from esi_ds.data.conversations import TuningSet
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.stages.learnt_rows import load_training_tokenizer, read_tuning_set
from esi_ds.words import counted


@dataclass(frozen=True)
class LossRows:
    """The rows of an objective, as the model reads them. field: of the config. pad: id of the padding token."""

    name: str
    field: str
    path: str
    rows: TuningSet
    pad: int

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.field}: {counted(len(self.rows.sequences), 'row')} of columns {self.rows.columns} from {self.path}"
        )

    @property
    def source(self) -> dict[str, Any]:
        """Path, hash and columns, for the manifest."""
        return {
            self.name: self.path,
            f"{self.name}_sha256": self.rows.sha256,
            f"{self.name}_columns": self.rows.columns,
        }


def prepare_losses(config: Config) -> list[LossRows]:
    """Rows of every loss that a pass is made over, in the order of the passes. Raises UserError. Reads only."""
    sections = loss_sections(config)
    if not sections:
        return []
    model_config = load_model_config(ModelSource.of(config.model))
    tokenizer = load_training_tokenizer(config.model, model_config)
    losses = []
    for name, (field, section) in sections.items():
        rows = read_tuning_set(config, section, field, tokenizer, model_config, section.max_length, section.limit)
        losses.append(LossRows(name, field, section.path, rows, tokenizer.pad_token_id))
    return losses


def loss_sections(config: Config) -> dict[str, tuple[str, LossData]]:
    """objective → (key, section) of the config, for every objective that is a loss, in the order of their passes."""
    control = config.control.rows if config.control is not None else None
    sections = {
        "control": ("control.rows", control),
        "tuning": ("data.tuning", config.data.tuning),
        "benign": ("data.benign", config.data.benign),
    }
    return {
        name: (sections[name][0], section)
        for name in config.objectives
        if name in sections and (section := sections[name][1]) is not None
    }
