"""The objectives of a scoring pass: the judge's score of responses, and losses on rows (docs/method.md §1, §2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from esi_ds.config import Config
from esi_ds.core.batch import right_pad
from esi_ds.core.loss import row_losses
from esi_ds.core.surrogate import advantages, estimate, score_function_surrogate
from esi_ds.data.conversations import TokenSequence
from esi_ds.judge.alignment import alignment_weights
from esi_ds.judge.guard import Guard, Judgement
from esi_ds.judge.vocabulary import VocabularyMap
from esi_ds.models.rows import last_logits
from esi_ds.stages.esi.prepare import Example
from esi_ds.stages.esi.score import NOT_FINITE, Objective, PassData
from esi_ds.stages.learnt_rows import padded
from esi_ds.zero import runtime


class ResponseObjective(Objective[Example]):
    """Σ over prompts of an estimate of ∇S: a surrogate's gradient sent through the model (docs/method.md §1)."""

    unit = "prompt"

    @property
    def source(self) -> str:
        return "" if self.name == "safety" else f" of {self.name}.prompts"

    def index(self, example: Example) -> int:
        return example.index

    def tokens(self, example: Example) -> Sequence[int]:
        return example.ids

    def forward(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor, list[float]]:
        """Teacher-forced logits [B, K, V], the surrogate's gradient with respect to them, and each row's value.

        Only the logits of the last K positions are computed: those from the end of the shortest prompt on. Rows are
        padded on the right.
        """
        # The last response token predicts nothing that is judged, so it is not fed. The filler is one padding token.
        rows = [example.prompt_ids + example.response.ids[:-1] for example in examples] or [[self.pad]]
        # The logits at a position predict the next one.
        firsts = [len(example.prompt_ids) - 1 for example in examples]
        first = min(firsts, default=0)
        batch = right_pad(rows, self.pad, runtime.device())
        logits = last_logits(self.model.module, batch, max(len(row) for row in rows) - first)
        gradient = torch.zeros_like(logits)
        values: list[float] = []
        with torch.no_grad(), self._table() as table:
            for row, example in enumerate(examples):
                start = firsts[row] - first
                where = slice(start, start + len(example.response.ids))
                value, row_gradient = self._surrogate(example, logits[row, where].float(), table)
                values.append(value)
                gradient[row, where] = row_gradient.to(gradient.dtype)
        return logits, gradient, values

    def _table(self) -> AbstractContextManager[Tensor | None]:
        """The guard's embeddings [rows, d], for estimators that differentiate it. Collectives: their gather."""
        return nullcontext()

    def _surrogate(self, example: Example, logits: Tensor, table: Tensor | None) -> tuple[float, Tensor]:
        """Value and gradient [T, V] of one example's surrogate; float32."""
        raise NotImplementedError

    def scalars(self, score: float, value: float, norm: float, rate: float) -> dict[str, float]:
        scalars = {"judge_score": score, "gradient_norm": norm, "surrogate": value, "prompts_per_second": rate}
        return scalars if self.name == "safety" else {f"{self.name}_{key}": number for key, number in scalars.items()}


class SafetyObjective(ResponseObjective):
    """The judge's own gradient, through the response's text (estimators ``soft``, ``gumbel``, ``paper_code``)."""

    def __init__(self, data: PassData[Example], config: Config, guard: Guard, vocabulary: VocabularyMap):
        super().__init__(data)
        self.batch_size = min(data.batch_size, guard.max_batch or data.batch_size)
        self.config, self.guard, self.vocabulary = config, guard, vocabulary
        self._judgements: dict[int, Judgement] = {}

    def admit(self, examples: Sequence[Example]) -> dict[int, str]:
        """Judges the examples; refuses those whose score or gradient is not finite. Collectives: those of a sharded
        guard."""
        # A rank without an example of its own judges another one and drops the result: the guard may be sharded.
        guard_inputs = [example.judged for example in examples or self.examples[:1]]
        judgements = self.guard.judge(guard_inputs, runtime.device())
        self._judgements = {example.index: judgement for example, judgement in zip(examples, judgements, strict=False)}
        return {
            index: NOT_FINITE["score"]
            for index, judgement in self._judgements.items()
            if not (math.isfinite(judgement.score) and bool(judgement.gradient.isfinite().all()))
        }

    def _table(self) -> AbstractContextManager[Tensor]:
        return self.guard.embedding_table()

    def _surrogate(self, example: Example, logits: Tensor, table: Tensor | None) -> tuple[float, Tensor]:
        response, esi, judgement = example.response, self.config.esi, self._judgements[example.index]
        has_text = [self.vocabulary.has_text[token] for token in response.ids]
        guard_input = example.judged
        weights = alignment_weights(response.offsets, guard_input.spans, guard_input.shown, has_text)
        aligned = weights.to(judgement.gradient) @ judgement.gradient  # ũ [T, d]
        assert table is not None  # _table gives the guard's
        contraction = self.vocabulary.contract(aligned, table)
        value, gradient = estimate(
            esi.estimator,
            logits,
            contraction,
            torch.tensor(response.ids, device=logits.device),
            temperature=esi.temperature,
            samples=esi.samples,
            seed=self.config.run.seed,
            prompt_index=example.index,
        )
        return float(value), gradient

    def score(self, example: Example, value: float) -> float:
        return self._judgements[example.index].score

    def release(self) -> None:
        """A judge of which every rank has a whole copy is freed with the last reference."""
        del self.guard, self.vocabulary
        self._judgements.clear()


class ScoreFunctionObjective(ResponseObjective):
    """(J − b)·∇ log p(y|x): needs only the score of the judge (estimator ``score_function``).

    scores: J of every example, by index. Examples whose score is not finite are left out, also of the baseline b.
    """

    def __init__(self, data: PassData[Example], scores: Mapping[int, float]):
        super().__init__(data)
        self._scores = scores
        self._advantages = advantages({index: score for index, score in scores.items() if math.isfinite(score)})

    def admit(self, examples: Sequence[Example]) -> dict[int, str]:
        return {example.index: NOT_FINITE["score"] for example in examples if example.index not in self._advantages}

    def _surrogate(self, example: Example, logits: Tensor, table: Tensor | None) -> tuple[float, Tensor]:
        sampled = torch.tensor(example.response.ids, device=logits.device)
        value, gradient = score_function_surrogate(logits, sampled, self._advantages[example.index])
        if example.muted:
            muted = torch.tensor(example.muted, device=logits.device)
            value, gradient = value.index_fill_(0, muted, 0.0), gradient.index_fill_(0, muted, 0.0)
        return float(value.sum()), gradient

    def score(self, example: Example, value: float) -> float:
        return self._scores[example.index]


class LossObjective(Objective[TokenSequence]):
    """Gradients of the tuning loss on rows. The value of an example is the mean cross entropy of its learnt tokens."""

    unit = "row"

    @property
    def source(self) -> str:
        return " of control.rows" if self.name == "control" else f" of data.{self.name}"

    def index(self, example: TokenSequence) -> int:
        return example.row

    def tokens(self, example: TokenSequence) -> Sequence[int]:
        return example.ids

    def forward(self, examples: Sequence[TokenSequence]) -> tuple[Tensor, Tensor | None, list[float]]:
        """A loss, no gradient of its own, and the mean cross entropy of each row's learnt tokens."""
        if not examples:
            logits = last_logits(self.model.module, right_pad([[self.pad]], self.pad, runtime.device()), 1)
            return logits, torch.zeros_like(logits), []
        batch, labels = padded(examples, self.pad, runtime.device())
        logits = last_logits(self.model.module, batch, labels.shape[1])
        losses = row_losses(logits, labels)
        means = [loss / example.num_learnt for loss, example in zip(losses.tolist(), examples, strict=True)]
        return self.total(losses, examples), None, means

    def total(self, losses: Tensor, examples: Sequence[TokenSequence]) -> Tensor:
        """The scalar whose gradient is accumulated. losses: summed cross entropy of each row [B]."""
        raise NotImplementedError

    def count(self, examples: Sequence[TokenSequence]) -> int:
        """What turns the sums over ``examples`` into a mean."""
        raise NotImplementedError

    def scalars(self, score: float, value: float, norm: float, rate: float) -> dict[str, float]:
        name = self.name
        return {f"{name}_loss": value, f"{name}_gradient_norm": norm, f"{name}_rows_per_second": rate}


class MeanLoss(LossObjective):
    """g_T or g_C: the gradient of the mean loss over all learnt tokens of all rows, however they are batched."""

    def total(self, losses: Tensor, examples: Sequence[TokenSequence]) -> Tensor:
        return losses.sum()

    def count(self, examples: Sequence[TokenSequence]) -> int:
        return sum(example.num_learnt for example in examples)


class SquaredRowGradients(LossObjective):
    """F: the mean over rows of the squared gradient of each row's loss, itself a mean over the row's learnt tokens.

    Its sums are ``SquaredGradientShards``, of one row per rank and backward pass, whatever ``esi.batch_size`` says: the
    summed gradient of several rows cannot be taken apart, and its square is not the sum of their squares.
    """

    apart = True

    def total(self, losses: Tensor, examples: Sequence[TokenSequence]) -> Tensor:
        (example,) = examples
        return losses.sum() / example.num_learnt

    def count(self, examples: Sequence[TokenSequence]) -> int:
        return len(examples)
