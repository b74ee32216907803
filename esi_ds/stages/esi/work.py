"""The ESI stage: prompts and responses, and rows → gradient sums → scores → mask → report (docs/method.md §1, §2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.errors import UserError
from esi_ds.judge.classifier import ClassifierGuard
from esi_ds.judge.guard import Guard
from esi_ds.judge.vocabulary import VocabularyMap
from esi_ds.models.roles import unknown, warning
from esi_ds.options import Options
from esi_ds.stages.esi.finish import LossOutcome, Outcome, finish
from esi_ds.stages.esi.judge_scores import judge_scores
from esi_ds.stages.esi.losses import LossRows
from esi_ds.stages.esi.objectives import MeanLoss, SafetyObjective, ScoreFunctionObjective, SquaredRowGradients
from esi_ds.stages.esi.prepare import (
    EsiInputs,
    Example,
    Inputs,
    PreparedEsiJudge,
    clean,
    encode_examples,
    encode_prompts,
)
from esi_ds.stages.esi.score import Objective, PassState, ScoringPass
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.respond import respond, write_responses
from esi_ds.stages.run import CHECKPOINTS, StageRun
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import GradientShards, SquaredGradientShards
from esi_ds.zero.placement import load_judge
from esi_ds.zero.score import Accumulated, Scores, contrast_scores, score, unit_sigmas


class EsiRun(StageRun[EsiInputs]):
    """One run of the stage on this rank. Passes run one after the other, each with sums of its own."""

    stage = "esi"

    def __init__(
        self,
        config: Config,
        options: Options,
        inputs: EsiInputs,
        folder: RunFolder,
        deepspeed_config: dict[str, Any],
        source: dict[str, Any],
    ):
        super().__init__(config, options, inputs, folder, deepspeed_config, source)
        self._first_step = 0  # of the next pass, as metrics.jsonl counts

    def work(self) -> None:
        config, tracker = self.config, self.tracker
        prompts = self.inputs.prompts
        guard = self._load_guard(prompts.judge, tracker) if prompts and prompts.judge else None
        model = self.load_model()
        if strangers := unknown(model.parameters):
            tracker.log(warning(strangers))
        if config.model.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.begin(model)
        outcome = self._accumulate(model, guard, prompts, tracker) if prompts else None
        losses = [self._accumulate_loss(model, loss, tracker) for loss in self.inputs.losses]
        accumulated = {found.loss.name: found.accumulated for found in losses}
        if outcome is not None:
            accumulated["safety"] = Accumulated(outcome.gradients.sums, outcome.num_prompts)
        check_stop("everything scored")
        sigma = unit_sigmas(model)
        scores = score(model, config.select.criterion, accumulated, sigma, config.run.seed)
        if config.select.contrastive:
            self._contrast(model, scores, accumulated["benign"])
        finish(config, self.folder.path, model, scores, sigma, self.fingerprint, outcome, losses, self.started, tracker)

    def _load_guard(self, judge: PreparedEsiJudge, tracker: Tracker) -> Guard | ClassifierGuard:

        section = self.config.judge
        module, weights, note = load_judge(
            section, "judge", judge.config, self.config.model.dtype, self.deepspeed_config
        )
        tracker.log(f"judge: family {judge.family.name}, {note}")
        if judge.labels:
            return ClassifierGuard(module, judge.tokenizer, section.score, weights, *judge.labels)
        return Guard(module, judge.tokenizer, section.score, weights)

    def _accumulate(
        self, model: ShardedModel, guard: Guard | ClassifierGuard | None, inputs: Inputs, tracker: Tracker
    ) -> Outcome:
        """Responses, then the scoring pass. Raises UserError where no prompt can be used."""
        config = self.config
        tracker.log(f"prompts: {len(inputs.prompts)} from {inputs.source}, {len(inputs.skipped)} rows skipped")
        prompts, num_broken = clean(inputs, inputs.prompts)
        prompt_ids = encode_prompts(inputs, config, prompts)
        responses = respond(config, inputs, model, prompt_ids, self.folder.path, tracker)
        cleaned, num_broken_responses = clean(inputs, responses)
        examples, excluded = encode_examples(inputs, prompt_ids, prompts, cleaned, config.esi.max_new_tokens)
        if not examples:
            reasons = "; ".join(sorted(set(excluded.values())))
            raise UserError(
                "data",
                f"{len(prompts)} prompts",
                f"none can be used ({reasons})",
                "look at responses.jsonl in the run folder",
            )
        gradients = GradientShards(model, self._accumulator_device())
        state = self._run_pass(model, self._objective(model, guard, inputs, examples, gradients, tracker), tracker)
        excluded.update(state.excluded)
        if runtime.is_main():
            write_responses(self.folder.path, inputs.prompts, responses, state.scores, excluded)
        num_prompts = len(prompts) - len(excluded)
        if num_prompts == 0:
            raise UserError(
                "data",
                f"{len(prompts)} prompts",
                "none gave a finite gradient",
                "look at responses.jsonl in the run folder; is the model sound?",
            )
        return Outcome(
            gradients,
            num_prompts,
            inputs,
            responses,
            state.scores,
            excluded,
            num_broken + num_broken_responses,
            [example.prompt_ids + example.response.ids for example in examples],
        )

    def _objective(
        self,
        model: ShardedModel,
        guard: Guard | ClassifierGuard | None,
        inputs: Inputs,
        examples: Sequence[Example],
        gradients: GradientShards,
        tracker: Tracker,
    ) -> Objective:
        """What the estimator makes of the examples. ``score_function`` asks for all scores first, and for no more."""
        config = self.config
        pad = inputs.tokenizer.pad_token_id
        if config.esi.estimator != "score_function":
            vocabulary = VocabularyMap(inputs.tokenizer, inputs.judge.tokenizer, model.num_logits)
            return SafetyObjective(config, model, guard, vocabulary, examples, gradients, pad)
        if guard is None:
            scores = {example.index: inputs.given_scores[example.index] for example in examples}
        else:
            scores = judge_scores(guard, examples, config.esi.batch_size, self.folder.path / CHECKPOINTS, tracker)
        return ScoreFunctionObjective(config, model, scores, examples, gradients, pad)

    def _accumulate_loss(self, model: ShardedModel, loss: LossRows, tracker: Tracker) -> LossOutcome:
        """The pass over the rows of one loss. Raises UserError where no row can be used."""
        rows, device = loss.rows, self._accumulator_device()
        tracker.log(f"{loss.describe()}; {len(rows.skipped)} skipped, {rows.num_cut} cut")
        for number, reason in rows.skipped[:5]:
            tracker.log(f"skipped row {number} of data.{loss.name}: {reason}")
        if loss.name == "benign":
            objective = SquaredRowGradients(
                loss.name, model, rows.sequences, SquaredGradientShards(model, device), loss.pad
            )
        else:
            batch_size = self.config.esi.batch_size
            objective = MeanLoss(loss.name, model, rows.sequences, GradientShards(model, device), loss.pad, batch_size)
        state = self._run_pass(model, objective, tracker)
        used = [sequence for sequence in rows.sequences if sequence.row not in state.excluded]
        if not used:
            raise UserError(
                f"data.{loss.name}.path",
                loss.path,
                f"none of its {len(rows.sequences)} rows gave a finite gradient",
                "look at its rows; is the model sound?",
            )
        accumulated = Accumulated(objective.gradients.sums, objective.count(used))
        return LossOutcome(loss, accumulated, len(used), state.scores, state.excluded)

    def _run_pass(self, model: ShardedModel, objective: Objective, tracker: Tracker) -> PassState:
        """One pass; its checkpoints stay until the run is done, for a later pass may be interrupted too."""
        folder = self.folder.path / CHECKPOINTS / objective.name
        state = ScoringPass(self.config, model, objective, folder, tracker, self._first_step).run()
        self._first_step += len(objective.examples)
        return state

    def _accumulator_device(self) -> torch.device:

        return torch.device("cpu") if self.config.esi.accumulator_device == "cpu" else runtime.device()

    def _contrast(self, model: ShardedModel, scores: Scores, benign: Accumulated) -> None:
        """Scores divided by how much benign rows need each weight. Raises UserError where that is a division by 0."""
        undefined = contrast_scores(model, scores, benign)
        if undefined:
            raise UserError(
                "data.benign.path",
                self.config.data.benign.path,
                f"leaves more than half of the scored weights without any gradient, and {undefined:,} of these have a "
                "score to be divided by it",
                "give more rows, or set select.contrastive: false",
            )
