"""The result of one task of lm-eval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

from esi_ds.eval.rows import TaskResultRow
from esi_ds.eval.statistics import CONFIDENCE


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks.

    value: None where it is not finite. n: documents with a score.
    correct: one flag per document if the metric is the share of correct documents, else None.
    scores: if ``correct`` is None, one number per document (None for a document without one); None if documents have
    no numbers (F1).
    Documents are in the file's order; those of a group are its members', in the order of ``members``.
    low, high: Wilson's interval if ``correct`` is present, else normal by lm-eval's standard error; None without
    one, or where it is 0.
    num_cut: how many documents' prompts lost their beginning because they were too long for the model.
    num_unfinished: how many documents have a reply that ends within a thought, which is not an answer.
    num_without_thought: how many documents' choices are scored where the model would begin to think.
    limit: the most documents per task. num_documents: how many there are without it.
    version: of the task's definition. prompts_hash: lm-eval's hash of documents, prompts and targets; results with
    equal hashes can be compared document by document. rows: the file of the documents; None: the hub's data set.
    chat_template: whether it was applied. lm_eval: the version of lm-eval.
    """

    task: str
    metric: str
    filter: str
    value: float | None
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
    num_unfinished: int = 0
    num_without_thought: int = 0

    def as_row(self) -> TaskResultRow:
        """The result as JSON."""
        return cast(TaskResultRow, asdict(self))
