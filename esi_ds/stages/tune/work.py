"""SET and SPA: mask and rows → a tuned model whose frozen weights keep every bit (docs/method.md §3)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from esi_ds import patch
from esi_ds.artifacts import CHECKPOINTS, new_folder, replace_folder, temporary_name, wait_until_visible
from esi_ds.config.needs import unread_benign
from esi_ds.core.mask import Mask, identity_of_bits
from esi_ds.data.chat import day_of, without_our_padding
from esi_ds.data.template_values import without_values
from esi_ds.data.thoughts import MARKS, Marks, marks_with, opening_mark
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError
from esi_ds.eval.refusals import is_refusal
from esi_ds.journal import Journal
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource, checkpoint_folder, max_positions, quantisation_of
from esi_ds.models.rows import alike_up_to
from esi_ds.report.card import model_card
from esi_ds.report.contents import TunedAnswerRow
from esi_ds.report.tuning import refusal_rows, thought_notes
from esi_ds.stages.batch_sizes import longest_prompt
from esi_ds.stages.respond import GeneratedRow, by_index, generate_all, keep_in
from esi_ds.stages.run import StageRun, check_mask_bits
from esi_ds.stages.saving import SaveClock
from esi_ds.stages.tune.drift import drift_rows, measure_before
from esi_ds.stages.tune.finish import finish_tuning
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.stages.tune.training import Training
from esi_ds.zero import runtime
from esi_ds.zero.batching import batch_size_for, check_causal, check_gradient
from esi_ds.zero.dense import DenseTuner
from esi_ds.zero.engine import ShardedModel, recompute_activations
from esi_ds.zero.export import export_model
from esi_ds.zero.optimizer import MaskedAdamW
from esi_ds.zero.sparse import SparseTuner, choose_reduction
from esi_ds.zero.tuner import Rule, Tuner

ANSWERS, MASK_FIELD = "answers.jsonl", "tune.mask"
Answers = dict[str, dict[int, str]]  # set of questions → index → answer


class TuneRun(StageRun[TuningInputs]):
    """One run of SET or SPA on this rank."""

    @property
    def stage(self) -> str:
        return self.inputs.stage

    @property
    def masks(self) -> dict[str, Mask]:
        return {MASK_FIELD: self.inputs.mask}

    def work(self) -> None:
        config, inputs, tracker = self.config, self.inputs, self.tracker
        check_mask_bits(inputs.mask, MASK_FIELD)
        with self.phase("loading"):
            model, make_tuner = self._load()
        self.begin(model)
        same_weights = self.accept_mask(inputs.mask, MASK_FIELD)
        self._log_inputs(same_weights)
        if config.model.gradient_checkpointing:
            recompute_activations(model.module)
        self._check_batches(model)
        measure_before(self, model)
        with self.phase("answering"):
            before = self._answers(model, "before") if inputs.eval is not None and inputs.eval.before else None
        saves = SaveClock(inputs.tune.save_every, config.run.save_every_min)
        training = Training(inputs, make_tuner(), config.run.seed, self.folder.path / CHECKPOINTS, tracker, saves)
        with self.phase("training"):
            training.run()
        if training.first_step < inputs.tune.max_steps:
            self._forget_answers()
        if inputs.questions:  # answers are kept as they come, and a restart must go on with the model that gave them
            training.save()
        training.tuner.close()  # the model's answers need its memory
        with self.phase("answering"):
            after = self._answers(model, "after")
        routing_drift = drift_rows(self, model)
        answer_rows = self._write_answers(before, after)
        with self.phase("exporting"):
            patch_summary = self._export(model, training)
        model.close()
        finish_tuning(self, training, patch_summary, answer_rows, routing_drift)

    def _load(self) -> tuple[ShardedModel, Callable[[], Tuner]]:
        """The sharded model, and what makes its tuner, which reads the weights when it is made.

        SPA's optimizer must be there when the model is loaded: its engine is the standard ZeRO-3 one.
        """
        tune, trained = self.inputs.tune, self.inputs.trained
        rule = Rule((tune.betas[0], tune.betas[1]), tune.eps, tune.weight_decay, tune.clip)
        if self.inputs.stage == "set":
            model = self.load_model()
            reduction, reason = choose_reduction(trained.total, tune.reduction)
            self.tracker.log(f"gradients: {reduction} ({reason})")
            return model, partial(SparseTuner, model, trained, rule, reduction)
        optimizers: list[MaskedAdamW] = []

        def make_optimizer(module: PreTrainedModel) -> MaskedAdamW:
            optimizer = MaskedAdamW.of(
                module, trained, lr=tune.lr, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay
            )
            optimizers.append(optimizer)
            return optimizer

        model = self.load_model(make_optimizer)
        return model, partial(DenseTuner, model, optimizers[0])

    def _check_batches(self, model: ShardedModel) -> None:
        """Raise UserError if a row's loss has no gradient, depends on later tokens, or depends on the rows beside it.

        Collectives: those of ``check_gradient``, ``check_causal`` and ``batch_size_for``.
        """
        tune, rows, benign = self.inputs.tune, self.inputs.rows.sequences, self.inputs.benign
        ids, pad = rows[0].ids, self.inputs.tokenizer.pad_token_id
        longest = max(len(row.ids) for row in (*rows, *(benign.sequences if benign is not None else ())))
        check_gradient(model, ids)
        check_causal(model, ids, pad)
        _, problem = batch_size_for(model, ids, pad, tune.batch_size, longest)
        if problem is not None:
            accumulation = tune.batch_size * tune.gradient_accumulation
            limit = alike_up_to(model.module.config)
            remedy = f"set tune.batch_size: 1 and tune.gradient_accumulation: {accumulation}, which is the same update"
            if limit is not None and longest > limit:
                remedy += f", or tune.max_length: {limit}"
            raise UserError(
                "tune.batch_size",
                tune.batch_size,
                f"is more than this model can read at once: {problem}",
                remedy,
            )

    def _log_inputs(self, same_weights: bool) -> None:
        inputs, tracker = self.inputs, self.tracker
        mask, benign = inputs.mask, inputs.benign
        tracker.log(f"mask: {mask.k:,} weights by {mask.header.criterion}, {inputs.trained.total:,} train")
        if not same_weights:
            tracker.log("mask: made from OTHER weights of the same shapes, as --allow-fingerprint-mismatch allows")
        for name, rows in (("rows", inputs.rows), ("benign rows", benign)):
            if rows is not None:
                tracker.log(f"{name}: {len(rows.sequences)} of columns {rows.columns}, {rows.counts}")
        for line in unread_benign(inputs.tune):
            tracker.remark(line)
        for number, reason in [*inputs.rows.skipped, *(benign.skipped if benign is not None else ())][:5]:
            tracker.log(f"skipped row {number}: {reason}")
        if inputs.broken_up:
            tracker.log(f"prompts: special tokens broken up: {inputs.broken_up}")
        for name, index, reason in inputs.unanswered:
            tracker.log(f"{name} prompt {index} is not asked: {reason}")

    def _answers(self, model: ShardedModel, when: Literal["before", "after"]) -> Answers:
        """Greedy answers to every question.

        They are kept on disk as they are generated, so that a resumed run generates none twice. Collectives: a
        broadcast for each set, and those of ``generate_all``. Raises Interrupted.
        """
        inputs, section = self.inputs, self.inputs.eval
        answers: Answers = {}
        if section is None:
            return answers
        limit = max_positions(inputs.model_config)
        longest = max((longest_prompt(ids.values(), limit) for ids in inputs.question_ids.values()), default=1)
        batch = self.generation_batch(section, longest)  # the same before and after
        for name, prompt_ids in inputs.question_ids.items():
            journal = Journal(self.folder.path / f"answers.{name}.{when}.partial.jsonl", GeneratedRow)
            responses = runtime.from_main(partial(by_index, journal))
            generate_all(
                model,
                inputs.tokenizer,
                inputs.end_ids,
                prompt_ids,
                responses,
                max_new_tokens=section.max_new_tokens,
                batch=batch,
                generation="auto",
                keep=keep_in(journal),
                tracker=self.tracker,
                description=f"answer: {name} {when}",
                marks=marks_with(self.config.model.thought_marks),
            )
            answers[name] = responses
        return answers

    def _forget_answers(self) -> None:
        """Drop what was answered after tuning: the weights have been trained again since. One broadcast."""

        def forget() -> None:
            for kept in self.folder.path.glob("answers.*.after.partial.jsonl"):
                kept.unlink()

        runtime.from_main(forget)

    def _write_answers(self, before: Answers | None, after: Answers) -> list[TunedAnswerRow]:
        """The rows of ``answers.jsonl``, which rank 0 writes; none on other ranks, or without questions."""
        rows: list[TunedAnswerRow] = []
        if not runtime.is_main() or not self.inputs.questions:
            return rows
        marks = marks_with(self.config.model.thought_marks)
        for name, prompts in self.inputs.questions.items():
            for index in self.inputs.question_ids[name]:
                answer_before = before[name][index] if before is not None else None
                opening = opening_mark(self.inputs.tokenizer, self.inputs.question_ids[name][index], marks)
                rows.append(answer_row(name, index, prompts[index], answer_before, after[name][index], opening, marks))
        Journal(self.folder.path / ANSWERS, TunedAnswerRow).replace(rows)
        for note in thought_notes(refusal_rows(rows, marks)):
            self.tracker.remark(note)
        return rows

    def _export(self, model: ShardedModel, training: Training) -> patch.PatchSummary | None:
        """Write ``model/`` and ``patch/``; the patch's summary on rank 0, None on others or without a patch.

        Collectives: those of ``export_model`` and ``_patch``.
        """
        inputs, folder = self.inputs, self.folder.path
        tune = inputs.tune
        if not tune.export and not tune.patch:
            return None
        tuned = folder / ("model" if tune.export else ".model-for-patch")
        quantisation = quantisation_of(ModelSource.of(self.config.model))
        card = model_card(
            self.config,
            tune,
            stage=inputs.stage,
            fingerprint=self.fingerprint,
            trained=inputs.trained,
            ranks=runtime.world_size(),
            rows=inputs.rows,
            benign=inputs.benign,
            num_benign=training.num_benign,
            dequantised_from=None if quantisation is None else str(quantisation),
            rounded_from=self.rounded_from,
            remarks=self.remarks,
        )
        section = self.config.model
        plain = without_values(without_our_padding(inputs.tokenizer), section.template_kwargs, day_of(section))
        is_whole = model.module.config.model_type == inputs.model_config.model_type  # not the text part alone
        base = checkpoint_folder(ModelSource.of(section)) if is_whole else None
        export_model(model, tuned, plain, card, base)
        summary = self._patch(tuned) if tune.patch else None
        if not tune.export and runtime.is_main():
            shutil.rmtree(tuned)
        return summary

    def _patch(self, tuned: Path) -> patch.PatchSummary | None:
        """Write ``patch/``; ranks share the files. Its summary on rank 0, None on others.

        Collectives: one gather of rows and digests, and two barriers.
        """
        folder = self.folder.path / "patch"
        base = checkpoint_folder(ModelSource.of(self.config.model))
        temporary = temporary_name(folder)
        if runtime.is_main():
            new_folder(temporary)
        runtime.barrier()
        rank, ranks = runtime.rank(), runtime.world_size()
        rank_rows = patch.create_part(base, wait_until_visible(tuned), wait_until_visible(temporary), rank, ranks)
        rank_digests = patch.base_digests(base, tuned, rank, ranks), tensor_digests(tuned, rank, ranks)
        rows, base_digests, tuned_digests = dict[str, patch.TensorChange](), dict[str, str](), dict[str, str]()
        for part_rows, (part_base, part_tuned) in runtime.gather_objects((rank_rows, rank_digests)):
            rows |= part_rows
            base_digests |= part_base
            tuned_digests |= part_tuned
        if runtime.is_main():
            mask = self.inputs.mask
            facts: dict[str, Any] = {"method": self.inputs.stage, "mask_fingerprint": mask.fingerprint}
            facts |= {**identity_of_bits(mask), **patch.template_change(base, tuned)}
            patch.finish(base, temporary, rows, base_digests, tuned_digests, facts)
            replace_folder(temporary, folder)
        runtime.barrier()
        return patch.summary(folder) if runtime.is_main() else None


def answer_row(
    set_name: str,
    index: int,
    prompt: Prompt,
    before: str | None,
    after: str,
    opening: str | None = None,
    marks: Marks = MARKS,
) -> TunedAnswerRow:
    """A line of ``answers.jsonl``. before: None if nothing was asked before tuning.

    opening: the mark with which the prompt has opened a thought.
    """
    if before is None:
        return {
            "set": set_name,
            "index": index,
            "prompt": prompt,
            "after": after,
            "refused_after": is_refusal(after, opening, marks),
        }
    return {
        "set": set_name,
        "index": index,
        "prompt": prompt,
        "before": before,
        "after": after,
        "refused_before": is_refusal(before, opening, marks),
        "refused_after": is_refusal(after, opening, marks),
    }
