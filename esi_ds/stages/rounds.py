"""Questions to an endpoint, which rank 0 asks; what it replies is kept on disk as it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from esi_ds.config import ENDPOINT_ROUNDS
from esi_ds.eval.endpoint import Endpoint, Patience, Reply
from esi_ds.stages.interrupt import stop_requested
from esi_ds.stages.ledger import Key, Ledger, Row
from esi_ds.zero import runtime

Question = TypeVar("Question")


@dataclass
class EndpointRounds(ABC, Generic[Question, Row]):
    """Questions to one endpoint, a few rounds at a time, so that the ranks never wait long for rank 0, which asks.

    failed: rows of questions without a reply since the endpoint last replied; on rank 0. They are written once it
    replies again. If it never does, a restart asks these questions again, since they failed for the same reason. A
    question that the endpoint was too busy for is not among them: it is asked again either way. last_problem: of the
    last question without a reply; on rank 0.
    """

    endpoint: Endpoint
    rows: Ledger[Row]
    patience: Patience = field(default_factory=lambda: Patience(should_stop=stop_requested), kw_only=True)
    failed: list[Row] = field(default_factory=list, init=False)
    last_problem: str = field(default="", init=False)

    def settle(self, endpoint: Endpoint, as_asked: Callable[[Endpoint], Endpoint]) -> None:
        """Take the endpoint with the ``extra`` that ``as_asked`` gives it on rank 0, which may ask the server. Its key
        stays out of the broadcast. One broadcast. Raises UserError of ``as_asked`` on every rank."""
        self.endpoint = replace(endpoint, extra=runtime.from_main(lambda: as_asked(endpoint).extra))

    @abstractmethod
    def ask_chunk(self, chunk: Sequence[Question], keep: Callable[[Row, Reply], None]) -> None:
        """Ask these questions; ``keep`` is to be called with each one's row and the reply it was made of. Rank 0
        only."""

    @abstractmethod
    def key(self, question: Question) -> Key:
        """The ledger's key of the question's row."""

    def ask_all(self, questions: Sequence[Question], on_chunk: Callable[[Sequence[Question], int], None]) -> int:
        """Add the rows of all questions but those that the endpoint did not reply to at the end, or was too busy for.

        on_chunk: is called on every rank with each chunk, once it is done, and the number of questions done.
        Returns how many questions are left without a row. Collectives: a broadcast for each chunk, and two. Raises
        UserError of ``ask_chunk`` on every rank.
        """
        self._ask_once(questions, on_chunk)
        # What it was too busy for, now that the others are answered.
        self._ask_once(self._left(questions), lambda chunk, num_done: on_chunk((), len(questions)))
        return len(self._left(questions))

    def _left(self, questions: Sequence[Question]) -> list[Question]:
        return [question for question in questions if self.key(question) not in self.rows.rows]

    def _ask_once(self, questions: Sequence[Question], on_chunk: Callable[[Sequence[Question], int], None]) -> None:
        size = self.endpoint.concurrency * ENDPOINT_ROUNDS
        for start in range(0, len(questions), size):
            chunk = questions[start : start + size]
            self.rows.add(runtime.from_main(partial(self._keep_chunk, chunk)))
            on_chunk(chunk, start + len(chunk))
        is_up = self.patience.was_alive and self.patience.num_failed < self.endpoint.give_up_after
        self.rows.add(runtime.broadcast_object(self.failed if is_up else []))
        self.failed.clear()

    def _keep_chunk(self, chunk: Sequence[Question]) -> list[Row]:
        """The rows that count, which are in the ledger already. Rank 0 only."""
        kept: list[Row] = []

        def keep(row: Row, reply: Reply) -> None:
            rows = self._rows_to_keep(row, reply)
            kept.extend(rows)
            self.rows.add(rows)  # at once: it was paid for

        self.ask_chunk(chunk, keep)
        return kept

    def _rows_to_keep(self, row: Row, reply: Reply) -> list[Row]:
        """The row with this reply, and those of the failures before it if the endpoint replies again."""
        if not reply.is_alive:
            if reply.num_requests:
                self.last_problem = reply.problem or ""
            if reply.asked:
                self.failed.append(row)
            return []
        rows = [row]
        if reply.num_requests:
            rows += self.failed
            self.failed.clear()
        return rows
