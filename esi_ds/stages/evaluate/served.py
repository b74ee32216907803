"""Answers of a model behind an endpoint, which rank 0 asks; kept on disk as they come, none asked for twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from esi_ds.config import ENDPOINT_ROUNDS
from esi_ds.data.prompts import QuestionSet
from esi_ds.data.thoughts import UNFINISHED, final_answer
from esi_ds.errors import UserError
from esi_ds.eval.asking import ask_prompts, check_served
from esi_ds.eval.endpoint import Patience, Reply
from esi_ds.eval.rows import AnswerRow
from esi_ds.stages.evaluate.prepare import ServedModel
from esi_ds.stages.interrupt import check_stop, stop_requested
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime


@dataclass
class AnswerRounds:
    """Prompts to one endpoint, a few rounds at a time, so that the ranks never wait long for rank 0, which asks.

    failed: rows of prompts without a reply since the endpoint last replied; on rank 0. They count as missing once it
    replies again; if it never does, a restart asks them anew.
    """

    model: ServedModel
    answers: Ledger[AnswerRow]
    tracker: Tracker
    patience: Patience = field(default_factory=lambda: Patience(should_stop=stop_requested))
    failed: list[AnswerRow] = field(default_factory=list)

    def ask(self, sets: Sequence[QuestionSet]) -> None:
        """Add a row for every prompt that ``answers`` lacks.

        Collectives: a broadcast and a gather for each chunk, and three broadcasts. Raises Interrupted, and UserError,
        on every rank, where another model is served, or where the endpoint is given up: what was answered is kept.
        """
        waiting = [row for row in self._rows(sets) if self.answers.key(row) not in self.answers.rows]
        if not waiting:
            return
        model, size = self.model, self.model.endpoint.concurrency * ENDPOINT_ROUNDS
        runtime.from_main(lambda: check_served(model.endpoint, model.field))
        self.tracker.log(f"{model.name}: {len(waiting)} prompts to its endpoint; its fluency is not measured")
        bar = self.tracker.progress(total=len(waiting), initial=0, unit="prompt", description=f"answer: {model.name}")
        with bar:
            for start in range(0, len(waiting), size):
                chunk = waiting[start : start + size]
                self.answers.add(runtime.from_main(partial(self._ask_chunk, chunk)))
                bar.update(len(chunk))
                check_stop(f"{start + len(chunk)} prompts answered by {model.name}")
        is_up = self.patience.was_alive and self.patience.num_failed < model.endpoint.give_up_after
        self.answers.add(runtime.broadcast_object(self.failed if is_up else []))
        num_left = sum(self.answers.key(row) not in self.answers.rows for row in waiting)
        last = runtime.broadcast_object(self.failed[-1]["excluded"] if self.failed else "")
        if num_left:
            problem = f"gave no answer to {num_left} prompts (the last: {last})"
            raise UserError(model.field, model.endpoint.url, problem, "start again once it works: they are asked anew")

    def _rows(self, sets: Sequence[QuestionSet]) -> list[AnswerRow]:
        return [
            {
                "model": self.model.name,
                "set": question_set.name,
                "index": index,
                "prompt": prompt,
                "response": None,
                "excluded": None,
            }
            for question_set in sets
            for index, prompt in enumerate(question_set.prompts)
        ]

    def _ask_chunk(self, chunk: Sequence[AnswerRow]) -> list[AnswerRow]:
        """Rows of the answers that count, which are in the ledger already. Rank 0 only."""
        rows: list[AnswerRow] = []

        def keep(number: int, reply: Reply) -> None:
            new = self._rows_to_keep(chunk[number], reply)
            rows.extend(new)
            self.answers.add(new)  # at once: it was paid for

        model = self.model
        prompts = [row["prompt"] for row in chunk]
        ask_prompts(model.endpoint, prompts, model.system_prompt, keep, self.patience, f"{model.field}.model")
        return rows

    def _rows_to_keep(self, row: AnswerRow, reply: Reply) -> list[AnswerRow]:
        """The row with this reply, and those of the failures before it if the endpoint replies again."""
        if not reply.asked:
            return []
        new = answer_row(row, reply)
        if not reply.is_alive:
            self.failed.append(new)
            return []
        rows = [new, *self.failed]
        self.failed.clear()
        return rows


def answer_row(row: AnswerRow, reply: Reply) -> AnswerRow:
    """The row of a prompt with what was replied to it."""
    new = row.copy()
    if reply.text is None:
        new["excluded"] = reply.problem or "no reply"
        return new
    text = reply.text.encode("utf-8", "replace").decode()  # half surrogate pairs
    new["response"] = text
    if final_answer(text) is None:
        new["excluded"] = UNFINISHED
    if reply.is_cut:
        new["cut"] = True
    return new
