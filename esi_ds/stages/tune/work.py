"""SET and SPA: mask and rows → a tuned model whose frozen weights keep every bit (docs/method.md §3)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from esi_ds import patch
from esi_ds.artifacts import read_jsonl, replace_folder, wait_until_visible, write_text_atomic
from esi_ds.data.chat import break_up, encode_prompt
from esi_ds.eval.refusals import is_refusal
from esi_ds.models.fingerprint import check_mask_weights, tensor_digests
from esi_ds.models.folder import ModelSource, checkpoint_folder, max_positions
from esi_ds.report.card import model_card
from esi_ds.stages.respond import generate_all, keep_in
from esi_ds.stages.run import CHECKPOINTS, StageRun, check_mask_bits
from esi_ds.stages.tune.drift import drift_rows, measure_before
from esi_ds.stages.tune.finish import finish_tuning
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.stages.tune.training import Training
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.dense import DenseTuner
from esi_ds.zero.export import export_model
from esi_ds.zero.optimizer import MaskedAdamW
from esi_ds.zero.sparse import SparseTuner, choose_reduction
from esi_ds.zero.tuner import Rule

ANSWERS = "answers.jsonl"


class TuneRun(StageRun[TuningInputs]):
    """One run of SET or SPA on this rank."""

    @property
    def stage(self) -> str:
        return self.inputs.stage

    def work(self) -> None:
        config, inputs, tracker = self.config, self.inputs, self.tracker
        check_mask_bits(inputs.mask, "tune.mask")
        model, make_tuner = self._load(tracker)
        self.begin(model)
        same = check_mask_weights(
            inputs.mask, self.fingerprint, self.options.allow_fingerprint_mismatch, field="tune.mask"
        )
        self.notes = {"mask_fingerprint": inputs.mask.fingerprint, "mask_made_from_these_weights": same}
        self.record("running")
        self._log_inputs(tracker, same)
        if config.model.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        measure_before(self, model)
        answers = {}
        if config.eval is not None and config.eval.before:
            answers["before"] = self._answers(model, "before", tracker)
        training = Training(
            config,
            make_tuner(),
            inputs.rows,
            inputs.benign,
            inputs.tokenizer.pad_token_id,
            self.folder.path / CHECKPOINTS,
            tracker,
        )
        training.run()
        answers["after"] = self._answers(model, "after", tracker)
        moved = drift_rows(self, model)
        self._write_answers(answers)
        changed = self._export(model)
        finish_tuning(self, training, changed, self._read_answers(), moved, tracker)

    def _load(self, tracker: Tracker):
        """The sharded model, and what makes its tuner. The tuner reads the weights: before answers, any time."""
        config, tune, trained = self.config, self.config.tune, self.inputs.trained
        rule = Rule(tuple(tune.betas), tune.eps, tune.weight_decay, tune.clip)
        optimizers: list[MaskedAdamW] = []

        def make_optimizer(module) -> MaskedAdamW:
            made = MaskedAdamW(
                module,
                self.inputs.mask,
                trained.train,
                lr=tune.lr,
                betas=rule.betas,
                eps=rule.eps,
                weight_decay=rule.weight_decay,
                unscored=tune.unscored,
                router=tune.router,
                roles=config.model.roles,
            )
            optimizers.append(made)
            return made

        model = self.load_model(make_optimizer if self.inputs.stage == "spa" else None)
        if self.inputs.stage == "spa":
            return model, lambda: DenseTuner(model, trained, optimizers[0])
        reduction, reason = choose_reduction(trained.total, tune.reduction)
        tracker.log(f"gradients: {reduction} ({reason})")
        return model, lambda: SparseTuner(model, trained, rule, reduction)

    def _log_inputs(self, tracker: Tracker, same: bool) -> None:
        inputs, tune = self.inputs, self.config.tune
        mask, rows = inputs.mask, inputs.rows
        tracker.log(f"mask: {mask.k:,} weights by {mask.metadata.get('criterion')}, {inputs.trained.total:,} train")
        if not same:
            tracker.log("mask: made from OTHER weights of the same shapes, as --allow-fingerprint-mismatch allows")
        for name, found in (("rows", rows), ("benign rows", inputs.benign)):
            if found is not None:
                tracker.log(
                    f"{name}: {len(found.sequences)} of columns {found.columns}, {len(found.skipped)} skipped, "
                    f"{found.num_cut} cut at {tune.max_length} tokens"
                )
        for number, reason in [*rows.skipped, *(inputs.benign.skipped if inputs.benign else ())][:5]:
            tracker.log(f"skipped row {number}: {reason}")

    def _answers(self, model, when: str, tracker: Tracker) -> dict[str, list[str]]:
        """Greedy answers to every question; kept on disk as they are made, so that a resumed run makes none twice."""
        config, inputs, made = self.config, self.inputs, {}
        for name, prompts in inputs.questions.items():
            partial = self.folder.path / f"answers.{name}.{when}.partial.jsonl"
            rows = read_jsonl(partial) if runtime.is_main() and partial.is_file() else []
            done = runtime.broadcast_object({row["index"]: row["response"] for row in rows})
            cleaned = [break_up(prompt, inputs.specials)[0] for prompt in prompts]
            generate_all(
                model,
                inputs.tokenizer,
                [encode_prompt(inputs.tokenizer, prompt, config.model.system_prompt) for prompt in cleaned],
                done,
                limit=max_positions(inputs.model_config),
                max_new_tokens=config.eval.max_new_tokens,
                batch_size=config.eval.batch_size,
                generation="auto",
                keep=keep_in(partial),
                tracker=tracker,
                description=f"answer: {name} {when}",
            )
            made[name] = [done[index] for index in range(len(prompts))]
        return made

    def _write_answers(self, answers: dict[str, dict[str, list[str]]]) -> None:
        if not runtime.is_main() or not self.inputs.questions:
            return
        lines = []
        for name, prompts in self.inputs.questions.items():
            for index, prompt in enumerate(prompts):
                said = {when: made[name][index] for when, made in answers.items()}
                refused = {f"refused_{when}": is_refusal(text) for when, text in said.items()}
                row = {"set": name, "index": index, "prompt": prompt, **said, **refused}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text_atomic(self.folder.path / ANSWERS, "".join(lines))

    def _read_answers(self) -> list[dict]:
        file = self.folder.path / ANSWERS
        return read_jsonl(file) if runtime.is_main() and file.is_file() else []

    def _export(self, model) -> dict | None:
        """``model/`` and ``patch/``; the patch's summary on rank 0."""
        tune, folder = self.config.tune, self.folder.path
        if not tune.export and not tune.patch:
            return None
        target = folder / ("model" if tune.export else ".model-for-patch")
        export_model(model, target, self.inputs.tokenizer, model_card(self.config, self.inputs, self.fingerprint))
        found = self._patch(target) if tune.patch else None
        if not tune.export and runtime.is_main():
            shutil.rmtree(target)
        return found

    def _patch(self, tuned: Path) -> dict | None:
        """Ranks share the files. Three gathers of small objects and two barriers."""
        folder = self.folder.path / "patch"
        base = checkpoint_folder(ModelSource.of(self.config.model))
        temporary = folder.with_name(".patch.tmp")
        if runtime.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        runtime.barrier()
        rank, ranks = runtime.rank(), runtime.world_size()
        part = (
            patch.create_part(base, wait_until_visible(tuned), wait_until_visible(temporary), rank, ranks),
            *(tensor_digests(m, rank, ranks) for m in (base, tuned)),
        )
        merged: tuple[dict, dict, dict] = ({}, {}, {})
        for parts in runtime.gather_objects(part):
            for target, found in zip(merged, parts, strict=True):
                target.update(found)
        if runtime.is_main():
            facts = {"method": self.inputs.stage, "mask_fingerprint": self.inputs.mask.fingerprint}
            patch.finish(base, temporary, *merged, facts)
            replace_folder(temporary, folder)
        runtime.barrier()
        return patch.summary(folder) if runtime.is_main() else None
