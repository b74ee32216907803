"""A causal guard as a differentiable judge: score J(x, y) and ∂J/∂e_j at the response's tokens (docs/method.md §1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.core.batch import TokenRows, right_pad
from esi_ds.judge.embeddings import embedding_module, recorded_lookups, token_gradient, token_table
from esi_ds.judge.pairs import EncodedPair, plain_pair
from esi_ds.models.folder import max_positions
from esi_ds.models.rows import (
    alike_up_to,
    beside_note,
    difference_beside,
    end_logits,
    frequencies_note,
    probe_ids,
)


@dataclass(frozen=True)
class Judgement:
    """Score (float, higher is safer) and its gradient [J, d] float32 at ``EncodedPair.response_tokens``."""

    score: float
    gradient: Tensor


def longest_guard_input(config: PretrainedConfig, configured: int | None = None) -> int | None:
    """How many tokens a guard reads at most: the least of its config.json's length and ``configured``; None: no limit.

    Its tokenizer's ``model_max_length`` is none: of causal models it is how long the rows of their training were.
    """
    limits = [limit for limit in (configured, max_positions(config)) if limit]
    return min(limits, default=None)


def verdict_score(
    kind: str,
    logits: Tensor,
    safe: Sequence[int],
    unsafe: Sequence[int],
    between: Sequence[tuple[int, float]] = (),
) -> Tensor:
    """Scalar score of float32 ``logits`` [V] at the verdict's position; several words of a verdict count together.

    ``margin`` log P(safe) − log P(unsafe); ``logit`` of safe; ``logprob`` log P(safe); ``prob`` P(safe).
    between: words of which a share of the probability is unsafe, and the rest safe: with grades from 0 to 1 as shares,
    P(unsafe) / (P(safe) + P(unsafe)) is the expected grade.
    """
    if between:
        tokens = [token for token, _ in between]
        shares = torch.tensor([share for _, share in between], dtype=logits.dtype, device=logits.device)
        safe_logit = torch.cat([logits[list(safe)], logits[tokens] + (1 - shares).log()]).logsumexp(0)
        unsafe_logit = torch.cat([logits[list(unsafe)], logits[tokens] + shares.log()]).logsumexp(0)
    else:
        safe_logit = logits[list(safe)].logsumexp(0)
        unsafe_logit = logits[list(unsafe)].logsumexp(0)
    if kind == "margin":
        return safe_logit - unsafe_logit
    if kind == "logit":
        return safe_logit
    log_probability = safe_logit - logits.logsumexp(0)
    return log_probability if kind == "logprob" else log_probability.exp()


class Weights(Protocol):
    """How a judge's parameters are reached: whole on every rank already, or sharded and gathered when needed."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """The parameters are whole inside the block."""

    def release(self) -> None:
        """Free what a forward or backward pass has left gathered."""

    def close(self) -> None:
        """Free the parameters themselves, where dropping the last reference would not."""


class WholeWeights:
    """A judge of which every rank holds a whole copy."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class Guard:
    """The frozen guard. ``score`` is a kind of ``verdict_score``; ``weights`` says how its parameters are reached.

    max_batch: pairs that may be judged together at most; None: any number.
    """

    max_batch: int | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, score: str, weights: Weights):
        self.model, self.tokenizer, self.score, self._weights = model, tokenizer, score, weights

    def judge(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> list[Judgement]:
        """Scores and gradients of a batch: one forward and one backward pass of the guard, for any number of pairs.

        Collectives: the gathers of the guard's parameters when it is sharded. Raises UserError where the guard has no
        gradient per token (``token_gradient``).
        """
        batch = self._batch(pairs, device)
        with recorded_lookups(self.model, batch) as lookups:
            scores = self._scores(pairs, batch)
        gradient = token_gradient(self.model, scores.sum(), lookups, batch["input_ids"])
        self._weights.release()
        return [
            Judgement(float(score), row[real.bool()][pair.response_tokens].float())
            for score, row, real, pair in zip(scores.detach(), gradient, batch["attention_mask"], pairs, strict=True)
        ]

    def scores(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> list[float]:
        """Scores alone: one forward pass. Collectives as for ``judge``."""
        with torch.no_grad():
            scores = self._scores(pairs, self._batch(pairs, device))
        self._weights.release()
        return scores.tolist()

    def _batch(self, pairs: Sequence[EncodedPair], device: torch.device | str) -> dict[str, Tensor]:
        """The model's inputs, int64 [B, L], among them ``input_ids`` and ``attention_mask``, 0 at padding."""
        return right_pad([pair.text.ids for pair in pairs], self.tokenizer.pad_token_id, device)

    def _scores(self, pairs: Sequence[EncodedPair], batch: Mapping[str, Tensor]) -> Tensor:
        """Scores [B] float32 of ``pairs``, whose inputs are ``batch``."""
        logits = self._logits(batch).float()
        return torch.stack([self._score(row, pair) for row, pair in zip(logits, pairs, strict=True)])

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the scores are read from, [B, V] in the model's dtype."""
        return end_logits(self.model, batch)

    def _score(self, logits: Tensor, pair: EncodedPair) -> Tensor:
        """Scalar score of one pair, given its float32 logits [V]."""
        return verdict_score(self.score, logits, pair.text.safe, pair.text.unsafe, pair.text.between)

    @torch.no_grad()
    def close(self) -> None:
        """Free its weights; whole ones go with the last reference. It cannot judge afterwards."""
        self._weights.close()

    def why_alone(self, device: torch.device | str) -> str | None:
        """Why pairs must not be judged together: a pair's score changes, or may change, with the pair beside it
        (``models.rows``). None where they may. Collectives: twice those of ``scores``."""

        def read(rows: TokenRows) -> Tensor:
            return self._logits(self._batch([plain_pair(row) for row in rows], device))

        beside = difference_beside(read, probe_ids(self.tokenizer))
        self._weights.release()
        if not beside.is_rounding:
            return beside_note(beside)
        limit = alike_up_to(self.model.config)  # the pairs are not known: they may be long
        return None if limit is None else frequencies_note(limit)

    @contextmanager
    def embedding_table(self) -> Iterator[Tensor]:
        """What each token is worth to the guard, [rows, d]: ``token_table``. Collectives: the gathers of the embedding
        module's parameters where the guard is sharded."""
        with self._weights.gathered(list(embedding_module(self.model).parameters())):
            yield token_table(self.model)
