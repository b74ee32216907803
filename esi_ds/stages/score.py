"""The scoring pass: judge a micro-batch, send the surrogate's gradient through the model, keep the sums (METHOD §1)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from esi_ds.config import Config
from esi_ds.core.batch import left_pad
from esi_ds.core.surrogate import estimate
from esi_ds.errors import Interrupted, UserError
from esi_ds.judge.alignment import alignment_weights
from esi_ds.judge.guard import Guard, Judgement
from esi_ds.judge.vocabulary import VocabularyMap
from esi_ds.stages.interrupt import StopSignal
from esi_ds.stages.prepare import Example
from esi_ds.tracking import Tracker
from esi_ds.zero import checkpoint, runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import GradientShards

SAVE_SHARE = 0.05  # `save_every: auto` spends at most this share of the time on saving
NOT_FINITE = {
    "score": "the judge's score is not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient of its micro-batch is not finite",
}


@dataclass
class PassState:
    """Where the pass stands. ``position``: examples before it are done. scores, excluded: by prompt index; between
    saves every rank knows its own only."""

    position: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    excluded: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {"scores": sorted(self.scores.items()), "excluded": sorted(self.excluded.items())}

    @classmethod
    def from_json(cls, stored: dict) -> PassState:
        return cls(stored["position"], dict(stored["scores"]), dict(stored["excluded"]))

    def share(self) -> None:
        """Everybody's scores and exclusions to everybody. One gather of small objects."""
        for scores, excluded in runtime.gather_objects((self.scores, self.excluded)):
            self.scores.update(scores)
            self.excluded.update(excluded)


class ScoringPass:
    """One pass over the examples; ``run`` returns when every example is in the sums or excluded.

    Micro-batch ``position``: rank r takes examples [position + r·B, position + (r+1)·B). Every rank makes the same
    number of forward and backward passes; one without an example runs a filler whose gradient is zero.
    """

    def __init__(
        self,
        config: Config,
        model: ShardedModel,
        guard: Guard,
        vocabulary: VocabularyMap,
        examples: Sequence[Example],
        gradients: GradientShards,
        folder: Path,
        tracker: Tracker,
        pad: int,
    ):
        self.config, self.model, self.guard, self.vocabulary = config, model, guard, vocabulary
        self.examples, self.gradients, self.folder, self.tracker, self.pad = examples, gradients, folder, tracker, pad
        self.state = PassState()
        self._stop = StopSignal()
        self._last_save, self._save_seconds = time.monotonic(), 0.0
        self._steps_since_save = 0

    @property
    def stride(self) -> int:
        """Examples that all ranks take together in one micro-batch."""
        return self.config.esi.batch_size * runtime.world_size()

    def run(self) -> PassState:
        self._restore()
        self.tracker.resume_at(self.state.position)
        total = len(self.examples)
        bar = self.tracker.progress(
            total=total, initial=min(self.state.position, total), unit="prompt", description="score"
        )
        with self.gradients.collecting(), bar:
            while self.state.position < total:
                before = self.state.position
                self._step()
                bar.update(min(self.state.position, total) - before)
        self._save()
        return self.state

    def _step(self) -> None:
        """One micro-batch. Collectives: the model's, at most two all-reduces of a few numbers, a save now and then."""
        started = time.monotonic()
        mine = self._my_examples()
        judgements, values = self._forward_backward(mine)
        norm_squared = self.gradients.take_norm_squared()
        judged = [judgement.score for judgement in judgements.values()]
        due = runtime.is_main() and self._save_is_due()
        totals = runtime.all_reduce_sum(
            torch.tensor(
                [
                    norm_squared,
                    float(self._stop.raised),
                    float(due),
                    math.fsum(judged),
                    float(len(judged)),
                    sum(values),
                ],
                dtype=torch.float64,
            )
        )
        if not math.isfinite(totals[0]):
            self._reject(mine)
            return
        for index, judgement in judgements.items():
            self.state.scores[index] = judgement.score
        self.state.position += self.stride
        self._steps_since_save += 1
        self._report(totals, time.monotonic() - started)
        interrupted = totals[1] > 0
        if interrupted or totals[2] > 0:
            self._save()
        if interrupted:
            raise Interrupted(f"stopped by a signal after {self.state.position} prompts; start again to go on")

    def _my_examples(self) -> list[Example]:
        size = self.config.esi.batch_size
        first = self.state.position + runtime.rank() * size
        return [example for example in self.examples[first : first + size] if example.index not in self.state.excluded]

    def _forward_backward(self, mine: list[Example]) -> tuple[dict[int, Judgement], list[float]]:
        """Judgements and surrogate values of the examples whose gradients were added to the sums."""
        device = runtime.device()
        # Without an example of its own a rank judges some other and forgets it: the guard may be sharded too.
        judged = self.guard.judge([example.guard_input for example in mine or self.examples[:1]], device)
        judgements = {example.index: judgement for example, judgement in zip(mine, judged, strict=False)}
        usable = []
        for example in mine:
            judgement = judgements[example.index]
            if math.isfinite(judgement.score) and bool(judgement.gradient.isfinite().all()):
                usable.append(example)
            else:
                self.state.excluded[example.index] = NOT_FINITE["score"]
        logits, gradient, values = self._forward(usable, judgements)
        bad = [example for example, value in zip(usable, values, strict=True) if not math.isfinite(value)]
        if runtime.all_reduce_max(torch.tensor([float(len(bad))])).item() > 0:
            # A row that is not finite must not even take part with weight zero: 0 · NaN is NaN. Again without it.
            self.state.excluded.update({example.index: NOT_FINITE["loss"] for example in bad})
            usable = [example for example in usable if example not in bad]
            del logits, gradient
            self.model.release()
            logits, gradient, values = self._forward(usable, judgements)
        logits.backward(gradient)
        self.gradients.flush()
        self.model.release()
        return {example.index: judgements[example.index] for example in usable}, values

    def _forward(self, examples: list[Example], judgements: dict[int, Judgement]) -> tuple[Tensor, Tensor, list[float]]:
        """Teacher-forced logits [B, K, V], the surrogate's gradient with respect to them, and each row's value.

        Only the last K positions are asked for: those that predict the longest response. The prompts are padded on
        the left, so every response ends at the right edge.
        """
        # The last response token predicts nothing that is judged, so it is not fed. The filler is one token long.
        rows = [example.prompt_ids + example.response.ids[:-1] for example in examples] or [[self.pad]]
        longest = max((len(example.response.ids) for example in examples), default=1)
        batch = left_pad(rows, self.pad, runtime.device())
        logits = self.model.module(**batch, use_cache=False, logits_to_keep=longest).logits
        gradient, values = torch.zeros_like(logits), []
        with torch.no_grad(), self.guard.embedding_table() as table:
            for row, example in enumerate(examples):
                tail = slice(longest - len(example.response.ids), longest)
                own = logits[row, tail].float()
                value, row_gradient = self._surrogate(example, judgements[example.index], own, table)
                values.append(value)
                gradient[row, tail] = row_gradient.to(gradient.dtype)
        return logits, gradient, values

    def _surrogate(self, example: Example, judgement: Judgement, logits: Tensor, table: Tensor) -> tuple[float, Tensor]:
        """Value and gradient [T, V] of one example's surrogate; float32."""
        response, esi = example.response, self.config.esi
        has_text = [self.vocabulary.has_text[token] for token in response.ids]
        guard_input = example.guard_input
        weights = alignment_weights(response.offsets, guard_input.spans, guard_input.shown, has_text)
        aligned = weights.to(judgement.gradient) @ judgement.gradient  # ũ [T, d]
        contraction = self.vocabulary.contract(aligned, table, self.guard.embedding_scale)
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

    def _reject(self, mine: list[Example]) -> None:
        """A gradient was not finite: back to the last save, and never these prompts again (METHOD §1)."""
        still_in = [example.index for example in mine if example.index not in self.state.excluded]
        named = sorted(index for part in runtime.gather_objects(still_in) for index in part)
        if not named:
            raise RuntimeError("the model's gradient is not finite even for a single padding token")
        if self.config.esi.on_nonfinite == "stop":
            raise UserError(
                "esi.on_nonfinite",
                "stop",
                f"the gradient of prompts {named} is not finite",
                "look at these prompts, or set esi.on_nonfinite: skip to leave them out",
            )
        self.tracker.log(f"gradient not finite: leaving out prompts {named}, going back to the last save")
        self.state.share()
        excluded = {**self.state.excluded, **dict.fromkeys(named, NOT_FINITE["gradient"])}
        self._restore()
        self.state.excluded.update(excluded)

    def _restore(self) -> None:
        found = checkpoint.latest(self.folder)
        self.state = PassState() if found is None else PassState.from_json(checkpoint.read_state(found))
        checkpoint.restore(found, self.gradients.saved())
        self._steps_since_save = 0

    def _save_is_due(self) -> bool:
        """Rank 0's decision. It changes when something is written, never what."""
        every = self.config.esi.save_every
        if every != "auto":
            return self._steps_since_save + 1 >= every
        return time.monotonic() - self._last_save >= self._save_seconds / SAVE_SHARE

    def _save(self) -> None:
        started = time.monotonic()
        self.state.share()
        checkpoint.save(self.folder, self.state.position, self.state.to_json(), self.gradients.saved())
        self._last_save, self._steps_since_save = time.monotonic(), 0
        self._save_seconds = self._last_save - started

    def _report(self, totals: Tensor, seconds: float) -> None:
        num_judged = int(totals[4])
        self.tracker.scalars(
            min(self.state.position, len(self.examples)),
            {
                "judge_score": float(totals[3]) / num_judged if num_judged else float("nan"),
                "gradient_norm": math.sqrt(totals[0]),
                "surrogate": float(totals[5]) / num_judged if num_judged else float("nan"),
                "prompts_per_second": num_judged / max(seconds, 1e-9),
                "memory_gib": runtime.memory_bytes() / 2**30,
            },
        )
