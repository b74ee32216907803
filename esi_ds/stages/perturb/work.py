"""Perturbation: does safety depend on these weights? Noise on the top, random and bottom k (docs/method.md §4).

The noise is written into the ranks' shards, the prompts are answered, and the exact bits come back: no model is
written, and a digest of all weights is the same after every cell.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import TypedDict

from esi_ds.core.mask import Mask
from esi_ds.core.score_folder import UNNAMED
from esi_ds.errors import UserError
from esi_ds.eval.rows import AnswerRow
from esi_ds.models.folder import ModelSource
from esi_ds.stages.batch_sizes import GenerationBatch, longest_prompt
from esi_ds.stages.evaluate.answering import answer_all, surprise_all
from esi_ds.stages.evaluate.ledgers import EvalLedgers
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.perturb.finish import RestoredCells, finish_perturb
from esi_ds.stages.perturb.prepare import CLEAN, NoiseCell, PerturbInputs
from esi_ds.stages.questions import answer_keys
from esi_ds.stages.run import StageRun, check_mask_bits
from esi_ds.words import counted
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import read_scores
from esi_ds.zero.generate import choose_mode, may_stand_together, ready_to_generate
from esi_ds.zero.perturb import partitioned_bits_digest, perturbed, positions
from esi_ds.zero.score import Scores, select_weights, unit_sigmas

FIELD = "perturb.mask"
RESTORED = "restored.jsonl"
Bits = dict[str, Tensor]  # shard's name → bool [shard.numel] on the CPU, the weights that are selected


class RestoredRow(TypedDict):
    """A line of ``restored.jsonl``, written once all weights are seen to have their bits back after a cell."""

    cell: str  # the cell's name
    restored: bool  # always true: a run whose weights are not restored stops


class PerturbRun(StageRun[PerturbInputs]):
    """One run of the stage on this rank."""

    stage = "perturb"

    @property
    def judge_sources(self) -> list[ModelSource]:
        return self.inputs.eval.judge_sources

    @property
    def masks(self) -> dict[str, Mask]:
        return {FIELD: self.inputs.mask}

    def work(self) -> None:
        inputs, config, tracker = self.inputs, self.config, self.tracker
        candidate, sets, section = inputs.candidate, inputs.eval.sets, inputs.eval.section
        with self.phase("loading"):
            model = self._load()
            scores = self._scores(model)
        if candidate.broken_up:
            tracker.log(f"prompts: special tokens broken up: {candidate.broken_up}")
        ledgers = EvalLedgers.open(self.folder.path)
        # With or without noise, the same prompts in the same batches.
        batch = self.generation_batch(section, longest_prompt(candidate.prompt_ids.values(), candidate.max_positions))
        with self.phase("answering"):
            answer_all(model, CLEAN, candidate, sets, ledgers.answers, config, batch, tracker)
            restored = self._answer_cells(model, scores, ledgers.answers, batch)
        del scores  # judges need the memory
        with self.phase("reading answers again"):
            surprise_all(model, candidate, ledgers.answers, ledgers.surprises, config, tracker)
        model.close()
        with self.phase("judging"):
            outcome = ledgers.judge(inputs.names, inputs.eval, config, self.deepspeed_config, tracker)
        finish_perturb(self, outcome, restored)

    def _load(self) -> ShardedModel:
        """The model, which must be the mask's. Raises UserError. Collectives: those of loading, ``begin`` and
        ``may_stand_together``."""
        mask = self.inputs.mask
        check_mask_bits(mask, FIELD)
        model = self.load_model()
        self.begin(model)
        self.accept_mask(mask, FIELD)
        # Asked before any weight is disturbed: a restarted run may have nothing left to ask of the clean model.
        mode, _ = choose_mode(model, self.config.esi.generation)
        with ready_to_generate(model, mode):
            may_stand_together(model, self.inputs.candidate.tokenizer, mode)
        self.tracker.log(
            f"mask: {counted(mask.k, 'weight')} by {mask.header.criterion}; {counted(len(self.inputs.cells), 'cell')}"
        )
        return model

    def _answer_cells(
        self, model: ShardedModel, scores: Scores | None, answers: Ledger[AnswerRow], batch: GenerationBatch
    ) -> RestoredCells:
        """Disturb, answer and restore for every cell that lacks answers.

        If the run was killed between a cell's last answer and the check of the weights, the cell is disturbed and
        restored again. Collectives: those of scoring, ``answer_all`` and ``partitioned_bits_digest``. Raises
        Interrupted.
        """
        inputs, tracker = self.inputs, self.tracker
        sets, section = inputs.eval.sets, inputs.eval.section
        digest, sigma = partitioned_bits_digest(model), unit_sigmas(model)
        checked: Ledger[RestoredRow] = Ledger(self.folder.path / RESTORED, ("cell",), RestoredRow)
        counts: dict[str, int] = {}
        for number, cell in enumerate(inputs.cells, 1):
            selected = positions(model, self._bits(model, cell, scores))
            counts[cell.name] = self._count(map(len, selected.values()))
            is_answered = all(key in answers.rows for key in answer_keys([cell.name], sets, section.samples))
            if is_answered and (cell.name,) in checked.rows:
                continue
            tracker.log(f"cell {number} of {len(inputs.cells)}: {cell.name}, {counted(counts[cell.name], 'weight')}")
            with perturbed(model, selected, sigma, cell.noise, cell.seed):
                answer_all(model, cell.name, inputs.candidate, sets, answers, self.config, batch, tracker)
            if partitioned_bits_digest(model) != digest:
                raise RuntimeError(f"the weights are not what they were before {cell.name}")
            checked.add([{"cell": cell.name, "restored": True}])
        return RestoredCells(digest, counts, len(checked.rows))

    def _scores(self, model: ShardedModel) -> Scores | None:
        """This rank's scores, if there are any; the mask must be what they select.

        Raises UserError. Collectives: those of ``select_weights``, and one all-reduce.
        """
        inputs = self.inputs
        if inputs.scores is None:
            return None
        scores, metadata = read_scores(inputs.scores, model.scored, "perturb.scores")
        if metadata is None:
            self.tracker.log(f"{inputs.scores} {UNNAMED}")
        elif metadata.fingerprint != inputs.mask.fingerprint:
            raise UserError(
                "perturb.scores",
                str(inputs.scores),
                "were computed from other weights than the mask",
                "give the mask's own scores",
            )
        selected = self._select(model, "top", inputs.mask.header.ratio, 0, scores)
        num_wrong = self._count(
            int((selected[shard.name] ^ inputs.mask.bits_of(shard)).sum()) for shard in model.scored
        )
        if num_wrong:
            problem = f"select other weights than the mask holds ({num_wrong:,} differ)"
            raise UserError("perturb.scores", str(inputs.scores), problem, "give the scores it was made from")
        return scores

    def _bits(self, model: ShardedModel, cell: NoiseCell, scores: Scores | None) -> Bits:
        """The weights that a cell disturbs. Collectives: those of ``select_weights``."""
        if cell.order == "random":  # only the positions of the scores matter, not their values
            zeros = {shard.name: torch.zeros(1).expand(shard.numel) for shard in model.scored}  # takes no memory
            return self._select(model, cell.order, cell.ratio, cell.seed, zeros)
        if scores is None:
            return {shard.name: self.inputs.mask.bits_of(shard) for shard in model.scored}
        return self._select(model, cell.order, cell.ratio, cell.seed, scores)

    def _select(self, model: ShardedModel, order: str, ratio: float, seed: int, scores: Scores) -> Bits:
        """Collectives: those of ``select_weights``. Scores and bits stay on the CPU: a GPU may just hold the model."""
        header = self.inputs.mask.header
        selection = select_weights(
            model,
            scores,
            ratio=ratio,
            order=order,
            of=header.of,
            scope=header.scope,
            seed=seed,
            k=header.k_of(ratio),
            field="perturb.scores",
        )
        return selection.bits

    def _count(self, counts: Iterable[int]) -> int:
        """The sum of all ranks' ``counts``. One all-reduce."""
        return int(runtime.all_reduce_sum(torch.tensor(sum(counts))))
