"""What every model is asked: a row for each answer it is to give, and the random numbers that a sampled one takes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from esi_ds.core.noise import stream
from esi_ds.data.prompts import QuestionSet
from esi_ds.eval.rows import AnswerRow, answer_key
from esi_ds.stages.ledger import Key

ANSWER_NOISE = 0x5A4D  # apart from what else ``run.seed`` is used for
MAX_SEED = 2**31 - 1  # what every server takes


def unanswered_rows(model: str, sets: Sequence[QuestionSet], samples: int) -> list[AnswerRow]:
    """A row without an answer for each that the model is to give, in the order of the tables: by set, prompt, sample.

    samples: answers to a prompt; with one, rows have no ``sample``.
    """
    rows: list[AnswerRow] = []
    for question_set in sets:
        for index, prompt in enumerate(question_set.prompts):
            row: AnswerRow = {
                "model": model,
                "set": question_set.name,
                "index": index,
                "prompt": prompt,
                "response": None,
                "excluded": None,
            }
            if (goal := question_set.goal(index)) is not None:
                row["goal"] = goal
            rows += [row] if samples == 1 else [{**row, "sample": sample} for sample in range(samples)]
    return rows


def answer_keys(names: Sequence[str], sets: Sequence[QuestionSet], samples: int) -> list[Key]:
    """``answer_key`` of every answer the models are to give, in the order of the tables."""
    return [answer_key(row) for name in names for row in unanswered_rows(name, sets, samples)]


def answer_stream(seed: int, row: AnswerRow) -> int:
    """The stream of random numbers of a sampled answer, int64: of seed, set, prompt and sample.

    It does not depend on the model, so that models are compared on the same noise.
    """
    return stream(seed, ANSWER_NOISE, zlib.crc32(row["set"].encode()), row["index"], row.get("sample", 0))


def request_seed(seed: int, row: AnswerRow) -> int:
    """The seed that a server is sent for a sampled answer, at least 0."""
    return answer_stream(seed, row) & MAX_SEED
