"""What an evaluation leaves behind: ``report.json``, ``report.html``, TensorBoard and the closing tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from esi_ds.config import Config
from esi_ds.eval.refusals import REFUSAL_LISTS
from esi_ds.eval.tables import Measure, agreements, answer_measures, changes, task_measures
from esi_ds.report.evaluation import closing_table, publish
from esi_ds.report.html import write_report
from esi_ds.stages.evaluate.prepare import EvalInputs
from esi_ds.stages.run import StageRun
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime

NUM_SAMPLES = 4  # of each set
Row = dict[str, Any]


def finish_eval(
    run: StageRun[EvalInputs],
    answers: Sequence[Row],
    verdicts: Mapping[tuple, Row],
    surprises: Mapping[tuple, Row],
    used: dict[str, str],
    tasks: Sequence[Row],
    tracker: Tracker,
) -> None:
    """Write the report and say how it went. Rank 0 writes; no collectives."""
    if not runtime.is_main():
        return
    inputs, folder = run.inputs, run.folder.path
    measures = [*measures_of(run.config, inputs, answers, verdicts, surprises), *task_measures(tasks)]
    report = {
        "kind": "evaluation",
        "title": f"Evaluation of {run.config.model.path}",
        "models": [
            {
                "name": model.name,
                "path": model.source.path,
                "before": model.before,
                "fingerprint": run.notes["model_fingerprints"][model.name],
            }
            for model in inputs.models
        ],
        **tables(run.config, inputs, measures, {model.name: model.before for model in inputs.models}),
        "usage": used,
        "tasks": [{**row, "results": [_without_documents(result) for result in row["results"]]} for row in tasks],
        "samples": samples(inputs, answers, verdicts),
        "facts": facts(run.config, runtime.world_size(), run.started),
    }
    write_report(folder, report)
    publish(tracker, report)
    tracker.log(closing_table(report))
    tracker.log(f"report: {folder / 'report.html'}")


def measures_of(
    config: Config,
    inputs: EvalInputs,
    answers: Sequence[Row],
    verdicts: Mapping[tuple, Row],
    surprises: Mapping[tuple, Row],
) -> list[Measure]:
    """What is counted of the answers, for every model and set."""
    kinds = {found.name: found.kind for found in inputs.sets}
    judges = [judge.name for judge in inputs.judges]
    return answer_measures(answers, verdicts, surprises, kinds, judges, REFUSAL_LISTS[config.eval.refusal_words])


def tables(config: Config, inputs: EvalInputs, measures: Sequence[Measure], before: Mapping[str, str | None]) -> Row:
    """The parts of a report that say who was asked, who judged, and what came of it."""
    return {
        "judges": [{"name": judge.name, **judge.section.model_dump(exclude={"name"})} for judge in inputs.judges],
        "sets": [found.as_row() for found in inputs.sets],
        "measures": [measure.as_row() for measure in measures],
        "changes": changes(measures, before, config.run.seed),
        "agreements": agreements(measures),
    }


def _without_documents(result: Row) -> Row:
    """A task's result without its documents, which ``tasks.jsonl`` holds."""
    return {key: value for key, value in result.items() if key not in ("correct", "scores")}


def samples(inputs: EvalInputs, answers: Sequence[Row], verdicts: Mapping[tuple, Row]) -> list[Row]:
    """The first prompts of every set, with what every model answered and every judge said."""
    by_key = {(row["model"], row["set"], row["index"]): row for row in answers}
    found = []
    for questions in inputs.sets:
        for index, prompt in enumerate(questions.prompts[:NUM_SAMPLES]):
            said = []
            for model in inputs.models:
                key = (model.name, questions.name, index)
                by_judge = {judge.name: verdicts.get((judge.name, *key)) for judge in inputs.judges}
                given = {name: verdict for name, verdict in by_judge.items() if verdict is not None}
                row = by_key[key]
                said.append(
                    {"model": model.name, "response": row["response"], "excluded": row["excluded"], "verdicts": given}
                )
            found.append({"set": questions.name, "index": index, "prompt": prompt, "answers": said})
    return found


def facts(config: Config, world_size: int, started: float) -> Row:
    """What the report's last table says of the run."""
    return {
        "dtype": config.model.dtype,
        "answers": f"greedy, at most {config.eval.max_new_tokens} tokens",
        "refusal words on benign prompts": config.eval.refusal_words,
        "ranks": world_size,
        "seed": config.run.seed,
        "wall time (s)": round(time.time() - started, 1),
    }
