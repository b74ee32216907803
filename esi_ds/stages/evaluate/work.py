"""Evaluation: prompts → every model's answers → every judge's verdicts → rates, report (docs/method.md §4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property

from transformers import AutoModelForCausalLM

from esi_ds.data.thoughts import marks_with
from esi_ds.errors import UserError
from esi_ds.eval.rows import TaskRow
from esi_ds.models.folder import ModelSource
from esi_ds.models.meta import meta_parameters, model_bytes
from esi_ds.models.rows import alike_up_to, frequencies_note
from esi_ds.stages.batch_sizes import longest_prompt
from esi_ds.stages.evaluate.answering import add_recorded, answer_all, surprise_all, to_read_again
from esi_ds.stages.evaluate.divergence import compare_all, waiting_answers
from esi_ds.stages.evaluate.finish import finish_eval
from esi_ds.stages.evaluate.ledgers import EvalLedgers
from esi_ds.stages.evaluate.prepare import BASE, WHOLE_MODEL, WITHOUT_TASKS, Candidate, EvalInputs
from esi_ds.stages.interrupt import check_stop, stop_requested
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.questions import answer_keys
from esi_ds.stages.run import StageRun
from esi_ds.stages.served import AnswerRounds, ServedModel
from esi_ds.words import counted
from esi_ds.zero import memory, runtime
from esi_ds.zero.engine import load_replicated, load_sharded

TASKS = "tasks.jsonl"


def combined_fingerprint(fingerprints: Mapping[str, str]) -> str:
    """One fingerprint for several models, by name."""
    return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


class EvalRun(StageRun[EvalInputs]):
    """One evaluation on this rank."""

    stage = "eval"

    @property
    def judge_sources(self) -> list[ModelSource]:
        return self.inputs.judge_sources

    @property
    def sources(self) -> list[ModelSource]:
        return self.inputs.sources

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """The fingerprint of every model by name. One gather per model."""
        return {
            model.name: model.fingerprint
            if not isinstance(model, Candidate)
            else self.model_fingerprint(
                model.source, meta_parameters(model.config, model.source, dtype=self.config.model.dtype)
            )
            for model in self.inputs.models
        }

    def known_fingerprint(self) -> str:
        """One fingerprint of all models together. One gather per model."""
        return combined_fingerprint(self._fingerprints)

    def check_models(self, fingerprint: str) -> None:
        self.folder.check_same(
            "model_fingerprints", self._fingerprints, {model.name: model.field for model in self.inputs.models}
        )
        super().check_models(fingerprint)

    def work(self) -> None:
        inputs, tracker = self.inputs, self.tracker
        self.notes = {"model_fingerprints": self._fingerprints}
        self.begin_with(combined_fingerprint(self._fingerprints))
        self._check_room_for_tasks()
        for question_set in inputs.sets:
            row = question_set.as_row()
            num_skipped = sum(row["skipped"].values())
            note = question_set.prompt_set.note
            tracker.log(
                f"{row['kind']} set {row['set']}: {counted(row['read'], 'prompt')}, {num_skipped} skipped{note}"
            )
        if not inputs.section.judges and inputs.harmful_sets:
            tracker.log(
                "eval.judges is empty: attack success is counted by refusal words alone, which is not a verdict"
            )
        for candidate in inputs.candidates:
            if candidate.unread:
                unread = ", ".join(candidate.unread)
                tracker.remark(f"{unread} of model.template_kwargs: not read by the chat template of {candidate.name}")
            if candidate.broken_up:
                tracker.log(f"prompts of {candidate.name}: special tokens broken up: {candidate.broken_up}")
        ledgers = EvalLedgers.open(self.folder.path, inputs.section.divergence)
        for other in inputs.elsewhere:
            if isinstance(other, ServedModel):
                AnswerRounds(other, ledgers.answers, tracker).ask(inputs.sets, inputs.section.samples)
                tracker.log(f"{other.name}: its fluency is not measured: none of its weights are loaded")
            else:
                add_recorded(other, inputs.sets, ledgers.answers, tracker, inputs.section.samples)
        for model in reversed(inputs.candidates):  # the base last: it reads the others' answers too
            self._answer(model, ledgers)
        names = [model.name for model in inputs.models]
        with self.phase("judging"):
            outcome = ledgers.judge(names, inputs, self.config, self.deepspeed_config, tracker)
        with self.phase("tasks"):
            tasks = self._run_tasks()
        finish_eval(self, outcome, tasks)

    def _answer(self, candidate: Candidate, ledgers: EvalLedgers) -> None:
        """One model's answers, if some are missing. The base also reads all answers again (``surprises``), and its own
        beside every other model (``divergences``).

        Collectives: those of loading, ``answer_all``, ``surprise_all`` and ``compare_all``. Raises Interrupted.
        """
        sets, section = self.inputs.sets, self.inputs.section
        is_base = candidate.name == BASE
        answers, surprises = ledgers.answers, ledgers.surprises
        is_answered = set(answer_keys([candidate.name], sets, section.samples)) <= answers.rows.keys()
        recorded = {model.name for model in self.inputs.elsewhere}
        is_read = not section.coherence or not to_read_again(answers, surprises, recorded)
        is_compared = ledgers.divergences is None or not waiting_answers(self.inputs, answers, ledgers.divergences)
        if is_answered and (not is_base or (is_read and is_compared)):
            return
        with self.phase("loading"):
            model = load_sharded(candidate.source, self.config.model.dtype, self.deepspeed_config)
        longest = longest_prompt(candidate.prompt_ids.values(), candidate.max_positions)
        batch = self.generation_batch(section, longest, f"generation, {candidate.name}")
        with self.phase("answering"):
            answer_all(model, candidate.name, candidate, sets, answers, self.config, batch, self.tracker)
        if is_base:
            with self.phase("reading answers again"):
                surprise_all(model, candidate, answers, surprises, self.config, self.tracker, recorded)
            if (divergences := ledgers.divergences) is not None:
                with self.phase("comparing with the base"):
                    compare_all(
                        model, self.inputs, answers, divergences, self.config, self.deepspeed_config, self.tracker
                    )
        model.close()

    @cached_property
    def _task_rows(self) -> Ledger[TaskRow]:
        """Results that are on disk. One broadcast."""
        return Ledger(self.folder.path / TASKS, ("model", "task"), TaskRow)

    def _waiting_tasks(self, candidate: Candidate) -> list[int]:
        """Numbers of the tasks without a result yet."""
        done = self._task_rows.rows
        return [number for number in range(len(self.inputs.tasks)) if (candidate.name, number) not in done]

    def _check_room_for_tasks(self) -> None:
        """Refuse tasks of a model that does not fit whole into a rank's memory before hours go into answers.

        Raises UserError, on every rank. Collectives: those of ``_task_rows`` and one all-reduce, where there are tasks.
        """
        candidates = self.inputs.candidates if self.inputs.tasks else []
        if not (waiting := [candidate for candidate in candidates if self._waiting_tasks(candidate)]):
            return
        free = memory.tightest_free_bytes()
        for candidate in waiting:
            size = model_bytes(candidate.config, candidate.source, self.config.model.dtype, AutoModelForCausalLM)
            if size > free:
                names = ", ".join(task.name for task in self.inputs.tasks)
                sizes = f"{size / 2**30:.4g} GiB, and one has {free / 2**30:.4g} GiB free"
                problem = f"{WHOLE_MODEL}: {candidate.name} takes {sizes}"
                raise UserError("eval.tasks", names, problem, WITHOUT_TASKS)

    def _run_tasks(self) -> list[TaskRow]:
        """Results of lm-eval's tasks for every model; those on disk are not run again.

        Needs a whole copy of the model on every rank. Collectives: one gather per slice of a task's requests. Raises
        Interrupted between two slices; an interrupted task starts over.
        """
        section, tasks, tracker, ledger = self.config.model, self.inputs.tasks, self.tracker, self._task_rows
        order = [(model.name, number) for model in self.inputs.candidates for number in range(len(tasks))]
        if not order:
            return []
        from esi_ds.eval.harness import run_tasks  # lm-eval is optional

        bar = tracker.progress(total=len(order), initial=len(ledger.rows), unit="task", description="tasks")
        for other in self.inputs.elsewhere:
            tracker.log(f"tasks of {other.name} are not measured: none of its weights are loaded")
        for candidate in self.inputs.candidates:
            if not (waiting := self._waiting_tasks(candidate)):
                continue
            names = ", ".join(tasks[number].name for number in waiting)
            tracker.log(f"tasks of {candidate.name}: {names}")
            model = load_replicated(candidate.source, section.dtype)
            if self.inputs.section.batch_size > 1 and (limit := alike_up_to(model.config)) is not None:
                tracker.remark(f"{candidate.name} reads one request of a task at a time: {frequencies_note(limit)}")
            for number in waiting:
                results = run_tasks(
                    model,
                    candidate.tokenizer,
                    [tasks[number]],
                    end_ids=candidate.end_ids,
                    batch_size=self.inputs.section.batch_size,
                    seed=self.config.run.seed,
                    system_prompt=section.system_prompt,
                    ranks=runtime.JobRanks(),
                    should_stop=stop_requested,
                    marks=marks_with(candidate.thought_marks),
                )
                row: TaskRow = {
                    "model": candidate.name,
                    "task": number,
                    "results": [result.as_row() for result in results],
                }
                ledger.add([row])
                bar.update(1)
                check_stop(f"{counted(len(ledger.rows), 'task')} run")
            del model
            memory.collect()
        bar.close()
        rows = ledger.sort(order)
        for row in rows:
            for note in task_notes(row, tasks[row["task"]].name):
                tracker.remark(note)
        return rows


def task_notes(row: TaskRow, name: str) -> list[str]:
    """What people should know of the thoughts in a model's replies to a task. name: of the task."""
    leaves = {result["task"]: result for result in row["results"] if not result["members"]}.values()
    unfinished = sum(leaf.get("num_unfinished", 0) for leaf in leaves)
    without = sum(leaf.get("num_without_thought", 0) for leaf in leaves)
    notes = []
    if unfinished:
        notes.append(
            f"{name}: replies of {row['model']} to {counted(unfinished, 'document')} end within a thought and count as "
            "no answer: the task's length or stop words may cut the thoughts of a model that thinks"
        )
    if without:
        notes.append(f"{name}: choices are scored right behind the prompt, where {row['model']} would begin to think")
    return notes
