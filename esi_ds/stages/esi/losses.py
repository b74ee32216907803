"""The rows of the objectives that are losses: read and refused before a weight is loaded (docs/method.md §2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esi_ds.config import Config
from esi_ds.core.criteria import objectives
from esi_ds.data.chat import check_chat_template, load_tokenizer
from esi_ds.data.conversations import TuningSet
from esi_ds.errors import UserError
from esi_ds.models.folder import load_model_config
from esi_ds.stages.tune.prepare import read_tuning_set


@dataclass(frozen=True)
class LossRows:
    """The rows of ``data.<name>``, as the model reads them. pad: token that fills batches up."""

    name: str
    path: str
    rows: TuningSet
    pad: int

    def describe(self) -> str:
        return f"data.{self.name}: {len(self.rows.sequences)} rows of columns {self.rows.columns} from {self.path}"

    @property
    def source(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            self.name: self.path,
            f"{self.name}_sha256": self.rows.sha256,
            f"{self.name}_columns": self.rows.columns,
        }


def prepare_losses(config: Config) -> list[LossRows]:
    """Rows of every loss that the criterion needs, in the order of its passes. Raises UserError; reads only."""
    names = [name for name in objectives(config.select.criterion, config.select.contrastive) if name != "safety"]
    if not names:
        return []
    model = config.model
    model_config = load_model_config(model.path, "model.path", model.revision, model.trust_remote_code)
    tokenizer = load_tokenizer(
        model.path,
        "model.path",
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        chat_template=model.chat_template,
    )
    check_chat_template(tokenizer, model.system_prompt)
    if tokenizer.eos_token_id is None:
        raise UserError("model.path", model.path, "has a tokenizer without an end token", "set its eos_token")
    found = []
    for name in names:
        section = getattr(config.data, name)
        rows = read_tuning_set(
            config, section, f"data.{name}", tokenizer, model_config, section.max_length, section.limit
        )
        found.append(LossRows(name, section.path, rows, tokenizer.pad_token_id))
    return found
