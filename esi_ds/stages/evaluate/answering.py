"""Answers of the models under evaluation, greedy or sampled: kept on disk as they come, none generated twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from esi_ds.config import Config
from esi_ds.config.needs import require_eval
from esi_ds.data.answers import MISSING, RecordedAnswer
from esi_ds.data.asked import Asked, changes_the_prompt
from esi_ds.data.chat import answerable
from esi_ds.data.prompts import QuestionSet
from esi_ds.data.thoughts import (
    UNFINISHED,
    absent_marks,
    final_answer,
    has_marks,
    has_thought,
    marks_with,
    opening_mark,
    parts,
    unread_note,
)
from esi_ds.eval.fluency import surprises as measure_surprises
from esi_ds.eval.rows import (
    AnswerRow,
    SurpriseRow,
    answer_key,
    answered,
    has_text,
    identity_of,
    is_thought_alone,
    marks_of,
)
from esi_ds.models.decoding import Sampling
from esi_ds.models.rows import ahead_note, probe_ids
from esi_ds.stages.batch_sizes import GenerationBatch
from esi_ds.stages.evaluate.prepare import Candidate, RecordedModel
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.questions import answer_stream, unanswered_rows
from esi_ds.stages.respond import generate_all
from esi_ds.tracking import Tracker
from esi_ds.words import counted, first_of, part_of
from esi_ds.zero import runtime
from esi_ds.zero.batching import batch_size_for, lookahead
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.generate import Draws, choose_mode, in_step, ready_to_generate

SURPRISES = "surprises.jsonl"


def thought_notes(rows: Sequence[AnswerRow]) -> list[str]:
    """What people should know of the thoughts in these answers, a line for each model: how many are unfinished, and
    whether the user's marks stand in none of them."""
    notes = []
    for name in dict.fromkeys(row["model"] for row in rows):
        texts = [row["response"] for row in rows if row["model"] == name and row["response"] is not None]
        unfinished = sum(row["model"] == name and row["excluded"] == UNFINISHED for row in rows)
        if unfinished:
            remedy = "; raise eval.max_new_tokens, or see model.thought_marks" if unfinished == len(texts) else ""
            which = part_of(unfinished, len(texts))
            notes.append(f"{which} answers of {name} are unfinished: they end within a thought{remedy}")
        cut = [row for row in rows if row["model"] == name and row.get("cut")]
        if cut and len(cut) == len(texts) and not any(has_marks(row["response"] or "", marks_of(row)) for row in cut):
            notes.append(
                f"all {len(texts)} answers of {name} were cut at their longest length: if it thinks, they may be "
                "unfinished thoughts that count as answers; raise eval.max_new_tokens"
            )
        marks = next((row["thought_marks"] for row in rows if row["model"] == name and "thought_marks" in row), [])
        absent = absent_marks(texts, marks)
        if absent and texts:
            notes.append(f"no answer of {name} holds {' or '.join(absent)} of model.thought_marks")
    return notes


def unread_notes(rows: Sequence[AnswerRow], thinks: Callable[[str], bool]) -> list[str]:
    """``unread_note`` of each model's answers to harmful prompts. thinks: False of the name of a model whose chat
    template knows of no thoughts."""
    have_thoughts: dict[str, list[bool]] = {}
    for row in rows:
        if (response := answered(row)) is not None:
            has = has_thought(response, parts(response, None, marks_of(row)))
            have_thoughts.setdefault(row["model"], []).append(has)
    notes = (unread_note(have, f"answers of {name}", thinks(name)) for name, have in have_thoughts.items())
    return [note for note in notes if note is not None]


def add_recorded(
    model: RecordedModel,
    sets: Sequence[QuestionSet],
    answers: Ledger[AnswerRow],
    tracker: Tracker,
    samples: int = 1,
) -> None:
    """Add the rows of ``unanswered_rows`` with the answers that the model's file has; the log lists prompts that lack
    some. No collectives."""
    recorded, no_answer = model.recorded, RecordedAnswer(None, MISSING)
    rows = unanswered_rows(model.name, sets, samples)
    missing: dict[str, dict[int, int]] = {}  # set → index → answers that are missing
    for row in rows:
        answer = recorded.answers.get(answer_key(row)[1:], no_answer)
        if answer == no_answer:
            of_set = missing.setdefault(row["set"], {})
            of_set[row["index"]] = of_set.get(row["index"], 0) + 1
        row["response"], row["excluded"] = answer.response, answer.excluded
        if model.thought_marks is not None:
            row["thought_marks"] = model.thought_marks
        if answer.response is not None and final_answer(answer.response, None, marks_of(row)) is None:
            row["excluded"] = row["excluded"] or UNFINISHED
        if answer.is_cut:
            row["cut"] = True
    for question_set in sets:
        if lacking := missing.get(question_set.name):
            what = "no answer" if samples == 1 else f"fewer than {samples} answers"
            tracker.log(
                f"{recorded.path} has {what} of {model.name} to {len(lacking)} of {len(question_set.prompts)} "
                f"prompts of {question_set.name}: {first_of(list(lacking))}"
            )
    if recorded.differences:
        tracker.remark(f"answers of {model.name} were asked for with other settings: {recorded.differences}")
    if recorded.unrecorded:
        tracker.remark(f"answers of {model.name} {recorded.unrecorded}")
    answers.add(rows)
    unused = f"; {recorded.num_unused} of its rows answer other prompts" if recorded.num_unused else ""
    tracker.log(
        f"{model.name}: answers from {recorded.path}{unused}; their fluency is not measured: weights are not loaded"
    )


def to_read_again(
    answers: Ledger[AnswerRow], surprises: Ledger[SurpriseRow], recorded: Collection[str]
) -> list[tuple[AnswerRow, str]]:
    """The answers, with their texts, that ``surprises`` lacks. recorded: models whose fluency is not measured."""
    return [
        (row, row["response"] or "")
        for key, row in answers.rows.items()
        if key not in surprises.rows and row["model"] not in recorded and has_text(row)
    ]


def fill_row(row: AnswerRow, response: str, candidate: Candidate, prompt: Sequence[int], is_cut: bool = False) -> None:
    """Set the row's response, and exclude it where it is an unfinished thought, or was cut right behind one.

    prompt: ids of what was asked. is_cut: whether the response ended at its longest length.
    """
    row["response"] = response
    if candidate.thought_marks is not None:
        row["thought_marks"] = candidate.thought_marks
    opening = opening_mark(candidate.tokenizer, prompt, marks_of(row))
    answer = final_answer(response, opening, marks_of(row))
    if answer is None:
        row["excluded"] = UNFINISHED
    elif answer != final_answer(response, None, marks_of(row)):
        # It speaks of marks: who reads it later needs the first.
        row["response"] = f"{opening}{response}"
    if is_cut and is_thought_alone(row):
        row["excluded"] = UNFINISHED


def _waiting_rows(
    name: str,
    sets: Sequence[QuestionSet],
    answers: Ledger[AnswerRow],
    config: Config,
    reasons: Mapping[tuple[str, int], str],
) -> list[AnswerRow]:
    """The rows to generate. Those that ``answers`` lacks and ``reasons`` excludes are added to it."""
    section = require_eval(config)
    asked = Asked(config.model, section.max_new_tokens, section.sampling).as_row()
    waiting = []
    for row in unanswered_rows(name, sets, section.samples):
        if changes_the_prompt(asked):
            row["asked"] = asked
        row["excluded"] = reasons.get((row["set"], row["index"]))
        if answers.key(row) in answers.rows:
            continue
        if row["excluded"] is not None:
            answers.add([row])
        else:
            waiting.append(row)
    return waiting


def answer_all(
    model: ShardedModel,
    name: str,
    candidate: Candidate,
    sets: Sequence[QuestionSet],
    answers: Ledger[AnswerRow],
    config: Config,
    batch: GenerationBatch,
    tracker: Tracker,
) -> None:
    """Add a row for every prompt that ``answers`` lacks, under ``name``; excluded are the unanswerable and unfinished.

    Data-parallel over ranks. Collectives: those of generation, and one gather of texts per batch. Raises Interrupted.
    """
    section = require_eval(config)
    length = section.max_new_tokens
    prompt_ids, reasons = answerable(candidate.prompt_ids, length, candidate.max_positions)
    waiting = _waiting_rows(name, sets, answers, config, reasons)

    cut = set[int]()

    def keep(responses: dict[int, str]) -> None:
        rows = [waiting[number] for number in responses]
        for row, (number, response) in zip(rows, responses.items(), strict=True):
            fill_row(row, response, candidate, prompt_ids[row["set"], row["index"]], number in cut)
        answers.add(rows)

    def draws(numbers: Sequence[int]) -> Draws:
        sampling = Sampling(section.temperature, section.top_p)
        return Draws(sampling, [answer_stream(config.run.seed, waiting[number]) for number in numbers])

    generate_all(
        model,
        candidate.tokenizer,
        candidate.end_ids,
        {number: prompt_ids[row["set"], row["index"]] for number, row in enumerate(waiting)},
        {},
        max_new_tokens=length,
        batch=batch,
        generation=config.esi.generation,
        keep=keep,
        tracker=tracker,
        description=f"answer: {name}",
        marks=marks_with(candidate.thought_marks),
        draws=draws if section.temperature > 0 else None,
        cut=cut,
    )


def surprise_all(
    model: ShardedModel,
    reference: Candidate,
    answers: Ledger[AnswerRow],
    surprises: Ledger[SurpriseRow],
    config: Config,
    tracker: Tracker,
    recorded: Collection[str] = (),
) -> None:
    """Add how surprised the reference model is by every answer that ``surprises`` lacks.

    Only if the whole model fits on a rank and is causal; else incoherence is judged by form alone, and what an earlier
    start has read is dropped: models judged by different measures cannot be compared. Without ``eval.coherence``
    nothing is done. recorded: names of models whose answers are left out. Collectives: those of ``zero.batching``, a
    gather of the model, and a gather of numbers per batch. Raises Interrupted.
    """
    section = require_eval(config)
    waiting = to_read_again(answers, surprises, recorded) if section.coherence else []
    if not waiting:
        return
    mode, reason = choose_mode(model, config.esi.generation)
    if in_step(model, mode):
        reason = "experts are on different ranks" if model.expert_parallel else reason
        _read_none(surprises, reason, tracker)
        return
    ids, pad = probe_ids(reference.tokenizer), reference.tokenizer.pad_token_id or 0
    ahead = lookahead(model, ids, pad)
    if not ahead.is_rounding:
        _read_none(surprises, ahead_note(ahead), tracker)
        return
    batch_size, note = batch_size_for(model, ids, pad, section.batch_size, 0)  # long ones are read alone anyway
    if note:
        tracker.log(f"answers are read again one at a time: {note}")
    ranks, rank = runtime.world_size(), runtime.rank()
    size = section.batch_size * 4  # so many that texts of like length can be batched together
    bar = tracker.progress(total=len(waiting), initial=0, unit="answer", description="surprise")
    with ready_to_generate(model, mode), bar:
        for start in range(0, len(waiting), size * ranks):
            mine = waiting[start + rank * size : start + (rank + 1) * size]
            values = measure_surprises(
                model.module,
                reference.tokenizer,
                [(row["prompt"], response) for row, response in mine],
                system_prompt=config.model.system_prompt,
                batch_size=batch_size,
                limit=reference.max_positions,
                marks=marks_with(reference.thought_marks),
            )
            surprises.share(
                {**identity_of(row), "surprise": value} for (row, _), value in zip(mine, values, strict=True)
            )
            bar.update(min(size * ranks, len(waiting) - start))
            check_stop(f"{counted(len(surprises.rows), 'answer')} read again")


def _read_none(surprises: Ledger[SurpriseRow], reason: str, tracker: Tracker) -> None:
    dropped = f"; dropped: {counted(len(surprises.rows), 'answer')} read by an earlier start" if surprises.rows else ""
    surprises.keep(lambda row: False)
    tracker.log(f"incoherence is judged by form alone: {reason}{dropped}")
