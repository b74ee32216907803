"""Perturbation: does safety hang on these weights? Noise on the top, random and bottom k (docs/method.md §4).

The noise is written into the ranks' shards, the prompts are answered, and the exact bits come back: no model is
written, and a digest of all weights is the same after every cell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_weights
from esi_ds.stages.evaluate.answering import ANSWER_KEY, ANSWERS, SURPRISES, answer_all, answer_keys, surprise_all
from esi_ds.stages.evaluate.judging import VERDICT_KEY, VERDICTS, judge_all
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.perturb.finish import finish_perturb
from esi_ds.stages.perturb.prepare import CLEAN, Cell, PerturbInputs
from esi_ds.stages.run import StageRun, check_mask_bits
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import read_scores
from esi_ds.zero.perturb import perturbed, weights_digest
from esi_ds.zero.score import select_weights, unit_sigmas

FIELD = "perturb.mask"
RESTORED = "restored.jsonl"  # a row a cell, once all weights were seen to have their bits back


class PerturbRun(StageRun[PerturbInputs]):
    """One run of the stage on this rank."""

    stage = "perturb"

    def work(self) -> None:
        inputs, folder, sets, tracker = self.inputs, self.folder.path, self.inputs.eval.sets, self.tracker
        model = self._load(tracker)
        answers, surprises, verdicts = (
            Ledger(folder / name, key)
            for name, key in ((ANSWERS, ANSWER_KEY), (SURPRISES, ANSWER_KEY), (VERDICTS, VERDICT_KEY))
        )
        # With or without noise, the same prompts in the same batches.
        answer_all(model, CLEAN, inputs.candidate, sets, answers, self.config, tracker)
        restored = self._disturb(model, answers, tracker)
        surprise_all(model, inputs.candidate, answers, surprises, self.config, tracker)
        order = answer_keys([CLEAN, *(cell.name for cell in inputs.cells)], sets)
        rows = answers.sort(order)
        surprises.sort(order)
        harmful = {found.name for found in sets if found.kind == "harmful"}
        judged = [row for row in rows if row["set"] in harmful]
        del model
        used = judge_all(inputs.eval.judges, judged, verdicts, self.config, self.deepspeed_config, tracker)
        verdicts.sort((judge.name, *answers.key(row)) for judge in inputs.eval.judges for row in judged)
        finish_perturb(self, rows, verdicts.rows, surprises.rows, used, restored, tracker)

    def _load(self, tracker: Tracker) -> ShardedModel:
        """The model, which must be the mask's."""
        mask = self.inputs.mask
        check_mask_bits(mask, FIELD)
        model = self.load_model()
        self.begin(model)
        same = check_mask_weights(mask, self.fingerprint, self.options.allow_fingerprint_mismatch, FIELD)
        self.notes = {"mask_fingerprint": mask.fingerprint, "mask_made_from_these_weights": same}
        self.record("running")
        tracker.log(f"mask: {mask.k:,} weights by {mask.metadata.get('criterion')}; {len(self.inputs.cells)} cells")
        return model

    def _disturb(self, model, answers, tracker: Tracker) -> dict[str, object]:
        """Answers of every cell that has some missing; the digest of all weights before and after them.

        A cell whose answers are all there but whose weights were not looked at afterwards, for the run was killed
        between the two, is disturbed and restored again.
        """

        sets, candidate = self.inputs.eval.sets, self.inputs.candidate
        before, sigma, scores = weights_digest(model), unit_sigmas(model), self._scores(model)
        checked = Ledger(self.folder.path / RESTORED, ("cell",))
        counts: dict[str, int] = {}
        for number, cell in enumerate(self.inputs.cells):
            bits = self._bits(model, cell, scores)
            counts[cell.name] = self._count(bits)
            is_answered = all(key in answers.rows for key in answer_keys([cell.name], sets))
            if is_answered and (cell.name,) in checked.rows:
                continue
            tracker.log(f"cell {number + 1} of {len(self.inputs.cells)}: {cell.name}, {counts[cell.name]:,} weights")
            with perturbed(model, bits, sigma, cell.noise, cell.seed):
                answer_all(model, cell.name, candidate, sets, answers, self.config, tracker)
            if weights_digest(model) != before:
                raise RuntimeError(f"the weights are not what they were before {cell.name}")
            checked.add([{"cell": cell.name, "restored": True}])
        return {"digest": before, "cells": counts, "checked": len(checked.rows)}

    def _scores(self, model) -> dict | None:
        """This rank's scores, where the mask's are there; the mask must be their selection. One all-reduce."""
        inputs = self.inputs
        if inputs.scores is None:
            return None
        scores, metadata = read_scores(inputs.scores, model.scored, "perturb.scores")
        if metadata.get("fingerprint") != inputs.mask.fingerprint:
            raise UserError("perturb.scores", str(inputs.scores), "are of other weights than the mask", "give its own")
        own = Cell("top", float(inputs.mask.metadata["ratio"]), 0.0, 0)
        again = self._select(model, own, scores)
        marked = {shard.name: inputs.mask.bits_of(shard) for shard in model.scored}
        wrong = self._count({name: bits ^ marked[name] for name, bits in again.items()})
        if wrong:
            problem = f"select other weights than the mask holds ({wrong:,} differ)"
            raise UserError("perturb.scores", str(inputs.scores), problem, "give the scores it was made from")
        return scores

    def _bits(self, model, cell: Cell, scores: Mapping | None) -> dict:
        """shard's name → bool [shard.numel] of the weights that a cell disturbs; k of them over all ranks."""
        if scores is not None and cell.order != "random":
            return self._select(model, cell, scores)
        if cell.order == "random":  # scores do not matter to it, only where they are
            return self._select(model, cell, {shard.name: torch.zeros(shard.numel) for shard in model.scored})
        return {shard.name: self.inputs.mask.bits_of(shard) for shard in model.scored}

    def _select(self, model, cell: Cell, scores: Mapping) -> dict:

        about = self.inputs.mask.metadata
        rule = {"of": about.get("of", "all"), "scope": about.get("scope", "model")}
        return select_weights(model, scores, ratio=cell.ratio, order=cell.order, seed=cell.seed, **rule).bits

    def _count(self, bits: Mapping) -> int:
        """Over all ranks. One all-reduce."""
        return int(runtime.all_reduce_sum(torch.tensor(sum(int(part.sum()) for part in bits.values()))))
