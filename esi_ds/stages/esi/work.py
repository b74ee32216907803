"""The ESI stage: prompts with responses, or rows → gradient sums → scores → mask → report (docs/method.md §1, §2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from esi_ds.artifacts import CHECKPOINTS
from esi_ds.core.batch_size import scoring_bytes, surrogate_bytes
from esi_ds.data.thoughts import absent_marks
from esi_ds.errors import UserError
from esi_ds.judge.classifier import ClassifierGuard
from esi_ds.judge.guard import Guard
from esi_ds.judge.tokens import TokenGuard
from esi_ds.judge.vocabulary import VocabularyMap
from esi_ds.models.folder import ModelSource, max_positions
from esi_ds.models.roles import unrecognised_note
from esi_ds.models.rows import probe_ids
from esi_ds.models.widths import widths
from esi_ds.stages.batch_sizes import longest_prompt
from esi_ds.stages.esi.finish import AnsweredPrompts, LossOutcome, PromptOutcome, finish_esi
from esi_ds.stages.esi.judge_scores import judge_scores
from esi_ds.stages.esi.losses import LossRows
from esi_ds.stages.esi.masks import SharedGradients
from esi_ds.stages.esi.objectives import (
    LossObjective,
    MeanLoss,
    ResponseObjective,
    SafetyObjective,
    ScoreFunctionObjective,
    SquaredRowGradients,
)
from esi_ds.stages.esi.prepare import (
    EsiInputs,
    Example,
    PreparedEsiJudge,
    PromptInputs,
    asked_with,
    clean,
    clean_responses,
    encode_examples,
    encode_prompts,
    thoughts_note,
)
from esi_ds.stages.esi.respond import NAME, respond, write_responses
from esi_ds.stages.esi.score import Objective, PassData, PassState, ScoringPass
from esi_ds.stages.esi.served import ask_endpoint, check_reachable
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.run import StageRun
from esi_ds.stages.saving import SaveClock
from esi_ds.words import counted
from esi_ds.zero import memory, runtime
from esi_ds.zero.batching import batch_size_for, check_causal, check_gradient, fitting_rows, reason_of_all_ranks
from esi_ds.zero.engine import ShardedModel, recompute_activations
from esi_ds.zero.gradients import GradientShards, SquaredGradientShards
from esi_ds.zero.placement import load_judge
from esi_ds.zero.score import Accumulated


class EsiRun(StageRun[EsiInputs]):
    """One run of the stage on this rank: one pass per objective, each with its own gradient sums."""

    stage = "esi"

    @property
    def judge_sources(self) -> list[ModelSource]:
        judge = self.inputs.judge
        return [ModelSource.of(judge.section, "judge")] if judge else []

    _passes: tuple[ScoringPass, ...] = ()  # begun or finished

    @cached_property
    def _saves(self) -> SaveClock:
        return SaveClock(self.config.esi.save_every, self.config.run.save_every_min)

    def work(self) -> None:
        config, judge = self.config, self.inputs.judge
        if self.inputs.served is not None:
            check_reachable(self.inputs.served, self.folder.path)
        with self.phase("loading"):
            guard = self._load_guard(judge) if judge is not None else None
            model = self.load_model()
        if note := unrecognised_note(model.parameters):
            self.tracker.log(note)
        if config.model.gradient_checkpointing:
            recompute_activations(model.module)
        if ids := self._any_ids():
            check_gradient(model, ids)
        self.begin(model)
        # All are answered before any is scored: a stop during the answers finds no sums that are not saved.
        answered = [self._answer(model, inputs) for inputs in self.inputs.prompts]
        scored = [self._accumulate_scores(model, guard, answers) for answers in answered]
        if guard is not None:
            guard.close()
            del guard
            memory.collect()
        with self.phase("scoring"):
            losses = [self._accumulate_loss(model, loss) for loss in self.inputs.losses]
        outcomes: list[PromptOutcome | LossOutcome] = [*scored, *losses]
        accumulated = {outcome.name: outcome.accumulated for outcome in outcomes}
        check_stop("everything scored", self._passes[-1].save if self._passes else None)
        with self.phase("selecting and writing"):
            finish_esi(self, model, SharedGradients(config, model, accumulated), scored, losses)
        model.close()

    def _any_ids(self) -> list[int]:
        """Ids of some text that the model can read; none for a criterion without gradients."""
        if self.inputs.prompts:
            return probe_ids(self.inputs.prompts[0].tokenizer)
        return next((loss.rows.sequences[0].ids for loss in self.inputs.losses), [])

    def _load_guard(self, judge: PreparedEsiJudge) -> Guard:
        """The judge with its weights. Collectives: those of ``load_judge``, of two passes of it, and an all-reduce."""
        section = judge.section
        module, weights, note = load_judge(
            section, "judge", judge.config, self.config.model.dtype, self.deepspeed_config
        )
        self.tracker.log(f"judge: family {judge.family.name}, {note}")
        if judge.labels:
            guard: Guard = ClassifierGuard(module, judge.tokenizer, section.score, weights, *judge.labels)
        else:
            kind = TokenGuard if judge.family.reads == "tokens" else Guard
            guard = kind(module, judge.tokenizer, section.score, weights)
        if self.config.esi.batch_size != 1 and (reason := reason_of_all_ranks(guard.why_alone(runtime.device()))):
            guard.max_batch = 1
            self.tracker.remark(f"the judge reads one response at a time: {reason}")
        return guard

    def _answer(self, model: ShardedModel, inputs: PromptInputs) -> AnsweredPrompts:
        """The responses of one objective. Raises UserError where no prompt can be used, and Interrupted."""
        config, data = self.config, inputs.data
        name = f"{inputs.prefix}prompts".replace("_", " ")
        self.tracker.log(
            f"{name}: {len(data.prompts)} from {data.origin}, {counted(len(data.skipped), 'row')} skipped{data.note}"
        )
        for remark in data.remarks:
            self.tracker.remark(remark)
        prompts, num_broken = clean(inputs, data.prompts)
        prompt_ids = encode_prompts(inputs, config, prompts)
        unanswered = dict(data.unanswered)
        with self.phase("responding"):
            if data.served:
                asked = data.served, data.prompts, self.folder.path, self.tracker, data.goals
                responses, unanswered = ask_endpoint(*asked, control=inputs.name == "control")
            else:
                longest = longest_prompt(prompt_ids, max_positions(inputs.model_config))
                batch = self.generation_batch(config.esi, longest, f"{inputs.prefix}generation")
                responses = respond(config, inputs, model, prompt_ids, self.folder.path, batch, self.tracker)
        if absent := absent_marks(responses, config.model.thought_marks):
            self.tracker.remark(f"no response holds {' or '.join(absent)} of model.thought_marks")
        cleaned, num_broken_responses = clean_responses(inputs, prompt_ids, responses)
        if note := thoughts_note(inputs, cleaned):
            self.tracker.remark(note)
        length = config.esi.max_new_tokens
        examples, excluded = encode_examples(inputs, prompt_ids, prompts, cleaned, length, data.goals)
        excluded.update(unanswered)
        if not examples:
            raise self._none_usable(inputs, responses, excluded)
        return AnsweredPrompts(inputs, responses, examples, excluded, num_broken + num_broken_responses)

    def _accumulate_scores(self, model: ShardedModel, guard: Guard | None, answered: AnsweredPrompts) -> PromptOutcome:
        """The scoring pass over answered prompts. Raises UserError where none gives a gradient."""
        inputs, examples, excluded = answered.inputs, answered.examples, dict(answered.excluded)
        gradients = GradientShards(model, self._accumulator_device())
        with self.phase("scoring"):
            state = self._run_pass(model, self._objective(model, guard, inputs, examples, gradients))
        excluded.update(state.excluded)
        self._write_responses(inputs, answered.responses, state.scores, excluded)
        num_prompts = len(inputs.data.prompts) - len(excluded)
        if num_prompts == 0:
            raise UserError(
                inputs.field,
                counted(len(inputs.data.prompts), "prompt"),
                "none gave a finite gradient",
                f"look at {inputs.prefix}{NAME} in the run folder; is the model sound?",
            )
        return PromptOutcome(
            Accumulated(gradients.sums, num_prompts),
            inputs,
            answered.responses,
            state.scores,
            excluded,
            answered.special_tokens_broken_up,
            [example.ids for example in examples],
        )

    def _none_usable(self, inputs: PromptInputs, responses: Sequence[str], excluded: dict[int, str]) -> UserError:
        """The error, behind ``responses.jsonl`` with the reasons. A file of responses has the rows already, and nothing
        is written: once it is corrected, the folder may be used again."""
        responses_name = f"{inputs.prefix}{NAME} in the run folder"
        if inputs.data.responses is None:
            self._write_responses(inputs, responses, {}, excluded)
        else:
            responses_name = f"the rows of {inputs.data.source['responses']}"
        reasons, number = "; ".join(sorted(set(excluded.values()))), counted(len(responses), "prompt")
        return UserError(inputs.field, number, f"none can be used ({reasons})", f"look at {responses_name}")

    def _write_responses(
        self, inputs: PromptInputs, responses: Sequence[str], scores: dict[int, float], excluded: dict[int, str]
    ) -> None:
        """``responses.jsonl`` of an objective, by rank 0. scores, excluded: J and the reason, by a prompt's index."""
        if runtime.is_main():
            data, folder = inputs.data, self.folder.path
            rows = data.prompts, responses, scores, excluded, data.goals
            write_responses(folder, *rows, inputs.prefix, asked_with(self.config, data))

    def _objective(
        self,
        model: ShardedModel,
        guard: Guard | None,
        inputs: PromptInputs,
        examples: Sequence[Example],
        gradients: GradientShards,
    ) -> ResponseObjective:
        """The objective of ``esi.estimator``. ``score_function`` has every response judged first, and only scored."""
        config = self.config
        pad = inputs.tokenizer.pad_token_id
        learnt = max(len(example.ids) for example in examples) - min(len(example.prompt_ids) for example in examples)
        longest, name = max(len(example.ids) for example in examples), inputs.name
        batch_size = self._scoring_batch(name, model, longest, learnt, guard)
        data = PassData(name, model, examples, gradients, pad=pad, batch_size=batch_size)
        if config.esi.estimator == "score_function":
            return ScoreFunctionObjective(data, self._response_scores(guard, inputs, examples, batch_size))
        assert guard is not None  # require_esi: only score_function does without a judge
        vocabulary = VocabularyMap(inputs.tokenizer, guard.tokenizer, model.num_logits)
        return SafetyObjective(data, config, guard, vocabulary)

    def _response_scores(
        self, guard: Guard | None, inputs: PromptInputs, examples: Sequence[Example], batch_size: int
    ) -> dict[int, float]:
        """J by example index: of the guard, or as read with the responses."""
        if guard is not None:
            file = self.folder.path / CHECKPOINTS / f"{inputs.prefix}judge_scores.jsonl"
            save = self._passes[-1].save if self._passes else None
            name = f"{inputs.prefix}judge"
            return judge_scores(guard, examples, batch_size, file, self.tracker, save, name)
        scores = inputs.data.scores
        assert scores is not None  # require_esi
        return {example.index: scores[example.index] for example in examples}

    def _accumulate_loss(self, model: ShardedModel, loss: LossRows) -> LossOutcome:
        """The pass over the rows of one loss. Raises UserError where no row can be used."""
        rows, device = loss.rows, self._accumulator_device()
        self.tracker.log(f"{loss.describe()}; {rows.counts}")
        for number, reason in rows.skipped[:5]:
            self.tracker.log(f"skipped row {number} of {loss.field}: {reason}")
        squared = loss.name == "benign"
        gradients = (SquaredGradientShards if squared else GradientShards)(model, device)
        longest = max(len(sequence.ids) for sequence in rows.sequences)
        batch_size = 1 if squared else self._scoring_batch(loss.name, model, longest, longest)
        data = PassData(loss.name, model, rows.sequences, gradients, pad=loss.pad, batch_size=batch_size)
        objective: LossObjective = (SquaredRowGradients if squared else MeanLoss)(data)
        state = self._run_pass(model, objective)
        used = [sequence for sequence in rows.sequences if sequence.row not in state.excluded]
        if not used:
            raise UserError(
                f"{loss.field}.path",
                loss.path,
                f"none of its {len(rows.sequences)} rows gave a finite gradient",
                "look at its rows; is the model sound?",
            )
        accumulated = Accumulated(objective.gradients.sums, objective.count(used))
        return LossOutcome(loss, accumulated, len(used), state.scores, state.excluded)

    def _scoring_batch(
        self, purpose: str, model: ShardedModel, longest: int, learnt: int, guard: Guard | None = None
    ) -> int:
        """``esi.batch_size``, where it is ``auto`` as many rows as fit beside the sums of gradients, which are there.

        longest: tokens of the longest row. learnt: how many of its last positions have logits. guard: which judges the
        same rows first; its template is taken to double them. Collectives: at most one all-reduce.
        """
        recompute, size = self.config.model.gradient_checkpointing, self.batch_size(self.config.esi.batch_size, purpose)

        def fitting() -> int:
            sizes = widths(model.module.config)
            row = scoring_bytes(sizes, model.weight_bytes, longest, learnt, recompute)
            if guard is not None:
                weight = guard.model.dtype.itemsize
                row = max(row, scoring_bytes(widths(guard.model.config), weight, 2 * longest, 1, recompute=False))
            fixed = model.passing_bytes(backward=True, recompute=recompute) + surrogate_bytes(sizes, learnt)
            return fitting_rows(row, fixed)

        number = size.resolve(fitting)
        if size.note:
            self.tracker.log(f"scoring ({purpose}) {size.note}")
        return number

    def _run_pass(self, model: ShardedModel, objective: Objective[Any]) -> PassState:
        """One pass. Its checkpoints stay until the run is done, and its sums, which a later pass saves with its own.

        Raises UserError where the model is not causal. Collectives: those of the pass, and of ``zero.batching``.
        """
        ids, batch_size = objective.examples[0].ids, objective.batch_size
        check_causal(model, ids, objective.pad)
        longest = max(len(example.ids) for example in objective.examples)
        objective.batch_size, note = batch_size_for(model, ids, objective.pad, batch_size, longest)
        if note:
            self.tracker.remark(f"one {objective.unit} a forward pass: {note}")
        folder = self.folder.path / CHECKPOINTS / objective.name
        scoring = ScoringPass(self.config, model, objective, folder, self.tracker, self._saves, self._passes)
        self._passes += (scoring,)
        state = scoring.run()
        objective.release()
        return state

    def _accumulator_device(self) -> torch.device:
        """Where gradient sums are kept."""
        return torch.device("cpu") if self.config.esi.accumulator_device == "cpu" else runtime.device()
