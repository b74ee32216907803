"""Evaluation: prompts → every model's answers → every judge's verdicts → rates, report (docs/method.md §4)."""

from __future__ import annotations

import gc
import hashlib
import json

from esi_ds.eval.rows import TaskRow
from esi_ds.eval.tasks import run_tasks_on
from esi_ds.models.meta import meta_parameters
from esi_ds.stages.evaluate.answering import ANSWER_KEY, ANSWERS, SURPRISES, answer_all, answer_keys, surprise_all
from esi_ds.stages.evaluate.finish import finish_eval
from esi_ds.stages.evaluate.judging import VERDICT_KEY, VERDICTS, judge_all
from esi_ds.stages.evaluate.prepare import BASE, Candidate, EvalInputs
from esi_ds.stages.interrupt import check_stop, told_to_stop
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.run import StageRun
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import load_replicated, load_sharded

TASKS = "tasks.jsonl"


class EvalRun(StageRun[EvalInputs]):
    """One evaluation on this rank."""

    stage = "eval"

    def work(self) -> None:
        inputs, folder, tracker = self.inputs, self.folder.path, self.tracker
        fingerprints = {
            model.name: self.model_fingerprint(model.source, meta_parameters(model.config, model.source))
            for model in inputs.models
        }
        self.notes = {"model_fingerprints": fingerprints}
        self.begin_with(hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest())
        for found in inputs.sets:
            row = found.as_row()
            tracker.log(
                f"{row['kind']} set {row['set']}: {row['read']} prompts, {sum(row['skipped'].values())} skipped"
            )
        if not self.config.eval.judges and any(found.kind == "harmful" for found in inputs.sets):
            tracker.log("eval.judges is empty: attack success by refusal words alone, a cheap extra and no verdict")
        answers = Ledger(folder / ANSWERS, ANSWER_KEY)
        surprises = Ledger(folder / SURPRISES, ANSWER_KEY)
        verdicts = Ledger(folder / VERDICTS, VERDICT_KEY)
        for model in reversed(inputs.models):  # the base last: it reads the others' answers too
            self._answer(model, answers, surprises, tracker)
        order = answer_keys([model.name for model in inputs.models], inputs.sets)
        rows = answers.sort(order)
        surprises.sort(order)
        harmful = {found.name for found in inputs.sets if found.kind == "harmful"}
        judged = [row for row in rows if row["set"] in harmful]
        used = judge_all(inputs.judges, judged, verdicts, self.config, self.deepspeed_config, tracker)
        verdicts.sort((judge.name, *answers.key(row)) for judge in inputs.judges for row in judged)
        results = self._skill(tracker)
        finish_eval(self, rows, verdicts.rows, surprises.rows, used, results, tracker)

    def _skill(self, tracker: Tracker) -> list[dict]:
        """Rows {model, task, results} of lm-eval's tasks, for every model; those on disk are not run again.

        Needs a whole copy of the model on every rank. Collectives: a gather a slice of a task's requests.
        Raises Interrupted between two slices; a task that was broken off begins anew.
        """

        section = self.config.model
        ledger: Ledger[TaskRow] = Ledger(self.folder.path / TASKS, ("model", "task"))
        order = [(model.name, number) for model in self.inputs.models for number in range(len(self.inputs.tasks))]
        if not order:
            return []
        bar = tracker.progress(total=len(order), initial=len(ledger.rows), unit="task", description="tasks")
        for candidate in self.inputs.models:
            waiting = [number for name, number in order if name == candidate.name and (name, number) not in ledger.rows]
            if not waiting:
                continue
            names = ", ".join(self.inputs.tasks[number].config.name for number in waiting)
            tracker.log(f"tasks of {candidate.name}: {names}")
            model = load_replicated(candidate.source, section.dtype)
            for number in waiting:
                results = run_tasks_on(
                    model,
                    candidate.tokenizer,
                    [self.inputs.tasks[number]],
                    batch_size=self.config.eval.batch_size,
                    seed=self.config.run.seed,
                    system_prompt=section.system_prompt,
                    ranks=runtime.JobRanks(),
                    should_stop=told_to_stop,
                )
                rows = [result.as_row() for result in results]
                ledger.add([{"model": candidate.name, "task": number, "results": rows}])
                bar.update(1)
                check_stop(f"{len(ledger.rows)} tasks run")
            del model
            gc.collect()
        bar.close()
        return ledger.sort(order)

    def _answer(self, candidate: Candidate, answers, surprises, tracker: Tracker) -> None:
        """The answers of one model, where some are missing. The base also reads all answers again (``surprises``)."""
        sets = self.inputs.sets
        is_base = candidate.name == BASE
        wanted = set(answer_keys([candidate.name], sets))
        made = [key for key, row in answers.rows.items() if (row["response"] or "").strip()]
        if wanted <= answers.rows.keys() and (not is_base or all(key in surprises.rows for key in made)):
            return
        model = load_sharded(candidate.source, self.config.model.dtype, self.deepspeed_config)
        answer_all(model, candidate.name, candidate, sets, answers, self.config, tracker)
        if is_base:
            surprise_all(model, candidate, answers, surprises, self.config, tracker)
        del model
        gc.collect()
