"""A tuning run's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esi_ds.data.thoughts import MARKS, Marks, final_answer
from esi_ds.data.turns import prompt_text
from esi_ds.report.contents import RefusalRow, TunedAnswerRow, TuningReport
from esi_ds.tracking import Tracker, literal
from esi_ds.words import part_of

NUM_SAMPLES = 4  # of each set
Answer = tuple[str, bool | None]  # a response, and whether it refuses; None: it ends within a thought


def samples(answers: Sequence[TunedAnswerRow]) -> list[TunedAnswerRow]:
    """The first few answers of every set, with their prompts as texts."""
    chosen = [row for rows in by_set(answers).values() for row in rows[:NUM_SAMPLES]]
    return [{**row, "prompt": prompt_text(row["prompt"])} for row in chosen]


def by_set(answers: Sequence[TunedAnswerRow]) -> dict[str, list[TunedAnswerRow]]:
    """Answers by their set of prompts, in order."""
    sets: dict[str, list[TunedAnswerRow]] = {}
    for row in answers:
        sets.setdefault(row["set"], []).append(row)
    return sets


def refusal_rows(answers: Sequence[TunedAnswerRow], marks: Marks = MARKS) -> list[RefusalRow]:
    """Counts for every set of prompts. marks: of thoughts."""
    table: list[RefusalRow] = []
    for name, rows in by_set(answers).items():
        after = [(row["after"], row["refused_after"]) for row in rows]
        before = [(row["before"], row["refused_before"]) for row in rows] if "before" in rows[0] else None
        table.append(
            {
                "set": name,
                "n": len(rows),
                "refused_before": None if before is None else _num_refused(before),
                "empty_before": None if before is None else _num_empty(before, marks),
                "unfinished_before": None if before is None else _num_unfinished(before),
                "refused_after": _num_refused(after),
                "empty_after": _num_empty(after, marks),
                "unfinished_after": _num_unfinished(after),
            }
        )
    return table


def _num_refused(answers: Sequence[Answer]) -> int:
    return sum(refused is True for _, refused in answers)


def _num_empty(answers: Sequence[Answer], marks: Marks) -> int:
    finished = [response for response, refused in answers if refused is not None]
    return sum(not (final_answer(response, None, marks) or "").strip() for response in finished)


def _num_unfinished(answers: Sequence[Answer]) -> int:
    return sum(refused is None for _, refused in answers)


def num_answers(row: RefusalRow) -> tuple[int, int]:
    """Responses before and after tuning that do not end within a thought; 0 where nothing was asked."""
    before = 0 if row["refused_before"] is None else row["n"] - (row.get("unfinished_before") or 0)
    return before, row["n"] - row.get("unfinished_after", 0)


def refusal_shares(row: RefusalRow) -> tuple[float | None, float | None]:
    """Refusals before and after tuning as shares of ``num_answers``; None where there are no answers."""
    (before, after), (num_before, num_after) = (row["refused_before"], row["refused_after"]), num_answers(row)
    return (before or 0) / num_before if num_before else None, (after or 0) / num_after if num_after else None


def thought_notes(table: Sequence[RefusalRow]) -> list[str]:
    """A line for each set of prompts, before and after tuning, of which responses end within a thought."""
    notes = []
    for row in table:
        for when, count in (("before", row.get("unfinished_before")), ("after", row.get("unfinished_after"))):
            if count:
                answers = f"{part_of(count, row['n'])} answers to {row['set']} prompts {when} tuning"
                notes.append(
                    f"{answers} are unfinished: they end within a thought and are left out of the shares; raise "
                    "eval.max_new_tokens"
                )
    return notes


def publish(tracker: Tracker, report: TuningReport) -> None:
    """Sample answers as text, and refusals as two points of a curve over the steps: before and after tuning."""
    for sample in report["samples"]:
        answers = [f"before: {sample['before']}"] if "before" in sample else []
        text = "\n\n".join([prompt_text(sample["prompt"]), *answers, f"after: {sample['after']}"])
        tracker.text(f"answers/{sample['set']}/{sample['index']}", literal(text))
    for row in report["refusals"]:
        for share, step in zip(refusal_shares(row), (0, report["steps"]), strict=True):
            if share is not None:
                tracker.points(step, {f"refused/{row['set']}/words": share})
                tracker.overview(step, {"refused, before and after, by words": share}, row["set"])


def closing_table(report: TuningReport) -> str:
    """What the console shows at the end."""
    lines = ["", f"{'steps':24}{report['steps']:>12,}"]
    lines.append(f"{'weights trained':24}{report['trained']:>12,} of {report['total_numel']:,}")
    if report["changed"] is not None:
        lines.append(f"{'weights that differ':24}{report['changed']:>12,}")
    if report["progress"]:
        losses = [report["progress"][row]["loss"] for row in (0, -1)]
        cells = (f"{math.nan if loss is None else loss:>12.4g}" for loss in losses)
        lines.append(f"{'loss, first and last':24}{''.join(cells)}")
    if report["refusals"]:
        lines += ["", f"{'refused (string match)':24}{'before':>12}{'after':>12}{'answers':>12}"]
        for row in report["refusals"]:
            cells = ("-" if share is None else f"{share:.1%}" for share in refusal_shares(row))
            lines.append(f"{row['set']:24}" + "".join(f"{cell:>12}" for cell in cells) + f"{num_answers(row)[1]:>12,}")
    if report["routing_drift"]:
        lines += ["", f"{'routed differently':24}{'share':>12}{'tokens':>12}"]
        for name in dict.fromkeys(row["set"] for row in report["routing_drift"]):
            rows = [row for row in report["routing_drift"] if row["set"] == name]
            changed, tokens = sum(row["changed"] for row in rows), sum(row["tokens"] for row in rows)
            lines.append(f"{name:24}{changed / max(tokens, 1):>12.2%}{tokens:>12,}")
    return "\n".join(lines)
