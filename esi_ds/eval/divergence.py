"""How far a model has moved from its base on benign prompts: KL(base ‖ model) per token of the base's own answers.

Every answer is read alone, so that no number depends on a batch or on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from esi_ds.core.batch import right_pad
from esi_ds.data.chat import break_up, encode_response, special_strings
from esi_ds.data.thoughts import Marks, continuation, mark_strings, prompt_end
from esi_ds.models.rows import last_logits


class EncodedAnswer(NamedTuple):
    """Ids of a prompt in the chat template, and of the answer behind it."""

    prompt: list[int]
    answer: list[int]

    @property
    def num_read(self) -> int:
        """Tokens that a model reads to predict all of the answer's."""
        return len(self.prompt) + len(self.answer) - 1


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Sequence[int], str]], marks: Marks
) -> list[EncodedAnswer]:
    """Responses as the model wrote them, thoughts and their marks included; other special-token strings are broken up.

    pairs: ids of a prompt in the chat template, and the response to it, with or without the mark that the prompt ends
    with.
    """
    specials = special_strings(tokenizer)
    kept = mark_strings(specials, marks)
    outside = [special for special in specials if special not in kept]
    answers = []
    for prompt, response in pairs:
        text = break_up(continuation(response, prompt_end(tokenizer, prompt), marks), outside)[0]
        answers.append(EncodedAnswer(list(prompt), encode_response(tokenizer, prompt, text).ids))
    return answers


@torch.no_grad()
def answer_logits(model: nn.Module, encoded: EncodedAnswer, device: torch.device) -> Tensor:
    """Logits [T, V] that predict the answer's T tokens, in the model's dtype. Collectives: those of a forward pass."""
    batch = right_pad([[*encoded.prompt, *encoded.answer[:-1]]], 0, device)
    return last_logits(model, batch, len(encoded.answer))[0]
