"""Evaluation: prompts → answers of every model → verdicts of every judge → rates, comparisons, report (METHOD §4)."""

from __future__ import annotations

import gc
import hashlib
import json
import os

from esi_ds.artifacts import RunFolder
from esi_ds.cli import Options
from esi_ds.config import Config
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.stages.plan import meta_parameters, print_eval_plan
from esi_ds.stages.prepare_eval import BASE, Candidate, EvalInputs, prepare_eval
from esi_ds.stages.run import StageRun
from esi_ds.tracking import Tracker


def run(config: Config, options: Options) -> None:
    """Run the stage to its end, or to an ``Interrupted``. Everything that can be refused is refused first."""
    inputs = prepare_eval(config)
    if options.dry_run:
        print_eval_plan(config, options, inputs)
        return
    folder = RunFolder(config.run.output_dir)
    folder.check(config)
    resolve_deepspeed(config, int(os.environ.get("WORLD_SIZE", "1")), "eval")
    folder.check_same("data_hashes", inputs.source, "eval")
    from esi_ds.zero import runtime

    with runtime.process_group():
        deepspeed_config = resolve_deepspeed(config, runtime.world_size(), "eval")
        EvalRun(config, options, inputs, folder, deepspeed_config).run()


class EvalRun(StageRun):
    """One evaluation on this rank."""

    def __init__(self, config: Config, options: Options, inputs: EvalInputs, folder: RunFolder, deepspeed_config: dict):
        super().__init__(config, options, folder, deepspeed_config, inputs.source)
        self.inputs = inputs

    def work(self, tracker: Tracker) -> None:
        from esi_ds.stages.answering import ANSWER_KEY, ANSWERS, SURPRISES, answer_keys
        from esi_ds.stages.finish_eval import finish_eval
        from esi_ds.stages.judging import VERDICT_KEY, VERDICTS, judge_all
        from esi_ds.stages.ledger import Ledger

        inputs, folder = self.inputs, self.folder.path
        fingerprints = {
            model.name: self.model_fingerprint(model.path, model.revision, meta_parameters(model.config))
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
        finish_eval(self, rows, verdicts.rows, surprises.rows, used, tracker)

    def _answer(self, candidate: Candidate, answers, surprises, tracker: Tracker) -> None:
        """The answers of one model, where some are missing. The base also reads all answers again (``surprises``)."""
        from esi_ds.stages.answering import answer_all, answer_keys, surprise_all
        from esi_ds.zero.engine import load_sharded

        sets = self.inputs.sets
        is_base = candidate.name == BASE
        wanted = set(answer_keys([candidate.name], sets))
        made = [key for key, row in answers.rows.items() if (row["response"] or "").strip()]
        if wanted <= answers.rows.keys() and (not is_base or all(key in surprises.rows for key in made)):
            return
        section = self.config.model
        model = load_sharded(
            candidate.path,
            section.dtype,
            self.deepspeed_config,
            field=candidate.field,
            revision=candidate.revision,
            trust_remote_code=section.trust_remote_code,
        )
        answer_all(model, candidate.name, candidate, sets, answers, self.config, tracker)
        if is_base:
            surprise_all(model, candidate, answers, surprises, self.config, tracker)
        del model
        gc.collect()
