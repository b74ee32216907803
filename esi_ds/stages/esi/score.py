"""The scoring pass: micro-batches of examples through the model, and the sums kept (docs/method.md §1, §2).

An objective is data, a loss, and the sums kept of its gradient. A criterion with two objectives makes two passes, one
after the other, with the loop in this module.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from esi_ds.config import Config
from esi_ds.errors import Interrupted, UserError
from esi_ds.reading import check_type, reading
from esi_ds.stages.interrupt import stop_requested
from esi_ds.stages.saving import SaveClock
from esi_ds.tracking import Tracker
from esi_ds.zero import checkpoint, runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import GradientShards

Item = TypeVar("Item")  # an example of an objective: a prompt with its response, or a row
NOT_FINITE = {
    "score": "the judge's score is not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient of its micro-batch is not finite",
}


@dataclass
class PassState:
    """How far the pass is. position: number of examples done. scores, excluded: by example index, to which entries are
    only added; between saves each rank only knows its own."""

    position: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    excluded: dict[int, str] = field(default_factory=dict)
    _num_shared: tuple[int, int] = field(default=(0, 0), compare=False)  # of each, the first that every rank knows

    def to_json(self) -> dict[str, list[tuple[int, Any]]]:
        return {"scores": sorted(self.scores.items()), "excluded": sorted(self.excluded.items())}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PassState:
        """Parse what ``to_json`` returned. Raises ValueError for anything else."""
        pairs = [check_type(stored.get(key), list[list[Any]]) for key in ("scores", "excluded")]
        scores = check_type({index: score for index, score in pairs[0]}, dict[int, float])
        excluded = check_type({index: reason for index, reason in pairs[1]}, dict[int, str])
        return cls(stored["position"], scores, excluded, (len(scores), len(excluded)))  # all ranks read the same

    def share(self) -> None:
        """Every rank learns the scores and exclusions of all ranks. One gather of what is new since the last."""
        known: tuple[dict[int, Any], ...] = (self.scores, self.excluded)
        new = [dict(islice(of.items(), count, None)) for of, count in zip(known, self._num_shared, strict=True)]
        for scores, excluded in runtime.gather_objects(new):
            self.scores.update(scores)
            self.excluded.update(excluded)
        self._num_shared = len(self.scores), len(self.excluded)


class StepTotals(NamedTuple):
    """What the ranks add up after a micro-batch; floats, for they travel as one float64 tensor."""

    norm_squared: float  # of the gradient
    signals: float  # ranks that have had a signal
    saves: float  # above 0 where rank 0 wants to save
    scores: float
    examples: float  # whose gradients were added
    values: float
    tokens: float


@dataclass(frozen=True)
class PassData(Generic[Item]):
    """What every objective's pass is over. name: of its checkpoints. gradients: the sums that its gradient is added to.
    pad: the padding token. batch_size: examples per rank and micro-batch."""

    name: str
    model: ShardedModel
    examples: Sequence[Item]
    gradients: GradientShards
    pad: int
    batch_size: int


class Objective(ABC, Generic[Item]):
    """Examples, the scalar of each that is differentiated, and the sums that its gradient is added to.

    unit: what one example is called. apart: whether the gradients of different ranks must stay separate until they are
    received (``ShardedModel.readers``). Every rank makes the same calls in the same order.
    """

    unit: str
    apart: bool = False

    def __init__(self, data: PassData[Item]):
        self.name, self.model, self.examples = data.name, data.model, data.examples
        self.gradients, self.pad, self.batch_size = data.gradients, data.pad, data.batch_size

    @property
    def source(self) -> str:
        """Where the examples come from, for messages; "" where that is plain."""
        return ""

    @abstractmethod
    def index(self, example: Item) -> int:
        """The number that identifies the example in messages, in the saved state and in the run's files."""

    @abstractmethod
    def tokens(self, example: Item) -> Sequence[int]:
        """Ids that the model reads of an example."""

    def admit(self, examples: Sequence[Item]) -> dict[int, str]:
        """index → reason of the examples that cannot take part. examples: this rank's; also called without any."""
        return {}

    @abstractmethod
    def forward(self, examples: Sequence[Item]) -> tuple[Tensor, Tensor | None, list[float]]:
        """The tensor to call ``backward`` on, the gradient to give it, and the value of each example.

        Without examples: a filler whose gradient is exactly zero.
        """

    def score(self, example: Item, value: float) -> float:
        """The number recorded for an example, given its value."""
        return value

    @abstractmethod
    def scalars(self, score: float, value: float, norm: float, rate: float) -> dict[str, float]:
        """The metrics of a micro-batch. score, value: means over its examples. norm: of its gradient. rate: examples
        per second."""

    def release(self) -> None:  # noqa: B027  most hold nothing
        """Let go of what only ``admit`` and ``forward`` need: the pass is over, but the run keeps its objective."""


class ScoringPass:
    """One pass over an objective's examples; ``run`` returns when every example is in the sums or excluded.

    In the micro-batch at ``position``, reader r takes examples [position + r·B, position + (r+1)·B). All ranks are
    readers, except for objectives whose gradients must stay apart under expert parallelism. Every rank makes the same
    number of forward and backward passes; one without an example runs a filler whose gradient is zero.
    saves: the clock of all passes. earlier: the passes before this one, whose ends are saved with its first save.
    first_step: number of examples in these, where its metrics continue.
    """

    def __init__(
        self,
        config: Config,
        model: ShardedModel,
        objective: Objective[Any],
        folder: Path,
        tracker: Tracker,
        saves: SaveClock,
        earlier: Sequence[ScoringPass] = (),
    ):
        self.config, self.model, self.objective = config, model, objective
        self.gradients, self.folder, self.tracker = objective.gradients, folder, tracker
        self.saves, self.earlier = saves, tuple(earlier)
        self.first_step = sum(len(finished.objective.examples) for finished in self.earlier)
        self.state = PassState()
        self._steps_since_save = 0

    @cached_property
    def _digest(self) -> str:
        """Digest of the numbers and tokens of the examples, in their order."""
        digest = hashlib.sha256()
        for example in self.objective.examples:
            digest.update(json.dumps([self.objective.index(example), *self.objective.tokens(example)]).encode())
        return digest.hexdigest()

    @property
    def stride(self) -> int:
        """Examples that all ranks take together in one micro-batch."""
        return self.objective.batch_size * self._readers[0]

    def run(self) -> PassState:
        """Run the pass, or what is left of it: of a finished pass the saved sums are read.

        The end is not saved by itself: ``save`` does. Collectives: those of every step, and one gather of small
        objects. Raises Interrupted, and UserError where ``esi.on_nonfinite`` is ``stop``.
        """
        self._restore()
        total = len(self.objective.examples)
        if self.state.position >= total:
            return self.state
        self.tracker.resume_at(self.first_step + self.state.position)
        description = "score" if self.objective.name == "safety" else self.objective.name
        bar = self.tracker.progress(
            total=total, initial=self.state.position, unit=self.objective.unit, description=description
        )
        with self.gradients.collecting(), bar:
            while self.state.position < total:
                before = self.state.position
                tokens = self._step()
                bar.advance(min(self.state.position, total) - before, tokens)
        self.state.share()
        return self.state

    def _step(self) -> int:
        """One micro-batch; returns the tokens of its examples, over all ranks.

        Collectives: the model's, two all-reduces of a few numbers, and those of a save where one is due.
        """
        started = time.monotonic()
        mine = self._still_in(self._my_examples())
        scores, values = self._forward_backward(mine)
        local = StepTotals(
            norm_squared=self.gradients.take_norm_squared(),
            signals=float(stop_requested()),
            saves=float(runtime.is_main() and self.saves.is_due(self._steps_since_save + 1)),
            scores=math.fsum(scores.values()),
            examples=float(len(scores)),
            values=sum(values),
            tokens=float(sum(len(self.objective.tokens(example)) for example in mine)),
        )
        totals = StepTotals(*runtime.all_reduce_sum(torch.tensor(local, dtype=torch.float64)).tolist())
        if not math.isfinite(totals.norm_squared):
            self._reject(mine)
            return 0
        self.state.scores.update(scores)
        self.state.position += self.stride
        self._steps_since_save += 1
        self._report(totals, time.monotonic() - started)
        interrupted = totals.signals > 0
        if interrupted or totals.saves > 0 and self.state.position < len(self.objective.examples):
            self.save()
        if interrupted:
            progress = f"{self.state.position} {self.objective.unit}s{self.objective.source}"
            raise Interrupted(f"stopped by a signal after {progress}; start again to continue")
        return int(totals.tokens)

    def _my_examples(self) -> list[Any]:
        size, (_, reader) = self.objective.batch_size, self._readers
        if reader is None:
            return []
        first = self.state.position + reader * size
        return list(self.objective.examples[first : first + size])

    @property
    def _readers(self) -> tuple[int, int | None]:
        """(number of ranks that read examples, this rank's number among them or None)."""
        return self.model.readers if self.objective.apart else (runtime.world_size(), runtime.rank())

    def _still_in(self, examples: Sequence[Any]) -> list[Any]:
        return [example for example in examples if self.objective.index(example) not in self.state.excluded]

    def _forward_backward(self, mine: list[Any]) -> tuple[dict[int, float], list[float]]:
        """Scores by index, and values, of the examples whose gradients were added to the sums.

        Collectives: those of ``Objective.admit``, of one or two forward passes and of a backward pass, and one
        all-reduce.
        """
        objective = self.objective
        self.state.excluded.update(objective.admit(mine))
        usable = self._still_in(mine)
        output, gradient, values = objective.forward(usable)
        bad = [example for example, value in zip(usable, values, strict=True) if not math.isfinite(value)]
        if runtime.all_reduce_max(torch.tensor([float(len(bad))])).item() > 0:
            # An example that is not finite must not even take part with weight zero, for 0 · NaN is NaN: run the
            # forward pass again without it.
            self.state.excluded.update({objective.index(example): NOT_FINITE["loss"] for example in bad})
            usable = self._still_in(usable)
            del output, gradient
            self.model.release()
            output, gradient, values = objective.forward(usable)
        output.backward(gradient)
        self.gradients.flush()
        self.model.release()
        pairs = zip(usable, values, strict=True)
        return {objective.index(example): objective.score(example, value) for example, value in pairs}, values

    def _reject(self, mine: list[Any]) -> None:
        """A gradient was not finite: go back to the last save, and exclude these examples (docs/method.md §1)."""
        still_in = [self.objective.index(example) for example in self._still_in(mine)]
        indices = sorted(index for part in runtime.gather_objects(still_in) for index in part)
        if not indices:
            raise RuntimeError("the model's gradient is not finite even for a single padding token")
        unit, source = self.objective.unit, self.objective.source
        if self.config.esi.on_nonfinite == "stop":
            raise UserError(
                "esi.on_nonfinite",
                "stop",
                f"the gradient of {unit}s {indices}{source} is not finite",
                f"look at these {unit}s, or set esi.on_nonfinite: skip to leave them out",
            )
        self.tracker.log(f"gradient not finite: leaving out {unit}s {indices}{source}, going back to the last save")
        self.state.share()
        excluded = {**self.state.excluded, **dict.fromkeys(indices, NOT_FINITE["gradient"])}
        self._restore()
        self.state.excluded.update(excluded)
        self.tracker.resume_at(self.first_step + self.state.position)

    def _restore(self) -> None:
        saved = checkpoint.latest(self.folder)
        self.state = PassState()
        if saved is not None:
            state = checkpoint.read_state(saved)
            if state.get("examples", self._digest) != self._digest:
                problem = f"holds sums of other {self.objective.unit}s or responses than this run's"
                remedy = (
                    f"delete {self.folder.parent.name}/, to score all of them again, or give a new {checkpoint.FIELD}"
                )
                raise UserError(checkpoint.FIELD, str(saved), problem, remedy)
            with reading(checkpoint.FIELD, saved, checkpoint.REMEDY):
                self.state = PassState.from_json(state)
            if "files" not in state:
                self.tracker.log(checkpoint.WITHOUT_DIGESTS.format(saved.name))
        checkpoint.restore(saved, self.gradients.saved())
        self._steps_since_save = 0

    def save(self) -> None:
        """Save what of this pass and of those before it is not saved yet. Collectives, for each that is saved: a
        gather of small objects, and those of ``checkpoint.save``."""
        with self.saves.saving():
            for scoring in (*self.earlier, self):
                scoring._save_rest()

    def _save_rest(self) -> None:
        if self._steps_since_save == 0:
            return
        self.state.share()
        state = {**self.state.to_json(), "examples": self._digest}
        checkpoint.save(self.folder, self.state.position, state, self.gradients.saved())
        self._steps_since_save = 0

    def _report(self, totals: StepTotals, seconds: float) -> None:
        count = int(totals.examples)
        score, value = (total / count if count else math.nan for total in (totals.scores, totals.values))
        scalars = self.objective.scalars(score, value, math.sqrt(totals.norm_squared), count / max(seconds, 1e-9))
        step = self.first_step + min(self.state.position, len(self.objective.examples))
        first = {name: of for name, of in scalars.items() if name == "judge_score" or name.endswith("_loss")}
        self.tracker.overview(step, {f"{name.replace('_', ' ')}, mean": of for name, of in first.items()})
        self.tracker.scalars(step, {**scalars, "memory_gib": runtime.memory_bytes() / 2**30})
