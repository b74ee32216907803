"""Local files of the benchmarks, in every published shape, as the rows that lm-eval's tasks read.

A row that does not fit is an error that names it; scored as it is, it would count as a wrong answer of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esi_ds.data.rows import TABLES, Row, data_file, read_rows
from esi_ds.data.tables import read_lines, table_rows
from esi_ds.errors import UserError
from esi_ds.eval.refusals import REFUSAL_LISTS
from esi_ds.reading import reading

NEWS = ("World", "Sports", "Business", "Sci/Tech")
LETTERS = "ABCD"
DECISIONS = ("yes", "no", "maybe")
# What each task needs, for error messages.
NEEDED = {
    "gsm8k": 'question and answer (which ends with "#### 42")',
    "ag_news": "text and label 0 to 3, or title, description and label 1 to 4",
    "pubmedqa": "QUESTION, CONTEXTS and final_decision",
    "medqa": "question, options A to D and answer_idx, or sent1, ending0 to ending3 and label",
    "mmlu": "question, subject, four choices and answer (0 to 3 or A to D)",
    "examples/benign": "prompt and answer",
}
# Columns of files that were published without a header: AG News has three, MMLU six.
WITHOUT_HEADER = {
    "ag_news": ("label", "title", "description"),
    "mmlu": ("question", "A", "B", "C", "D", "answer"),
}
SPLIT_OF_FILE_NAME = re.compile(r"_(test|val|dev|validation|train)$")


class _Unfit(Exception):
    """A row does not fit; the text says why."""


def read_task_rows(shape: str, path: str, field: str) -> list[Row]:
    """Rows of a local file as the task reads them. ``shape`` is a key of NEEDED. Raises UserError naming ``field``."""
    rows = _read(shape, path, field)
    lowered = [{str(name).strip().lower(): value for name, value in row.items() if name is not None} for row in rows]
    if shape == "ag_news":
        lowered = _count_labels_from_zero(lowered)
    if shape == "mmlu":
        subject = SPLIT_OF_FILE_NAME.sub("", Path(path).stem)
        lowered = [{**row, "subject": row.get("subject") or subject} for row in lowered]
    task_rows = []
    for number, row in enumerate(lowered):
        try:
            task_rows.append(_SHAPES[shape](row))
        except KeyError as error:
            columns = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
            raise UserError(
                field, path, f"row {number} has no {error.args[0]}; its columns are {columns}", f"give {NEEDED[shape]}"
            ) from error
        except _Unfit as error:
            raise UserError(field, path, f"row {number}: {error}", f"give {NEEDED[shape]}") from error
    return task_rows


def score_answer(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """The metric of ``examples/benign``, called by lm-eval: the reply holds the answer as whole words and no refusal,
    as ``is_correct`` of tiny_models/measure.py counts it."""
    answer = re.escape(doc["answer"])
    is_said = re.search(rf"(?<!\w){answer}(?!\w)", answers[0], re.IGNORECASE)
    return {"acc": float(bool(is_said) and not REFUSAL_LISTS["examples"].matches(answers[0]))}


def _read(shape: str, path: str, field: str) -> list[Row]:
    names = WITHOUT_HEADER.get(shape)
    if names is None or Path(path).suffix.lower() not in TABLES:
        return read_rows(path, field)
    file = data_file(path, field)
    with reading(field, path, f"give {', '.join(names)}"):
        lines = read_lines(file)
        if lines and _is_data(shape, lines[0].cells):
            return table_rows(names, lines)
    return read_rows(path, field)


def _is_data(shape: str, first: list[Any]) -> bool:
    """Whether a CSV's first line is a row of data and not a header."""
    if shape == "ag_news":
        return str(first[0]) in ("1", "2", "3", "4")
    return str(first[-1]) in tuple(LETTERS) and "question" not in (str(name).lower() for name in first)


def _text(row: Row, name: str) -> str:
    """The text of a column; raises _Unfit if it is empty or not a string."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise _Unfit(f"{name} is not a text")
    return value


def _index(value: Any, letters: str = "") -> int:
    """An answer's index, from a number or text 0 to 3 or one of ``letters``. Raises _Unfit."""
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip() in letters:
        return letters.index(value.strip())
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):  # int() would round it
        raise _Unfit(f"{value!r} is not an answer")
    try:
        index = int(value)
    except (TypeError, ValueError):
        raise _Unfit(f"{value!r} is not an answer") from None
    if index not in range(4):
        raise _Unfit(f"the answer {value!r} is not in 0 to 3")
    return index


def _gsm8k(row: Row) -> Row:
    if not re.search(r"#### *-?[\d.,]*\d", _text(row, "answer")):
        raise _Unfit('its answer does not end with "#### " and a number')
    return {"question": _text(row, "question"), "answer": row["answer"]}


def _count_labels_from_zero(rows: list[Row]) -> list[Row]:
    """Labels of AG News from 0, as on the hub; the published CSV counts from 1.

    The labels that occur decide which it is; if they are only 1 to 3, the columns' names do.
    """
    rows = [{**row, "label": row.get("label", row.get("class index", row.get("class")))} for row in rows]
    if any(row["label"] is None for row in rows):
        return [{name: value for name, value in row.items() if value is not None} for row in rows]
    labels = {str(row["label"]).strip() for row in rows}
    from_one = "4" in labels or ("0" not in labels and any("title" in row for row in rows))
    return [
        {**row, "label": int(row["label"]) - 1 if from_one and str(row["label"]).strip().isdecimal() else row["label"]}
        for row in rows
    ]


def _ag_news(row: Row) -> Row:
    label = row["label"]
    text = _text(row, "text") if "text" in row else f"{_text(row, 'title')} {_text(row, 'description')}"
    return {"text": text, "label": NEWS.index(label) if label in NEWS else _index(label)}


def _pubmedqa(row: Row) -> Row:
    contexts = row["contexts"] if "contexts" in row else row["context"]
    if isinstance(contexts, dict):  # qiaojin/PubMedQA on the hub
        contexts = contexts.get("contexts")
    contexts = [contexts] if isinstance(contexts, str) else contexts
    if not isinstance(contexts, list) or not all(isinstance(part, str) for part in contexts):
        raise _Unfit("CONTEXTS is not a list of texts")
    if row["final_decision"] not in DECISIONS:
        raise _Unfit(f"final_decision {row['final_decision']!r} is not one of {', '.join(DECISIONS)}")
    return {"QUESTION": _text(row, "question"), "CONTEXTS": contexts, "final_decision": row["final_decision"]}


def _medqa(row: Row) -> Row:
    if "sent1" in row:
        endings = {f"ending{number}": _text(row, f"ending{number}") for number in range(4)}
        return {"sent1": _text(row, "sent1"), **endings, "label": _index(row["label"])}
    question, options = _text(row, "question"), row["options"]
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options = {option.get("key"): option.get("value") for option in options}
    if not isinstance(options, dict) or sorted(map(str, options)) != list(LETTERS):
        raise _Unfit("options are not A to D: lm-eval's task is the one of four options")
    endings = {f"ending{number}": _text(options, letter) for number, letter in enumerate(LETTERS)}
    return {"sent1": question, **endings, "label": _index(row["answer_idx"], LETTERS)}


def _mmlu(row: Row) -> Row:
    choices = [row[letter] for letter in LETTERS.lower()] if "choices" not in row and "a" in row else row["choices"]
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise _Unfit("choices are not four texts")
    answer = _index(row["answer"], LETTERS)
    return {"question": _text(row, "question"), "subject": row["subject"], "choices": choices, "answer": answer}


def _answers(row: Row) -> Row:
    return {"prompt": _text(row, "prompt"), "answer": _text(row, "answer")}


_SHAPES: dict[str, Callable[[Row], Row]] = {
    "gsm8k": _gsm8k,
    "ag_news": _ag_news,
    "pubmedqa": _pubmedqa,
    "medqa": _medqa,
    "mmlu": _mmlu,
    "examples/benign": _answers,
}
