"""A tuning run's report on the console, in TensorBoard and as pieces of its page."""

from __future__ import annotations

from collections.abc import Sequence

from esi_ds.data.thoughts import MARKS, Marks, final_answer
from esi_ds.data.turns import prompt_text
from esi_ds.report.contents import RefusalRow, TunedAnswerRow, TuningReport
from esi_ds.tracking import Tracker, literal

NUM_SAMPLES = 4  # of each set


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
        asked_before = "before" in rows[0]
        table.append(
            {
                "set": name,
                "n": len(rows),
                "refused_before": sum(row["refused_before"] or 0 for row in rows) if asked_before else None,
                "empty_before": sum(_is_empty(row["before"], row["refused_before"], marks) for row in rows)
                if asked_before
                else None,
                "refused_after": sum(row["refused_after"] or 0 for row in rows),
                "empty_after": sum(_is_empty(row["after"], row["refused_after"], marks) for row in rows),
            }
        )
    return table


def _is_empty(response: str, refused: bool | None, marks: Marks) -> bool:
    """Whether there is no answer. refused: None if the response ends within a thought."""
    return refused is None or not (final_answer(response, None, marks) or "").strip()


def publish(tracker: Tracker, report: TuningReport) -> None:
    """Sample answers as text, and refusals as two points of a curve over the steps: before and after tuning."""
    for sample in report["samples"]:
        answers = [f"before: {sample['before']}"] if "before" in sample else []
        text = "\n\n".join([prompt_text(sample["prompt"]), *answers, f"after: {sample['after']}"])
        tracker.text(f"answers/{sample['set']}/{sample['index']}", literal(text))
    for row in report["refusals"]:
        for count, step in ((row["refused_before"], 0), (row["refused_after"], report["steps"])):
            if count is not None:
                tracker.points(step, {f"refused/{row['set']}/words": count / row["n"]})
                tracker.overview(step, {"refused, before and after, by words": count / row["n"]}, row["set"])


def closing_table(report: TuningReport) -> str:
    """What the console shows at the end."""
    lines = ["", f"{'steps':24}{report['steps']:>12,}"]
    lines.append(f"{'weights trained':24}{report['trained']:>12,} of {report['total_numel']:,}")
    if report["changed"] is not None:
        lines.append(f"{'weights that differ':24}{report['changed']:>12,}")
    if report["progress"]:
        first, last = report["progress"][0], report["progress"][-1]
        lines.append(f"{'loss, first and last':24}{first['loss'] or float('nan'):>12.4g}{last['loss'] or 0.0:>12.4g}")
    if report["refusals"]:
        lines += ["", f"{'refused (string match)':24}{'before':>12}{'after':>12}{'answers':>12}"]
        for row in report["refusals"]:
            counts = (row["refused_before"], row["refused_after"])
            cells = ("-" if count is None else f"{count / row['n']:.1%}" for count in counts)
            lines.append(f"{row['set']:24}" + "".join(f"{cell:>12}" for cell in cells) + f"{row['n']:>12,}")
    if report["routing_drift"]:
        lines += ["", f"{'tokens routed otherwise':24}{'share':>12}{'tokens':>12}"]
        for name in dict.fromkeys(row["set"] for row in report["routing_drift"]):
            rows = [row for row in report["routing_drift"] if row["set"] == name]
            changed, tokens = sum(row["changed"] for row in rows), sum(row["tokens"] for row in rows)
            lines.append(f"{name:24}{changed / max(tokens, 1):>12.2%}{tokens:>12,}")
    return "\n".join(lines)
