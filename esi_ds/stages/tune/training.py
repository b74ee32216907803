"""The training loop of SET and SPA: the next rows, their loss, one update; saves, signals, and what is not finite."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch

from esi_ds.core.schedule import learning_rate
from esi_ds.data.conversations import DataOrder, TokenSequence
from esi_ds.errors import Interrupted, UserError
from esi_ds.reading import check_type, reading
from esi_ds.stages.interrupt import stop_requested
from esi_ds.stages.learnt_rows import padded
from esi_ds.stages.saving import SaveClock
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import checkpoint, runtime
from esi_ds.zero.tuner import NotFinite, Tuner, summed_loss

MixedRows = list[tuple[bool, TokenSequence]]  # whether each is benign, and its tokens


class Training:
    """``run`` returns once ``tune.max_steps`` updates are made.

    The loss of a step is the mean over all learnt tokens of its rows, whichever rank and micro-batch they are in. In
    every micro-batch each rank takes the next B positions of the data's order, in the order of the ranks.

    inputs: the rows and the config's section. seed: of the rows' order. folder: of the checkpoints. saves: says when;
    the last step is not saved by itself, which ``save`` does.
    """

    def __init__(self, inputs: TuningInputs, tuner: Tuner, seed: int, folder: Path, tracker: Tracker, saves: SaveClock):
        self.tune, self.tuner, self.folder, self.tracker = inputs.tune, tuner, folder, tracker
        self.pad = inputs.tokenizer.pad_token_id
        self.rows = inputs.rows.sequences
        self.benign = inputs.benign.sequences if inputs.benign is not None else ()
        mix = inputs.tune.data.benign
        fraction = mix.fraction if mix is not None and inputs.benign is not None else 0.0
        self.order = DataOrder(len(self.rows), len(self.benign), fraction, seed)
        self.step, self.position = 0, 0  # updates made, rows read
        self.first_step = 0  # of this start
        self._strides = [(0, self.stride)]  # updates made before → rows of each step from there on
        self.saves, self._steps_since_save = saves, 0

    @property
    def stride(self) -> int:
        """Rows of one step, over all ranks and micro-batches."""
        return self.tune.step_rows(runtime.world_size())

    @property
    def num_benign(self) -> int:
        """Benign rows among those that are read so far."""
        return self.order.num_benign_before(self.position)

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, to the last step. Raises Interrupted."""
        self._restore()
        self.first_step, total = self.step, self.tune.max_steps
        bar = self.tracker.progress(total=total, initial=self.step, unit="step", description="tune")
        with self.tuner.running(), bar:
            while self.step < total:
                self._step()
                bar.update(1)

    def micro_batches(self) -> list[MixedRows]:
        """This rank's part of the next step."""
        size, ranks = self.tune.batch_size, runtime.world_size()
        starts = (
            self.position + (index * ranks + runtime.rank()) * size for index in range(self.tune.gradient_accumulation)
        )
        return [self._rows(start, size) for start in starts]

    def _rows(self, start: int, count: int) -> MixedRows:
        """``count`` rows from a position of the data's order on."""
        numbers = [self.order[position] for position in range(start, start + count)]
        return [(is_benign, (self.benign if is_benign else self.rows)[number]) for is_benign, number in numbers]

    def _step(self) -> None:
        """One update.

        Collectives: the model's and the tuner's, and an all-reduce of a few numbers before and after the update.
        """
        started = time.monotonic()
        batches = self.micro_batches()
        learnt = sum(sequence.num_learnt for _, sequence in self._rows(self.position, self.stride))
        losses = [self._forward_backward(batch, learnt) for batch in batches]
        self._check_losses(losses, batches)
        lr = self._learning_rate()
        try:
            norm = self.tuner.step(lr)
        except NotFinite as error:
            self._refuse("gradient", set(error.ranks), [row for batch in batches for row in batch])
        if norm == 0 and self.step == 0:
            self._notice_no_gradient()
        self.step += 1
        self.position += self.stride
        self._steps_since_save += 1
        wants_save = runtime.is_main() and self.saves.is_due(self._steps_since_save)
        tokens = sum(len(sequence.ids) for batch in batches for _, sequence in batch)
        totals = runtime.all_reduce_sum(
            torch.tensor([math.fsum(losses), tokens, stop_requested(), wants_save], dtype=torch.float64)
        ).tolist()
        self._report(totals[0], norm, lr, totals[1] / max(time.monotonic() - started, 1e-9))
        interrupted = totals[2] > 0
        if interrupted or totals[3] > 0 and self.step < self.tune.max_steps:
            self.save()
        if interrupted:
            raise Interrupted(f"stopped by a signal after {counted(self.step, 'step')}; start again to continue")

    def _forward_backward(self, batch: MixedRows, learnt: int) -> float:
        """One micro-batch's share of the step's loss. learnt: learnt tokens of the whole step."""
        inputs, labels = padded([sequence for _, sequence in batch], self.pad, runtime.device())
        logits = self.tuner.forward(inputs, labels.shape[1])
        loss = summed_loss(logits, labels) / learnt
        self.tuner.backward(loss)
        return float(loss.detach())

    def _learning_rate(self) -> float:
        tune = self.tune
        return learning_rate(
            self.step, lr=tune.lr, scheduler=tune.scheduler, max_steps=tune.max_steps, warmup_ratio=tune.warmup_ratio
        )

    def _check_losses(self, losses: list[float], batches: list[MixedRows]) -> None:
        """Refuse losses that are not finite, before anything is updated. One all-reduce."""
        bad = [row for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss) for row in batch]
        if runtime.all_reduce_max(torch.tensor([float(len(bad))])).item() > 0:
            ranks = {rank for rank, count in enumerate(runtime.gather_objects(len(bad))) if count}
            self._refuse("loss", ranks, bad)

    def _refuse(self, quantity: str, ranks: set[int], rows: MixedRows) -> NoReturn:
        """Stop with an error that names the step, the ranks and their rows. One gather.

        ranks: those whose own ``quantity`` is not finite; if empty, all are named. rows: of this rank.
        """
        names = runtime.gather_objects(
            [f"{'benign row' if is_benign else 'row'} {sequence.row}" for is_benign, sequence in rows]
        )
        named = ranks or set(range(len(names)))
        where = "; ".join(f"rank {rank}: {', '.join(names[rank])}" for rank in sorted(named))
        raise UserError(
            "tune.data.path",
            self.tune.data.path,
            f"the {quantity} of step {self.step + 1} is not finite ({where})",
            "nothing was updated and the last checkpoint stands; look at these rows, or lower tune.lr in a new "
            "run.output_dir",
        )

    def _notice_no_gradient(self) -> None:
        """Refuse a first step that gives no trained weight a gradient, or remark on it where that may be so.

        The norm is the same on every rank: no collectives.
        """
        problem = "leaves every trained weight without a gradient in the first step"
        if not self.tuner.may_get_no_gradient:
            remedy = "look at the rows that are learnt, and at zero_optimization of the DeepSpeed config"
            raise UserError("tune.mask", self.tune.mask, problem, remedy)
        self.tracker.remark(f"tune.mask {problem}: its rows do not reach what trains")

    def _report(self, loss: float, norm: float, lr: float, rate: float) -> None:
        """Scalars of one step. rate: tokens per second. Collectives: one all-reduce."""
        moved = self.tuner.share_moved()
        self.tracker.overview(self.step, {"loss": loss})
        self.tracker.scalars(
            self.step,
            {
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": lr,
                "tokens_per_second": rate,
                "memory_gib": runtime.memory_bytes() / 2**30,
                "share_moved": moved,
            },
        )

    def save(self) -> None:
        """Save what is not saved yet. Collectives: those of ``checkpoint.save``."""
        if self._steps_since_save == 0:
            return
        state = {"rows_read": self.position, "batch": self.stride, "batches": self._strides}
        with self.saves.saving():
            checkpoint.save(self.folder, self.step, state, self.tuner.saved())
        self._steps_since_save = 0

    def _restore(self) -> None:
        """Continue from the newest checkpoint, if there is one. One broadcast and one barrier."""
        newest = checkpoint.latest(self.folder)
        runtime.barrier()  # no rank saves before every rank has looked
        if newest is None:
            self.tracker.resume_at(0)
            return
        state = checkpoint.read_state(newest)
        with reading(checkpoint.FIELD, newest, checkpoint.REMEDY):
            self.step, self.position = state["position"], check_type(state["rows_read"], int)
            batch = check_type(state["batch"], int)
            strides = check_type(state.get("batches", [[0, batch]]), list[list[int]])
            self._strides = [(step, rows) for step, rows in strides]
        if "files" not in state:
            self.tracker.log(checkpoint.WITHOUT_DIGESTS.format(newest.name))
        checkpoint.restore(newest, self.tuner.saved())
        self.tuner.restored(self.step)
        self.tracker.resume_at(self.step)
        self.tracker.log(f"going on after step {self.step}, {self.position} rows read")
        if batch != self.stride and self.step < self.tune.max_steps:
            self._strides.append((self.step, self.stride))
        for (_, before), (step, rows) in pairwise(self._strides):
            self.tracker.remark(f"from step {step + 1} on, a step read {rows} rows; before that it read {before}")
