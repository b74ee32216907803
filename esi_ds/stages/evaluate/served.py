"""Answers of a model behind an endpoint, which rank 0 asks; kept on disk as they come, none asked for twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from esi_ds.data.asked import changes_the_prompt
from esi_ds.data.prompts import QuestionSet
from esi_ds.data.thoughts import UNFINISHED, final_answer
from esi_ds.errors import UserError
from esi_ds.eval.asking import ask_prompts, asked_of, check_served
from esi_ds.eval.endpoint import Reply
from esi_ds.eval.rows import AnswerRow, marks_of
from esi_ds.stages.evaluate.prepare import ServedModel
from esi_ds.stages.evaluate.questions import request_seed, unanswered_rows
from esi_ds.stages.evaluate.rounds import EndpointRounds
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import runtime


class AnswerRounds(EndpointRounds[AnswerRow, AnswerRow]):
    """Prompts to the endpoint of a model under evaluation; failed ones count as missing once it replies again."""

    def __init__(self, model: ServedModel, answers: Ledger[AnswerRow], tracker: Tracker):
        super().__init__(model.endpoint, answers)
        self._model, self._tracker = model, tracker
        # It replied to an earlier start: what it refuses now is the question's fault, even if all that are left are so.
        known = (row for row in answers.rows.values() if row["model"] == model.name)
        self.patience.was_alive = any(row["response"] is not None for row in known)

    def ask(self, sets: Sequence[QuestionSet], samples: int = 1) -> None:
        """Add every row of ``unanswered_rows`` that ``answers`` lacks.

        Collectives: a broadcast and a gather for each chunk, and three broadcasts. Raises Interrupted, and UserError,
        on every rank, where another model is served, or where the endpoint is given up: what was answered is kept.
        """
        self._remark_sampling()
        rows = unanswered_rows(self._model.name, sets, samples)
        waiting = [row for row in rows if self.rows.key(row) not in self.rows.rows]
        if not waiting:
            return
        model = self._model
        asked = asked_of(model.endpoint, model.system_prompt, model.seed)
        for row in waiting if changes_the_prompt(asked) else ():
            row["asked"] = asked
        runtime.from_main(lambda: check_served(model.endpoint, model.field))
        self._tracker.log(f"{model.name}: {counted(len(waiting), 'prompt')} to its endpoint")
        bar = self._tracker.progress(total=len(waiting), initial=0, unit="prompt", description=f"answer: {model.name}")

        def on_chunk(chunk: Sequence[AnswerRow], num_done: int) -> None:
            bar.update(len(chunk))
            check_stop(f"{counted(num_done, 'prompt')} answered by {model.name}")

        with bar:
            self.ask_all(waiting, on_chunk)
        num_left = sum(self.rows.key(row) not in self.rows.rows for row in waiting)
        last = runtime.broadcast_object(self.failed[-1]["excluded"] if self.failed else "")
        if num_left:
            problem = f"gave no answer to {counted(num_left, 'prompt')} (the last: {last})"
            raise UserError(model.field, model.endpoint.url, problem, "start again once it works: they are asked anew")

    def _remark_sampling(self) -> None:
        """Say so where ``extra`` makes the server sample answers that the config would have greedy."""
        name, temperature = self._model.name, self.endpoint.extra.get("temperature", 0)
        if self._model.seed is None and temperature != 0:
            how = "as its server does" if temperature is None else f"at temperature {temperature}"
            self._tracker.remark(f"answers of {name} are sampled {how}: extra.temperature is set")

    def ask_chunk(self, chunk: Sequence[AnswerRow], keep: Callable[[AnswerRow, Reply], None]) -> None:
        def take(number: int, reply: Reply) -> None:
            keep(answer_row(chunk[number], reply, model.thought_marks), reply)

        model = self._model
        prompts = [row["prompt"] for row in chunk]
        seeds = None if model.seed is None else [request_seed(model.seed, row) for row in chunk]
        ask_prompts(model.endpoint, prompts, model.system_prompt, take, self.patience, f"{model.field}.model", seeds)


def answer_row(row: AnswerRow, reply: Reply, thought_marks: list[str] | None = None) -> AnswerRow:
    """The row of a prompt with what was replied to it. thought_marks: of the config."""
    new = row.copy()
    if thought_marks is not None:
        new["thought_marks"] = thought_marks
    if reply.text is None:
        new["excluded"] = reply.problem or "no reply"
        return new
    text = reply.text.encode("utf-8", "replace").decode()  # half surrogate pairs
    new["response"] = text
    if final_answer(text, None, marks_of(new)) is None:
        new["excluded"] = UNFINISHED
    if reply.is_cut:
        new["cut"] = True
    return new
