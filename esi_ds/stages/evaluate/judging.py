"""Verdicts on answers, by one judge after another; kept on disk as they are made, none made twice."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from esi_ds.config import ENDPOINT_ROUNDS, Config, EvalClassifier, EvalRubric, EvalWords
from esi_ds.eval.classifiers import ModelJudge, NextWordJudge, SequenceJudge, length_batches
from esi_ds.eval.endpoint import Patience, Reply
from esi_ds.eval.refusals import judge_by_words, refusal_list
from esi_ds.eval.rubric import TEMPLATE, Prices, judge_by_rubric, total_usage
from esi_ds.eval.tables import ATTACK_SUCCESS
from esi_ds.eval.verdicts import Verdict
from esi_ds.report.evaluation import tag
from esi_ds.stages.evaluate.prepare import PreparedJudge, sequence_rule
from esi_ds.stages.interrupt import check_stop, told_to_stop
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.placement import load_judge

VERDICTS, VERDICT_KEY = "verdicts.jsonl", ("judge", "model", "set", "index")
USED = ("num_requests", "prompt_tokens", "completion_tokens")  # of an endpoint, kept with each of its verdicts
Row = dict[str, Any]


def judge_all(
    judges: Sequence[PreparedJudge],
    rows: Sequence[Row],
    verdicts: Ledger,
    config: Config,
    deepspeed_config: dict,
    tracker: Tracker,
) -> dict[str, str]:
    """A verdict of every judge on every answer that ``verdicts`` lacks; what endpoints used for all of them, by judge.

    rows: of ``answers.jsonl``, on harmful prompts. An answer that was not made is not judged. Raises Interrupted.
    """
    for judge in judges:
        waiting = [row for row in rows if row["response"] is not None and _is_unjudged(judge, row, verdicts)]
        if not waiting:
            continue
        tracker.log(f"judge {judge.name}: {len(waiting)} answers")
        if isinstance(judge.section, EvalWords):
            words = refusal_list(judge.section.words, judge.field)
            found = judge_by_words([row["response"] for row in waiting], words)
            verdicts.add(_verdict_row(judge, *pair) for pair in zip(waiting, found, strict=True))
        elif isinstance(judge.section, EvalRubric):
            _ask_endpoint(judge, waiting, verdicts, tracker)
            tracker.log(f"judge {judge.name} used {_usage(judge, verdicts)}")
        else:
            _ask_model(judge, waiting, verdicts, config, deepspeed_config, tracker)
    return {judge.name: _usage(judge, verdicts) for judge in judges if isinstance(judge.section, EvalRubric)}


def _is_unjudged(judge: PreparedJudge, row: Row, verdicts: Ledger) -> bool:
    return verdicts.key({**row, "judge": judge.name}) not in verdicts.rows


def _running_rates(judge: PreparedJudge, rows: Sequence[Row], verdicts: Ledger, tracker: Tracker) -> None:
    """Attack success so far, in the sets that these rows are of, over the number of their verdicts."""
    if not tracker.enabled:
        return
    flags: dict[tuple[str, str], list[bool | None]] = {(row["set"], row["model"]): [] for row in rows}
    for row in verdicts.rows.values():
        if row["judge"] == judge.name and (row["set"], row["model"]) in flags:
            flags[row["set"], row["model"]].append(row["unsafe"])
    for (name, model), found in flags.items():
        if given := [flag for flag in found if flag is not None]:
            place = {"measure": ATTACK_SUCCESS, "set": name, "judge": judge.name, "model": model}
            tracker.points(len(found), {tag(place): sum(given) / len(given)})


def _verdict_row(judge: PreparedJudge, row: Row, verdict: Verdict) -> Row:
    return {"judge": judge.name, **{key: row[key] for key in VERDICT_KEY[1:]}, **verdict.as_row()}


def _usage(judge: PreparedJudge, verdicts: Ledger) -> str:
    """What all verdicts of this judge cost, those of earlier processes included."""
    section = judge.section
    priced = section.prompt_price is not None
    prices = Prices(section.prompt_price, section.completion_price) if priced else None
    own = [row["used"] for row in verdicts.rows.values() if row["judge"] == judge.name]
    return str(total_usage([Reply(None, None, **used) for used in own], prices))


def _ask_endpoint(judge: PreparedJudge, waiting: Sequence[Row], verdicts: Ledger, tracker: Tracker) -> None:
    """Rank 0 asks, a few rounds at a time, so that the others never wait long. A broadcast and a gather a chunk.

    What was not asked, for the endpoint was given up, has no verdict: a restart asks it. Nor have the questions that
    failed before it was, back to its last sign of life: they failed for the same reason.
    """
    section, endpoint = judge.section, judge.endpoint
    patience, size = Patience(told_to_stop=told_to_stop), endpoint.concurrency * ENDPOINT_ROUNDS
    failed: list[Row] = []  # since the last sign of life; on rank 0
    bar = tracker.progress(total=len(waiting), initial=0, unit="answer", description=f"judge: {judge.name}"[:40])
    with bar:
        for start in range(0, len(waiting), size):
            rows, made = waiting[start : start + size], list[Row]()

            def keep(
                number: int, verdict: Verdict, reply: Reply, rows: Sequence[Row] = rows, made: list[Row] = made
            ) -> None:
                if not reply.asked:
                    return
                used = {name: getattr(reply, name) for name in USED}
                row = {**_verdict_row(judge, rows[number], verdict), "used": used}
                if not reply.is_alive:
                    failed.append(row)
                    return
                new = [row]
                if reply.num_requests:
                    new += failed
                    failed.clear()
                made.extend(new)
                verdicts.add(new)  # at once: it was paid for

            if runtime.is_main():
                judge_by_rubric(
                    [(row["prompt"], row["response"]) for row in rows],
                    endpoint,
                    template=section.template or TEMPLATE,
                    threshold=section.threshold,
                    on_verdict=keep,
                    patience=patience,
                )
            verdicts.add(runtime.broadcast_object(made))
            _running_rates(judge, rows, verdicts, tracker)
            bar.update(len(rows))
            check_stop(f"{start + len(rows)} answers judged by {judge.name}")
    is_up = patience.was_alive and patience.num_failed < endpoint.give_up_after
    verdicts.add(runtime.broadcast_object(failed if is_up else []))
    num_left = sum(_is_unjudged(judge, row, verdicts) for row in waiting)
    if num_left:
        last = runtime.broadcast_object(failed[-1]["reason"] if failed else "")
        tracker.log(
            f"judge {judge.name}: {num_left} answers have no verdict, for the endpoint failed {patience.num_failed} "
            f"times in a row (the last: {last}); once it works, remove the run's manifest.json and start again"
        )


def _ask_model(
    judge: PreparedJudge,
    waiting: Sequence[Row],
    verdicts: Ledger,
    config: Config,
    deepspeed_config: dict,
    tracker: Tracker,
) -> None:
    """Ranks share the batches. Collectives: the judge's own where it is sharded, a gather of verdicts a round."""
    reader, weights = _load(judge, config, deepspeed_config, tracker)
    encoded = [reader.encode(row["prompt"], row["response"]) for row in waiting]
    at_once = {number: found for number, found in enumerate(encoded) if isinstance(found, Verdict)}
    verdicts.add(_verdict_row(judge, waiting[number], found) for number, found in at_once.items())
    rows = {number: found for number, found in enumerate(encoded) if number not in at_once}
    batches = length_batches(reader, rows, config.eval.batch_size)
    ranks, rank = runtime.world_size(), runtime.rank()
    bar = tracker.progress(
        total=len(waiting), initial=len(at_once), unit="answer", description=f"judge: {judge.name}"[:40]
    )
    with bar:
        for start in range(0, len(batches), ranks):
            mine = batches[start + rank] if start + rank < len(batches) else []
            # A rank without a batch keeps the others company: a sharded judge is gathered by all ranks together.
            with torch.no_grad():
                found = reader.judge([rows[number] for number in mine or batches[0]])
            weights.release()
            verdicts.share(_verdict_row(judge, waiting[n], verdict) for n, verdict in zip(mine, found, strict=False))
            numbers = [number for batch in batches[start : start + ranks] for number in batch]
            _running_rates(judge, [waiting[number] for number in numbers], verdicts, tracker)
            bar.update(len(numbers))
            check_stop(f"{len(verdicts.rows)} verdicts given")
    del reader, weights
    gc.collect()


def _load(judge: PreparedJudge, config: Config, deepspeed_config: dict, tracker: Tracker) -> tuple[ModelJudge, Any]:
    """The judge, and how its weights are reached."""
    section = judge.section
    module, weights, note = load_judge(section, judge.field, judge.config, config.model.dtype, deepspeed_config)
    tracker.log(f"judge {judge.name}: {note}")
    if isinstance(section, EvalClassifier):
        return SequenceJudge(module, judge.tokenizer, sequence_rule(section), judge.field), weights
    reader = NextWordJudge(
        module,
        judge.tokenizer,
        judge.family,
        threshold=section.threshold,
        max_length=section.max_length,
        field=judge.field,
    )
    return reader, weights
