"""What an evaluation keeps on disk as it goes, and what is counted of it in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esi_ds.config import Config
from esi_ds.eval.rows import ANSWER_KEY, AnswerRow, DivergenceRow, SurpriseRow, VerdictRow, mark_unfinished
from esi_ds.eval.tables import Divergences, Surprises, Verdicts
from esi_ds.stages.evaluate.answering import SURPRISES, thought_notes, unread_notes
from esi_ds.stages.evaluate.divergence import DIVERGENCES
from esi_ds.stages.evaluate.judging import VERDICT_KEY, VERDICTS, judge_all, verdict_key
from esi_ds.stages.evaluate.prepare import BASE, EvalInputs
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.questions import answer_keys
from esi_ds.stages.served import ANSWERS
from esi_ds.tracking import Tracker


@dataclass(frozen=True)
class EvalOutcome:
    """Everything an evaluation's tables count, but for tasks."""

    answers: list[AnswerRow]  # in the order of the tables
    verdicts: Verdicts
    surprises: Surprises
    divergences: Divergences
    usage: dict[str, str]  # endpoint's name → what it used


@dataclass(frozen=True)
class EvalLedgers:
    """Answers, surprises and verdicts, the same on every rank."""

    answers: Ledger[AnswerRow]
    surprises: Ledger[SurpriseRow]
    verdicts: Ledger[VerdictRow]
    divergences: Ledger[DivergenceRow] | None  # None where none are asked for

    @classmethod
    def open(cls, folder: Path, has_divergences: bool = False) -> EvalLedgers:
        """The ledgers of a run folder, empty or as an earlier process left them. A broadcast for each.

        Rows about deleted answers are dropped, so that they are computed again.
        """
        answers = Ledger(folder / ANSWERS, ANSWER_KEY, AnswerRow)
        surprises = Ledger(folder / SURPRISES, ANSWER_KEY, SurpriseRow)
        verdicts = Ledger(folder / VERDICTS, VERDICT_KEY, VerdictRow)
        divergences = Ledger(folder / DIVERGENCES, ANSWER_KEY, DivergenceRow) if has_divergences else None
        surprises.keep(lambda row: answers.key(row) in answers.rows)
        verdicts.keep(lambda row: answers.key(row) in answers.rows)
        if divergences is not None:
            divergences.keep(lambda row: answers.key({**row, "model": BASE}) in answers.rows)
        return cls(answers, surprises, verdicts, divergences)

    def judge(
        self,
        names: Sequence[str],
        inputs: EvalInputs,
        config: Config,
        deepspeed_config: dict[str, Any],
        tracker: Tracker,
    ) -> EvalOutcome:
        """Sort the answers of the models ``names`` and let every judge judge those to harmful prompts.

        Collectives: those of ``judge_all``. Raises Interrupted.
        """
        order = answer_keys(names, inputs.sets, inputs.section.samples)
        mark_unfinished(self.answers.rows.values())
        answers = self.answers.sort(order)
        self.surprises.sort(order)
        divergences: Divergences = {}
        if self.divergences is not None:
            self.divergences.sort(order)
            divergences = self.divergences.rows
        for note in thought_notes(answers):
            tracker.remark(note)
        judged = [row for row in answers if row["set"] in inputs.harmful_sets]
        if any(judge.section.reads == "answer" for judge in inputs.judges):
            for note in unread_notes(judged, inputs.thinks):
                tracker.remark(note)
        usage = judge_all(inputs.judges, judged, self.verdicts, config, deepspeed_config, tracker)
        self.verdicts.sort(verdict_key(judge, row) for judge in inputs.judges for row in judged)
        return EvalOutcome(answers, self.verdicts.rows, self.surprises.rows, divergences, usage)
