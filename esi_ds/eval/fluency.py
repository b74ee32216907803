"""How surprising an answer is to a reference model, which tells broken answers from fluent ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.core.batch import cut_by_length, right_pad
from esi_ds.data.chat import break_up, encode_data_prompt, encode_response, special_strings
from esi_ds.data.thought_rows import ThoughtTemplate
from esi_ds.data.thoughts import MARKS, Marks, final_answer
from esi_ds.data.turns import Prompt
from esi_ds.models.rows import alike_up_to, last_logits


def surprises(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str]],
    *,
    system_prompt: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    marks: Marks = MARKS,
) -> list[float | None]:
    """Mean negative log-likelihood of each answer given its prompt, nats per token.

    None for an answer without tokens, for a prompt that the chat template rejects, and for a pair of more than
    ``limit`` tokens, the most that the model takes.

    pairs: prompt and response, whose final answer is read without its thoughts, as of a model that has none: behind an
    empty thought where the chat template of the reference writes one. marks: of thoughts.
    ``model`` is the reference, a causal model in one process, such as the model before tuning or noise. It reads the
    pairs in its chat template. Rounding may depend on ``batch_size``.
    """
    specials = special_strings(tokenizer)
    lead = ThoughtTemplate(tokenizer, marks).before_answer()
    rows = []
    for prompt, response in pairs:
        answer = break_up(final_answer(response, None, marks) or "", specials)[0]
        asked = encode_data_prompt(tokenizer, prompt, specials, system_prompt)
        head, tail = list[int](), list[int]()
        if not isinstance(asked, str):
            head = asked + (encode_response(tokenizer, asked, lead).ids if lead else [])
            tail = encode_response(tokenizer, head, answer).ids
        if limit is not None and len(head) + len(tail) > limit:
            head, tail = [], []
        rows.append((head, tail))
    values: list[float | None] = [None] * len(rows)
    # Rows of like length go together, because padding costs time.
    lengths = {i: len(head) + len(tail) for i, (head, tail) in enumerate(rows) if tail}
    in_order = {i: lengths[i] for i in sorted(lengths, key=lambda i: lengths[i])}
    for indices in cut_by_length(in_order, batch_size, alike_up_to(model.config)):
        for index, value in zip(indices, _batch(model, tokenizer, [rows[i] for i in indices]), strict=True):
            values[index] = value
    return values


@torch.inference_mode()
def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[list[int], list[int]]]
) -> list[float]:
    device = next(model.parameters()).device
    batch = right_pad([head + tail for head, tail in rows], tokenizer.pad_token_id or 0, device)
    # The logits at a token predict the next one; the last ones predict nothing that the answer holds.
    first = min(len(head) for head, _ in rows) - 1
    logits = last_logits(model, batch, batch["input_ids"].shape[1] - first)
    values = []
    for row, (head, tail) in zip(logits, rows, strict=True):
        start = len(head) - 1 - first
        log_probabilities = row[start : start + len(tail)].float().log_softmax(-1)
        targets = torch.tensor(tail, device=device)[:, None]
        values.append(float(-log_probabilities.gather(1, targets).mean()))
    return values
