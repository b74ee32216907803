"""Questions to an endpoint, which rank 0 asks; what it replies is kept on disk as it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from esi_ds.config import ENDPOINT_ROUNDS
from esi_ds.eval.endpoint import Endpoint, Patience, Reply
from esi_ds.stages.interrupt import stop_requested
from esi_ds.stages.ledger import Ledger, Row
from esi_ds.zero import runtime

Question = TypeVar("Question")


@dataclass
class EndpointRounds(ABC, Generic[Question, Row]):
    """Questions to one endpoint, a few rounds at a time, so that the ranks never wait long for rank 0, which asks.

    failed: rows of questions without a reply since the endpoint last replied; on rank 0. They are written once it
    replies again. If it never does, a restart asks these questions anew, as they failed for the same reason.
    """

    endpoint: Endpoint
    rows: Ledger[Row]
    patience: Patience = field(default_factory=lambda: Patience(should_stop=stop_requested), kw_only=True)
    failed: list[Row] = field(default_factory=list, init=False)

    @abstractmethod
    def ask_chunk(self, chunk: Sequence[Question], keep: Callable[[Row, Reply], None]) -> None:
        """Ask these questions; ``keep`` is to be called with each one's row and the reply it was made of. Rank 0
        only."""

    def ask_all(self, questions: Sequence[Question], on_chunk: Callable[[Sequence[Question], int], None]) -> None:
        """Add the rows of all questions but those that the endpoint did not reply to at the end.

        on_chunk: is called on every rank with each chunk, once it is done, and the number of questions done.
        Collectives: a broadcast for each chunk, and one. Raises UserError of ``ask_chunk`` on every rank.
        """
        size = self.endpoint.concurrency * ENDPOINT_ROUNDS
        for start in range(0, len(questions), size):
            chunk = questions[start : start + size]
            self.rows.add(runtime.from_main(partial(self._keep_chunk, chunk)))
            on_chunk(chunk, start + len(chunk))
        is_up = self.patience.was_alive and self.patience.num_failed < self.endpoint.give_up_after
        self.rows.add(runtime.broadcast_object(self.failed if is_up else []))

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
        if not reply.asked:
            return []
        if not reply.is_alive:
            self.failed.append(row)
            return []
        rows = [row]
        if reply.num_requests:
            rows += self.failed
            self.failed.clear()
        return rows
