"""A model behind an endpoint, which rank 0 asks; its answers are kept on disk as they come, none asked for twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from esi_ds.config import Model, ModelEndpoint
from esi_ds.data.asked import changes_the_prompt
from esi_ds.data.prompts import QuestionSet
from esi_ds.data.thoughts import UNFINISHED, final_answer
from esi_ds.errors import UserError
from esi_ds.eval.asking import PENALTIES_OFF, ask_prompts, asked_of, check_served
from esi_ds.eval.endpoint import ONCE_IT_WORKS, Endpoint, Reply
from esi_ds.eval.rows import AnswerRow, marks_of
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Key, Ledger
from esi_ds.stages.questions import request_seed, unanswered_rows
from esi_ds.stages.rounds import EndpointRounds
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import runtime

ANSWERS = "answers.jsonl"
ENDPOINT_KEYS = {"concurrency", "request_timeout", "item_timeout", "max_attempts", "max_tokens", "extra", "replies_as"}


@dataclass(frozen=True)
class ServedModel:
    """A model that another engine serves. Its weights are not here, nor what needs them."""

    name: str  # in tables and files
    before: str | None  # name of the model it is compared with
    endpoint: Endpoint
    field: str  # the endpoint's key in the config
    system_prompt: str | None  # the system's turn of prompts that have none
    thought_marks: list[str] | None = None  # of the config
    seed: int | None = None  # of sampled answers; None: answers are greedy

    @classmethod
    def of(
        cls,
        section: ModelEndpoint,
        field: str,
        max_tokens: int,
        model: Model,
        name: str | None = None,
        before: str | None = None,
    ) -> ServedModel:
        """The model that a section of the config names, whose answers have at most ``max_tokens``. Raises UserError.

        model: of the config. Its system prompt and marks of thoughts are every model's, and so are its values for chat
        templates, which vLLM and SGLang read under this key of the body.
        """
        limits = section.model_dump(include=ENDPOINT_KEYS)
        if model.template_kwargs:
            limits["extra"] = {"chat_template_kwargs": dict(model.template_kwargs), **section.extra}
        fields = f"{field}.base_url", f"{field}.key_variable"
        endpoint = Endpoint.at(section.model, section.base_url, section.key_variable, fields, max_tokens, **limits)
        return cls(name or section.model, before, endpoint, field, model.system_prompt, model.thought_marks)

    def sampled(self, sampling: Mapping[str, float], seed: int) -> ServedModel:
        """The model with answers that are drawn so; a null of ``extra`` stays, for what its server takes none of."""
        endpoint = replace(self.endpoint, extra={**sampling, **self.endpoint.extra})
        return replace(self, endpoint=endpoint, seed=seed)

    @property
    def path(self) -> str:
        """Its name at the endpoint."""
        return self.endpoint.model

    @property
    def fingerprint(self) -> str:
        """What is known of the weights, in place of their fingerprint."""
        name = self.endpoint.replies_as
        return f"endpoint:{self.endpoint.model}" + (f" as {name}" if name else "")


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

        Collectives: a broadcast and a gather for each chunk, and four broadcasts. Raises Interrupted, and UserError, on
        every rank, where another model is served, or where prompts are left without a reply: what was answered is kept.
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
        self.settle(model.endpoint, partial(check_served, field=model.field))
        if self.endpoint != model.endpoint:
            self._tracker.remark(f"{model.name}: {PENALTIES_OFF}")
        self._tracker.log(f"{model.name}: {counted(len(waiting), 'prompt')} to its endpoint")
        bar = self._tracker.progress(total=len(waiting), initial=0, unit="prompt", description=f"answer: {model.name}")

        def on_chunk(chunk: Sequence[AnswerRow], num_done: int) -> None:
            bar.update(len(chunk))
            check_stop(f"{counted(num_done, 'prompt')} answered by {model.name}")

        with bar:
            num_left = self.ask_all(waiting, on_chunk)
        if num_left:
            last = runtime.broadcast_object(self.last_problem)
            problem = f"gave no answer to {counted(num_left, 'prompt')} (the last: {last})"
            remedy = f"start again {ONCE_IT_WORKS}: they will be asked again"
            raise UserError(model.field, model.endpoint.url, problem, remedy)

    def key(self, question: AnswerRow) -> Key:
        return self.rows.key(question)

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
        ask_prompts(self.endpoint, prompts, model.system_prompt, take, self.patience, f"{model.field}.model", seeds)


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
