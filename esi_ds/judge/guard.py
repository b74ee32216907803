"""A causal guard as a differentiable judge: score J(x, y) and ∂J/∂e_j at the response's tokens (docs/method.md §1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from esi_ds.core.batch import left_pad
from esi_ds.errors import UserError
from esi_ds.judge.families import EncodedJudgement, Family, TextBuilder, encode_judgement


@dataclass(frozen=True)
class GuardInput:
    """One (prompt, response) pair as the guard reads it.

    response_tokens: positions in ``encoded.ids`` of the tokens that overlap the response; spans: their character
    ranges in the response as it was given; shown: the range of it that the guard's text holds.
    """

    encoded: EncodedJudgement
    response_tokens: list[int]
    spans: list[tuple[int, int]]
    shown: tuple[int, int]


@dataclass(frozen=True)
class Judgement:
    """Score (float, higher is safer) and its gradient [J, d] float32 at ``GuardInput.response_tokens``."""

    score: float
    gradient: Tensor


def verdict_score(kind: str, logits: Tensor, safe: Sequence[int], unsafe: Sequence[int]) -> Tensor:
    """Scalar score of float32 ``logits`` [V] at the verdict's position; several words of a verdict count together.

    ``margin`` log P(safe) − log P(unsafe); ``logit`` of safe; ``logprob`` log P(safe); ``prob`` P(safe).
    """
    safe_logit = logits[list(safe)].logsumexp(0)
    if kind == "margin":
        return safe_logit - logits[list(unsafe)].logsumexp(0)
    if kind == "logit":
        return safe_logit
    log_probability = safe_logit - logits.logsumexp(0)
    return log_probability if kind == "logprob" else log_probability.exp()


class Weights(Protocol):
    """How a model's parameters are reached: whole already, or made whole for the time of a block."""

    def gathered(self, parameters: nn.Parameter) -> AbstractContextManager[None]: ...

    def release(self) -> None: ...


class WholeWeights:
    """A model that lies whole on every rank."""

    def gathered(self, parameters: nn.Parameter) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        pass


class Guard:
    """The frozen guard; ``weights`` says how its parameters are reached."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, score: str, weights: Weights):
        self.model, self.tokenizer, self.score, self._weights = model, tokenizer, score, weights

    def judge(self, inputs: Sequence[GuardInput], device) -> list[Judgement]:
        """Scores and gradients of a batch; one forward and one backward pass of the guard, whatever the batch.

        Collectives: the guard's own parameter gathers when it is sharded.
        """
        embedded, rows, scores = self._forward(inputs, device)
        (gradient,) = torch.autograd.grad(scores.sum(), embedded)
        self._weights.release()
        return [
            Judgement(float(score), row[where][entry.response_tokens].float())
            for score, row, where, entry in zip(scores.detach(), gradient, rows, inputs, strict=True)
        ]

    def scores(self, inputs: Sequence[GuardInput], device) -> list[float]:
        """Scores alone: one forward pass. Collectives as ``judge``."""
        with torch.no_grad():
            _, _, scores = self._forward(inputs, device)
        self._weights.release()
        return scores.tolist()

    def _forward(self, inputs: Sequence[GuardInput], device) -> tuple[Tensor, list[slice], Tensor]:
        """Embedded batch [B, L, d], a leaf where gradients are wanted; where in L each row's ids lie; scores [B]."""
        batch = left_pad([row.encoded.ids for row in inputs], self.tokenizer.pad_token_id, device)
        width = batch["input_ids"].shape[1]
        # Looked up by hand: a sharded guard's embedding module must not be called outside of the model's own forward.
        with self.embedding_table() as table:
            embedded = F.embedding(batch.pop("input_ids"), table) * self.embedding_scale
        embedded.requires_grad_(torch.is_grad_enabled())
        logits = self.model(inputs_embeds=embedded, **batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        pairs = zip(logits, inputs, strict=True)
        scores = [verdict_score(self.score, row, entry.encoded.safe, entry.encoded.unsafe) for row, entry in pairs]
        rows = [slice(width - len(entry.encoded.ids), width) for entry in inputs]
        return embedded, rows, torch.stack(scores)

    @property
    def embedding_scale(self) -> float:
        """What the embedding multiplies its rows by (Gemma 3's does), 1 for most."""
        return float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))

    @contextmanager
    def embedding_table(self) -> Iterator[Tensor]:
        """The embedding's weight [rows, d], whole. Collectives: one all-gather where the guard is sharded."""
        weight = self.model.get_input_embeddings().weight
        with self._weights.gathered(weight):
            yield weight.detach()


def encode_pair(
    texts: TextBuilder,
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    max_length: int | None,
) -> GuardInput | str:
    """A pair as guard input, or the reason why it cannot be judged."""
    built = texts.build(prompt, response)
    if built is None:
        return "the judge's template does not show the response"
    encoded = encode_judgement(tokenizer, built.text, family)
    if max_length is not None and len(encoded.ids) > max_length:
        return f"too long for the judge ({len(encoded.ids)} tokens, it takes {max_length})"
    tokens = [
        j for j, (start, end) in enumerate(encoded.offsets) if start < built.end and end > max(built.start, start)
    ]
    shift = built.response_offset - built.start
    spans = [(encoded.offsets[j][0] + shift, encoded.offsets[j][1] + shift) for j in tokens]
    shown = (built.response_offset, built.response_offset + built.end - built.start)
    return GuardInput(encoded, tokens, spans, shown) if tokens else "the judge sees no token of the response"


def check_verdict(texts: TextBuilder, family: Family, tokenizer: PreTrainedTokenizerBase, field: str = "judge") -> None:
    """One clear message, before any weight is loaded, where the verdict's words cannot be told apart."""
    built = texts.build("Hello", "Hello")
    if built is None:
        raise UserError(
            f"{field}.template" if family.template else f"{field}.path",
            tokenizer.name_or_path,
            "does not show the response in the guard's text",
            "put {response} into the template",
        )
    try:
        encode_judgement(tokenizer, built.text, family)
    except ValueError as error:
        raise UserError(
            f"{field}.verdict",
            f"{family.safe} / {family.unsafe}",
            str(error),
            "choose words that begin with different tokens of the guard",
        ) from error
