"""Rows that a model learns, or whose loss it has: read, tokenized and padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.config import Config, Model, Rows
from esi_ds.core.batch import right_pad
from esi_ds.data.chat import check_vocabulary, load_chat_tokenizer, special_strings, with_template
from esi_ds.data.conversations import IGNORED, TokenSequence, TuningSet, encode_rows, find_columns
from esi_ds.data.end_tokens import end_tokens, template_end
from esi_ds.data.rows import read_rows
from esi_ds.data.thoughts import marks_with
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource, max_positions


def load_training_tokenizer(model: Model, model_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that learns rows. Raises UserError if it has no chat template, no end token, or tokens
    that the model does not have."""
    source = ModelSource.of(model)
    tokenizer = load_chat_tokenizer(source, model)
    check_vocabulary(tokenizer, model_config, source)
    if tokenizer.eos_token_id is None:
        raise UserError("model.path", model.path, "has a tokenizer without an end token", "set its eos_token")
    return tokenizer


def read_tuning_set(
    config: Config,
    section: Rows,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    max_length: int,
    limit: int | None = None,
) -> TuningSet:
    """Rows of one section as the model reads them.

    field: the section's key in the config. max_length: tokens of a row; longer rows are cut. limit: rows read.
    Raises UserError naming ``field`` if no row can be learnt.
    """
    rows = read_rows(section.path, f"{field}.path", name=section.name, split=section.split)[:limit]
    columns = find_columns(rows, section.columns, f"{field}.columns")
    positions, system_prompt = max_positions(model_config), config.model.system_prompt
    writer = with_template(tokenizer, section.chat_template, config.model, f"{field}.chat_template")
    tuning_set = encode_rows(
        rows,
        columns,
        writer,
        system_prompt=system_prompt,
        specials=special_strings(tokenizer, writer),
        end_ids=end_tokens(ModelSource.of(config.model), writer),
        max_length=min(max_length, positions or max_length),
        marks=marks_with(config.model.thought_marks),
        learn=section.learn,
        end_token=section.end_token,
    )
    if not tuning_set.sequences:
        reasons = "; ".join(sorted({reason for _, reason in tuning_set.skipped}))
        raise UserError(f"{field}.path", section.path, f"has no row that can be learnt ({reasons})", "look at its rows")
    return tuning_set


def check_ends(config: Config, section: Rows, field: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError naming ``field`` where the rows' own chat template would teach to end an answer with a token at
    which no answer of the model stops."""
    source = ModelSource.of(config.model)
    end = template_end(with_template(tokenizer, section.chat_template, config.model, f"{field}.chat_template"))
    if end is not None and end not in end_tokens(source, tokenizer):
        shown = tokenizer.convert_ids_to_tokens(end)
        problem = (
            f"ends an answer with {shown}, which is not an end token of the model: its answers would not stop there"
        )
        remedy = f"add {end} to eos_token_id in the model's generation_config.json, or set model.chat_template too"
        raise UserError(f"{field}.chat_template", section.chat_template, problem, remedy)


def padded(sequences: Sequence[TokenSequence], pad: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs, int64 [B, L], and the labels, int64 [B, K], of its last K logits.

    No logit before those has a label. Rows are padded on the right.
    """
    width = max(len(sequence.ids) for sequence in sequences)
    batch = right_pad([sequence.ids for sequence in sequences], pad, device)
    labels = torch.full((len(sequences), width), IGNORED, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        # The logits at a position predict the next one.
        labels[row, : len(sequence.ids) - 1] = torch.tensor(sequence.labels[1:], dtype=torch.int64)
    learnt = (labels != IGNORED).any(0).nonzero()
    first = int(learnt[0]) if len(learnt) else width - 1
    return batch, labels[:, first:].to(device)
