"""The result of a task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

from esi_ds.eval.rows import TaskResultRow
from esi_ds.eval.statistics import CONFIDENCE


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks.

    correct: one flag per document where the metric is the share of documents that are right, else None.
    scores: where ``correct`` is None, one number per document (None: it has none); None where no document has a number
    of its own (F1).
    Documents are in the file's order; a group's are its members' in the order of ``members``.
    low, high: Wilson's interval where ``correct`` is there, else normal by lm-eval's standard error, else None.
    num_cut: documents whose prompt lost its beginning because the model takes no more tokens.
    limit: documents per task at most. num_documents: how many there are without it.
    version: the task definition's. prompts_hash: lm-eval's hash of documents, prompts and targets: results are
    comparable document by document where it is the same. rows: file the documents are from; None: the hub's.
    """

    task: str
    metric: str
    filter: str
    value: float
    n: int
    low: float | None
    high: float | None
    correct: tuple[bool, ...] | None
    scores: tuple[float | None, ...] | None
    higher_is_better: bool | None
    num_documents: int
    num_fewshot: int
    num_cut: int
    limit: int | None
    members: tuple[str, ...]
    version: str
    prompts_hash: str
    rows: str | None
    chat_template: bool
    lm_eval: str
    confidence: float = CONFIDENCE

    def as_row(self) -> TaskResultRow:
        """For a JSON line; ``from_row`` reads it back."""
        return cast(TaskResultRow, asdict(self))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> TaskResult:
        lists = {name: tuple(row[name]) for name in ("correct", "scores", "members") if row[name] is not None}
        return cls(**{**row, **lists})
