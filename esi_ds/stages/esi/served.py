"""Responses of a model behind an endpoint, for ESI: asked and kept as an evaluation asks and keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esi_ds.data.prompts import PromptSet, QuestionSet
from esi_ds.data.thoughts import has_marks
from esi_ds.data.turns import Prompt
from esi_ds.eval.asking import check_served
from esi_ds.eval.rows import ANSWER_KEY, AnswerRow, answered, mark_unfinished, marks_of
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.served import ANSWERS, AnswerRounds, ServedModel
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime

CONTROL_ANSWERS = f"control_{ANSWERS}"


def check_reachable(model: ServedModel, folder: Path) -> None:
    """Raise UserError, on every rank, where the endpoint could not be asked, if nothing was asked yet: before weights
    are loaded. One broadcast."""

    def check() -> None:
        if not any((folder / name).exists() for name in (ANSWERS, CONTROL_ANSWERS)):
            check_served(model.endpoint, model.field)

    runtime.from_main(check)


def ask_endpoint(
    model: ServedModel,
    prompts: Sequence[Prompt],
    folder: Path,
    tracker: Tracker,
    goals: Sequence[str | None] | None = None,
    control: bool = False,
) -> tuple[list[str], dict[int, str]]:
    """ESI's responses: the text to each prompt, "" where there is none, and index → why the model gave none.

    The rows are kept in ``answers.jsonl``, as an evaluation keeps them. goals: what each prompt is after, if any says.
    control: these are the prompts of ``control``, whose rows have a file of their own.

    Collectives: one broadcast of the rows on disk, and those of ``AnswerRounds.ask``. Raises UserError, Interrupted.
    """
    aims = tuple(goal for goal in goals or () if goal is not None)  # all prompts of a set have one, or none has
    prompt_set = PromptSet(tuple(prompts), "", "", (), goals=aims)
    question_set, file = QuestionSet("data.prompts", "harmful", prompt_set), folder / ANSWERS
    if control:
        question_set, file = QuestionSet("control.prompts", "benign", prompt_set), folder / CONTROL_ANSWERS
    answers: Ledger[AnswerRow] = Ledger(file, ANSWER_KEY, AnswerRow)
    AnswerRounds(model, answers, tracker).ask([question_set])
    mark_unfinished(answers.rows.values())
    rows = answers.sort((model.name, question_set.name, index) for index in range(len(prompts)))
    num_cut = sum(row.get("cut", False) for row in rows)
    tracker.log(f"{model.name}: {num_cut} of {len(rows)} responses cut at {model.endpoint.max_tokens} tokens")
    unanswered = {row["index"]: str(row["excluded"]) for row in rows if answered(row) is None}
    # An unfinished text without a mark would be taken for an answer.
    texts = [row["response"] or "" for row in rows]
    return [
        text if row["index"] not in unanswered or has_marks(text, marks_of(row)) else ""
        for row, text in zip(rows, texts, strict=True)
    ], unanswered
