"""What an evaluation leaves behind: ``report.json``, ``report.html``, TensorBoard and the closing tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esi_ds.config import Eval
from esi_ds.data.turns import prompt_text
from esi_ds.eval.refusals import REFUSAL_LISTS
from esi_ds.eval.rows import TaskResultRow, TaskRow, TaskSummary, answer_key
from esi_ds.eval.tables import Measure, agreements, answer_measures, changes, task_measures
from esi_ds.report.contents import EvaluationReport, Facts, RateTables, SampleAnswer, SamplePrompt
from esi_ds.report.evaluation import closing_table, publish
from esi_ds.stages.evaluate.ledgers import EvalOutcome
from esi_ds.stages.evaluate.prepare import BASE, Candidate, EvalInputs
from esi_ds.stages.run import StageRun
from esi_ds.zero import runtime

NUM_SAMPLES = 4  # of each set


def finish_eval(
    run: StageRun[EvalInputs],
    outcome: EvalOutcome,
    tasks: Sequence[TaskRow],
) -> None:
    """Write the report, publish it and print the closing tables. Only rank 0 does anything; no collectives."""
    if not runtime.is_main():
        return
    inputs = run.inputs
    measures = [*measures_of(inputs, outcome, run.config.run.seed), *task_measures(tasks)]
    before = {model.name: model.before for model in inputs.models}
    tables = rate_tables(inputs, measures, before, run.config.run.seed)
    report: EvaluationReport = {
        "kind": "evaluation",
        "title": f"Evaluation of {run.config.model.path}",
        "models": [
            {
                "name": model.name,
                "path": model.path,
                "before": model.before,
                "fingerprint": run.notes["model_fingerprints"][model.name],
                "has_weights": isinstance(model, Candidate),
            }
            for model in inputs.models
        ],
        **tables,
        "usage": outcome.usage,
        "tasks": [{**row, "results": [without_documents(result) for result in row["results"]]} for row in tasks],
        "samples": samples(inputs, outcome),
        "facts": facts(run, inputs.section),
    }
    run.show(report, publish, closing_table)


def measures_of(inputs: EvalInputs, outcome: EvalOutcome, seed: int) -> list[Measure]:
    """What is counted of the answers, for every model and set. seed: of the bootstrap intervals."""
    kinds = {question_set.name: question_set.kind for question_set in inputs.sets}
    judges = [judge.name for judge in inputs.judges]
    words, coherence = REFUSAL_LISTS[inputs.section.refusal_words], inputs.section.coherence
    counted = outcome.answers, outcome.verdicts, outcome.surprises
    return answer_measures(*counted, kinds, judges, words, outcome.divergences, BASE, seed, coherence)


def rate_tables(
    inputs: EvalInputs, measures: Sequence[Measure], before: Mapping[str, str | None], seed: int
) -> RateTables:
    """The parts of a report that evaluations and perturbations share.

    before: model → the model it is compared with. seed: of the bootstrap intervals.
    """
    return {
        "judges": [{"name": judge.name, **judge.section.model_dump(exclude={"name"})} for judge in inputs.judges],
        "sets": [question_set.as_row() for question_set in inputs.sets],
        "measures": [measure.as_row() for measure in measures],
        "changes": changes(measures, before, seed),
        "agreements": agreements(measures),
    }


def without_documents(result: TaskResultRow) -> TaskSummary:
    """A task's result without the outcome of every document, which ``tasks.jsonl`` holds."""
    summary = result.copy()
    del summary["correct"], summary["scores"]
    return summary


def samples(inputs: EvalInputs, outcome: EvalOutcome) -> list[SamplePrompt]:
    """The first prompts of every set, with every model's (first) answer and every judge's verdict on it."""
    by_key = {answer_key(row): row for row in outcome.answers}
    first = (0,) if inputs.section.samples > 1 else ()
    verdicts, prompts = outcome.verdicts, list[SamplePrompt]()
    for question_set in inputs.sets:
        for index, prompt in enumerate(question_set.prompts[:NUM_SAMPLES]):
            shown: list[SampleAnswer] = []
            for model in inputs.models:
                key = (model.name, question_set.name, index, *first)
                row, keys = by_key[key], {judge.name: (judge.name, *key) for judge in inputs.judges}
                shown.append(
                    {
                        "model": model.name,
                        "response": row["response"],
                        "excluded": row["excluded"],
                        "verdicts": {name: verdicts[key] for name, key in keys.items() if key in verdicts},
                    }
                )
            text = prompt_text(prompt)
            prompts.append({"set": question_set.name, "index": index, "prompt": text, "answers": shown})
            if (goal := question_set.goal(index)) is not None:
                prompts[-1]["goal"] = goal
    return prompts


def _decoding(section: Eval) -> str:
    if section.temperature == 0:
        return "greedy"
    count = "one" if section.samples == 1 else str(section.samples)
    return f"{count} to a prompt, sampled at temperature {section.temperature:g} and top_p {section.top_p:g}"


def facts(run: StageRun[Any], section: Eval) -> Facts:
    """What the report's last table says of the run."""
    return {
        "dtype": run.config.model.dtype,
        **run.asked,
        "answers": f"{_decoding(section)}, at most {section.max_new_tokens} tokens",
        "refusal words on benign prompts": section.refusal_words,
        **({} if section.coherence else {"incoherence": "not measured"}),
        "ranks": runtime.world_size(),
        "seed": run.config.run.seed,
        "wall time (s)": round(run.wall_time_s, 1),
        **run.versions,
        **run.remarks,
    }
