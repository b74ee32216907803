"""A causal guard as a differentiable judge: score J(x, y) and ∂J/∂e_j at the response's tokens (docs/method.md §1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.core.batch import left_pad
from esi_ds.judge.pairs import EncodedPair


@dataclass(frozen=True)
class Judgement:
    """Score (float, higher is safer) and its gradient [J, d] float32 at ``EncodedPair.response_tokens``."""

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
    """How a judge's parameters are reached: whole on every rank already, or sharded and gathered when needed."""

    def gathered(self, parameters: nn.Parameter) -> AbstractContextManager[None]:
        """The parameter is whole inside the block."""

    def release(self) -> None:
        """Free what a forward or backward pass has left gathered."""


class WholeWeights:
    """A judge of which every rank holds a whole copy."""

    def gathered(self, parameters: nn.Parameter) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        pass


class Guard:
    """The frozen guard. ``score`` is a kind of ``verdict_score``; ``weights`` says how its parameters are reached."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, score: str, weights: Weights):
        self.model, self.tokenizer, self.score, self._weights = model, tokenizer, score, weights

    def judge(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> list[Judgement]:
        """Scores and gradients of a batch: one forward and one backward pass of the guard, for any number of pairs.

        Collectives: the gathers of the guard's parameters when it is sharded.
        """
        embedded, columns, scores = self._forward(pairs, device)
        (gradient,) = torch.autograd.grad(scores.sum(), embedded)
        self._weights.release()
        return [
            Judgement(float(score), row[where][pair.response_tokens].float())
            for score, row, where, pair in zip(scores.detach(), gradient, columns, pairs, strict=True)
        ]

    def scores(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> list[float]:
        """Scores alone: one forward pass. Collectives as for ``judge``."""
        with torch.no_grad():
            _, _, scores = self._forward(pairs, device)
        self._weights.release()
        return scores.tolist()

    def _forward(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> tuple[Tensor, list[slice], Tensor]:
        """Embedded batch [B, L, d], a leaf where gradients are wanted; each pair's columns in L; scores [B]."""
        batch = left_pad([pair.text.ids for pair in pairs], self.tokenizer.pad_token_id, device)
        width = batch["input_ids"].shape[1]
        # Looked up by hand: a sharded guard's embedding module must not be called outside of the model's forward.
        with self.embedding_table() as table:
            embedded = F.embedding(batch.pop("input_ids"), table) * self.embedding_scale
        embedded.requires_grad_(torch.is_grad_enabled())
        logits = self.model(inputs_embeds=embedded, **batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        scores = [
            verdict_score(self.score, row, pair.text.safe, pair.text.unsafe)
            for row, pair in zip(logits, pairs, strict=True)
        ]
        columns = [slice(width - len(pair.text.ids), width) for pair in pairs]
        return embedded, columns, torch.stack(scores)

    @property
    def embedding_scale(self) -> float:
        """The factor that the embedding applies to its rows: 1 in most models, not in Gemma 3."""
        return float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))

    @contextmanager
    def embedding_table(self) -> Iterator[Tensor]:
        """The embedding's weight [rows, d], whole. Collectives: one all-gather where the guard is sharded."""
        weight = cast(nn.Parameter, self.model.get_input_embeddings().weight)
        with self._weights.gathered(weight):
            yield weight.detach()
