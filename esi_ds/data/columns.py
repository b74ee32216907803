"""What else in a row belongs to its meaning, beside the columns of question and answer (docs/data.md).

Such a column is read with the question, or the row is refused: none is dropped. Names are compared in lower case.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from esi_ds.errors import UserError
from esi_ds.reading import parse_json

CHATS = ("messages", "conversations")
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
HISTORY = ("history", "chat_history", "conversation_history")
INPUTS = ("input", "context", "contexts", "passage")
OPTIONS = ("options", "choices")
# Columns of one option each: option_a, option 1, optionA; without a mark between them "options" would be one, too.
OPTION = re.compile(r"(?:option|choice|ending|opt|op)(?:[ _-]([a-z]|[0-9]{1,2})|([a-j]|[0-9]{1,2}))")
LETTERS = tuple("abcdefghij")  # MMLU's columns of one option each, of which a, b and c must have one
# What the model would be given beside text, and is not.
REFUSED = (
    *("tools", "functions", "tool_calls", "function_call", "documents"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
# Marks of what is learnt; of a whole row, those that can mean nothing else.
ROW_LEARNT = ("weight", "loss_weight", "loss_scale", "loss_mask", "sample_weight", "train")
LEARNT = (*ROW_LEARNT, "step_loss_mask", "training", "trainable", "learn", "loss")
NOT_LEARNT = ("mask", "masked", "ignore", "ignore_loss", "mask_history", "train_detail")
# A mark by another name is made up of words of learning and of what is learnt: ``compute_loss``, ``train_on_turn``, but
# not ``loss_type``, ``masked_text``, ``weight_loss`` or ``attention_mask``.
LEARNING = r"loss|weights|masks?|masked|(?:un)?learn(?:able|ed|t)?|train(?:able|ed|ing)?"
ABOUT_LEARNING = (
    r"be|compute|calculate|do|exclude|for|from|ignore|in|include|is|no|not|of|on|should|skip|to|use|with|"
    r"answer|assistant|completion|labels?|output|response|row|sample|steps?|target|tokens?|turns?"
)
LEARNING_MARK = re.compile(rf"(?=.*(?:{LEARNING}))(?:(?:{LEARNING}|{ABOUT_LEARNING})[ _-]?)+")
WEIGHT_MARK = re.compile(r"(?:answer|loss|output|response|row|sample|token|turn)s?[ _-]?weights?|loss[ _-]?scales")
# What columns that judge the answer say of one that is not to be learnt.
UNSAFE_ANSWER = {
    "is_safe": ("false", "0", "0.0", "no"),  # BeaverTails
    "response_harm_label": ("harmful",),  # WildGuardMix
    "response_label": ("unsafe", "harmful"),  # Aegis 2.0
}
BELONGING = {*SYSTEM, *HISTORY, *INPUTS, *OPTIONS, *REFUSED, *LEARNT, *ROW_LEARNT, *NOT_LEARNT, *UNSAFE_ANSWER}
QUESTIONS = ("goal", "forbidden_prompt", "prompt", "instruction", "question", "query", "request")
ATTACKS = ("adversarial", "vanilla")  # WildJailbreak's: a row has one of them, so that both are one column
# A prompt where there is no question; a text may be a chat as its template writes it.
WHOLES = ("text", *CHATS, "turns")
NOTHING = ("[]", "{}", "null")  # how tables write an empty list or object
YES_OR_NO = dict.fromkeys(("0", "0.0", "false", "no", "off"), False) | dict.fromkeys(
    ("1", "1.0", "true", "yes", "on"), True
)


class UnreadableRow(Exception):
    """A row cannot be read without losing a part of it; the text says why."""


def lowered(row: Mapping[Any, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """The row with its names in lower case, without empty values.

    without: lower-case names to leave out: they are read elsewhere. Raises UnreadableRow where two other names that
    belong to a row differ in case only and both have a value.
    """
    content: dict[str, Any] = {}
    for name, value in row.items():
        key = str(name).strip().lower()
        if key in without or is_empty(value):
            continue
        if key in content and key in BELONGING:
            raise UnreadableRow(f"its columns named {key} differ in case only")
        content[key] = value
    return content


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: None, NaN, white space, or an empty list or object."""
    return value is None or value != value or (isinstance(value, (str, list, dict)) and not strip(value))


def strip(value: Any) -> Any:
    """A string without surrounding white space; any other value as it is."""
    return value.strip() if isinstance(value, str) else value


def names_with(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of ``names`` under which a lowered row holds something; an empty list as JSON text is nothing."""
    return [name for name in names if name in row and strip(row[name]) not in NOTHING]


def column_names(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """The names of a file's columns, as its rows spell them: no row need have all."""
    return list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))


def check_column(column: str, names: Sequence[str], field: str) -> None:
    """Raises UserError, which lists the columns and names the nearest, where ``column`` is none of them."""
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.0)
        remedy = f"the nearest is {near[0]}" if near else "the rows have no columns"
        raise UserError(field, column, f"is not among the columns {', '.join(names)}", remedy)


def check_distinct(names: Sequence[str], candidates: Collection[str], field: str) -> None:
    """Raises UserError where two columns, of which the config names none, differ in case only. candidates: lower-case
    names that matter."""
    lower = [name.strip().lower() for name in names]
    for twice in (name for name in lower if lower.count(name) > 1 and name in candidates):
        _refuse_choice([name for name in names if name.strip().lower() == twice], field)


def check_question_columns(names: Sequence[str], field: str) -> None:
    """Raises UserError where several columns, of which the config names none, may hold the question."""
    questions = [name for name in names if name.strip().lower() in QUESTIONS]
    if len(questions) > 1:
        _refuse_choice(questions, field)


def check_prompt_columns(names: Sequence[str], field: str) -> None:
    """Raises UserError where several columns, of which the config names none, may hold the prompt."""
    lower = [name.strip().lower() for name in names]
    attack = next((name for name in ATTACKS if name in lower), None)
    questions = [name for name in names if name.strip().lower() in {*QUESTIONS, attack}]
    wholes = [name for name in names if name.strip().lower() in WHOLES]
    for choice in (questions, [] if questions or "behavior" in lower else wholes):
        if len(choice) > 1:
            _refuse_choice(choice, field)


def _refuse_choice(names: Sequence[str], field: str) -> NoReturn:
    problem, remedy = f"could be read from the columns {' or '.join(names)}", "name the column, or columns, to read"
    if field.endswith(".column") and any(name.strip().lower() == "goal" for name in names):
        remedy += f"; if they are attacks and their goals, set {field.removesuffix('column')}goal: goal"
    raise UserError(field, "auto", problem, remedy)


def check_row(row: Mapping[str, Any]) -> None:
    """Raises UnreadableRow where a lowered row holds what cannot be given to the model."""
    for name in names_with(row, REFUSED):
        raise UnreadableRow(f"it has {name}, which would not reach the model")


def full_question(question: str, row: Mapping[str, Any]) -> str:
    """The question, its inputs and the options to choose from, as one turn.

    row: lowered, without what is read elsewhere. Raises UnreadableRow.
    """
    inputs = [text_of(row[name], name) for name in INPUTS if name in row] or _first_instance(row)
    options = "\n".join(f"{letter}. {text}" for letter, text in _options(row).items())
    return "\n\n".join(part for part in (question.strip(), *inputs, options) if part)


def text_of(value: Any, name: str) -> str:
    """A text, or a list of texts with an empty line between them. Raises UnreadableRow."""
    if isinstance(value, dict) and isinstance(value.get(name), list):  # PubMedQA on the hub
        value = value[name]
    elif name == "context" and isinstance(value, dict) and isinstance(value.get("contexts"), list):
        value = value["contexts"]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UnreadableRow(f"its {name} is not text")
    return "\n\n".join(text.strip() for text in texts)


def _first_instance(row: Mapping[str, Any]) -> list[str]:
    """The input of self-instruct's first instance."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and isinstance(instances[0], dict) else {}
    return [] if is_empty(first.get("input")) else [text_of(first["input"], "input")]


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter → text of the options to choose from. Raises UnreadableRow where they are of no known shape."""
    names = _option_columns(row)
    if not names or names[0] not in OPTIONS:
        return _in_columns({_mark_of(name): row[name] for name in names})
    listed = [_listed_options(row[name], name) for name in names]
    if any(options != listed[0] for options in listed):
        raise UnreadableRow(f"its {' and '.join(OPTIONS)} differ")
    return listed[0]


def _option_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a lowered row that hold its options: lists of them, else one each."""
    if listed := names_with(row, OPTIONS):
        return listed
    single = [name for name in row if OPTION.fullmatch(name)]
    if len({_mark_of(name) for name in single}) > 1:
        return single
    return [letter for letter in LETTERS if letter in row] if _has_letters(row) else []


def _mark_of(name: str) -> str:
    """The letter or number of an option in its column's name."""
    match = OPTION.fullmatch(name)
    return (match[1] or match[2]) if match else name


def _has_letters(row: Mapping[str, Any]) -> bool:
    """Whether a lowered row has options in columns of their own: texts, and not numbers that are called a, b and c."""
    letters = [row[letter] for letter in LETTERS if letter in row]
    return all(letter in row for letter in LETTERS[:3]) and all(isinstance(text, str) for text in letters)


def with_all_options(rows: Sequence[dict[str, Any]], read: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a file, so that each question's options can be read by themselves. Columns called a and b alone might
    be anything; if other rows have a c, too, they are the options of a question with two.

    read: lower-case names that are read elsewhere.
    """
    apart = {*BELONGING, *read}
    if not any(_has_letters(lowered(row, without=apart)) for row in rows):
        return list(rows)
    return [_with_two_options(row, read) for row in rows]


def _with_two_options(row: dict[str, Any], read: Collection[str]) -> dict[str, Any]:
    letters = {key: text for key, text in lowered(row, without=(*BELONGING, *read)).items() if key in LETTERS}
    if any(str(name).strip().lower() in OPTIONS and not is_empty(value) for name, value in row.items()):
        return row
    if set(letters) != {"a", "b"} or not all(isinstance(text, str) for text in letters.values()):
        return row
    rest = {name: value for name, value in row.items() if str(name).strip().lower() not in letters}
    return {"options": {letter.upper(): text for letter, text in sorted(letters.items())}, **rest}


def _in_columns(columns: Mapping[str, Any]) -> dict[str, str]:
    """Options that have a column each, by the letter or number in its name: a letter stays an option's own where
    another option is empty. Raises UnreadableRow."""
    if not all(isinstance(text, str) for text in columns.values()):
        raise UnreadableRow("its options are not texts")
    numbers = {int(key): text for key, text in columns.items() if key.isdigit()}
    first = 0 if 0 in numbers else 1
    if numbers and len(numbers) < len(columns):
        raise UnreadableRow("its options have letters and numbers")
    if numbers and max(numbers) - first >= 26:
        raise UnreadableRow("it has more than 26 options")
    lettered = {chr(ord("a") + number - first): text for number, text in numbers.items()} or columns
    return {letter.upper(): text.strip() for letter, text in sorted(lettered.items())}


def _listed_options(value: Any, name: str) -> dict[str, str]:
    """A column of options: texts, or objects of key and value, or one object of letters, or of ``text`` and ``label``
    (ARC)."""
    if isinstance(value, str):
        value = _parsed(value, name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, texts = value.get("label"), value["text"]
        value = dict(zip(map(str, labels), texts, strict=False)) if isinstance(labels, list) else texts
    if isinstance(value, list) and all(isinstance(part, dict) and {"key", "value"} <= part.keys() for part in value):
        value = {str(part["key"]): part["value"] for part in value}
    if isinstance(value, dict):
        value = {letter: text for letter, text in value.items() if text is not None}  # tables give each row all keys
        if not all(isinstance(text, str) for text in value.values()):
            raise UnreadableRow(f"its {name} are not texts")
        return {str(letter): text.strip() for letter, text in value.items()}
    if not isinstance(value, list):
        raise UnreadableRow(f"its {name} are not a list of texts")
    return _lettered(value, name)


def _lettered(texts: Sequence[Any], name: str) -> dict[str, str]:
    if not all(isinstance(text, str) for text in texts) or len(texts) > 26:
        raise UnreadableRow(f"its {name} are not texts, or more than 26")
    return {chr(ord("A") + number): text.strip() for number, text in enumerate(texts)}


def _parsed(text: str, name: str) -> Any:
    """A list or object that a cell holds as JSON. Raises UnreadableRow."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableRow(f"its {name} cannot be read as JSON") from error


def system_text(row: Mapping[str, Any]) -> str | None:
    """The row's own system turn, or None. row: lowered. Raises UnreadableRow where it is not one text."""
    texts = {text_of(row[name], name) for name in SYSTEM if name in row}
    if len(texts) > 1:
        raise UnreadableRow("it has two system prompts")
    return next(iter(texts), None)


def history_value(row: Mapping[str, Any]) -> Any:
    """The earlier turns of a lowered row, of any shape; None if there are none. Raises UnreadableRow."""
    names = names_with(row, HISTORY)
    if len(names) > 1:
        raise UnreadableRow(f"it has {' and '.join(names)}")
    value = row[names[0]] if names else None
    return _parsed(value, names[0]) if isinstance(value, str) else value


def chat_value(value: Any, name: str) -> Any:
    """The turns in a column of chats, which tables hold as JSON text. Raises UnreadableRow."""
    return _parsed(value, name) if isinstance(value, str) else value


def only_turn(value: Any) -> Any:
    """The one text in a column of turns that are texts, as in SORRY-Bench, or a chat as it is; tables hold JSON text.

    Raises UnreadableRow for several texts: the later ones wait for answers to the earlier.
    """
    turns = chat_value(value, "turns")
    if not isinstance(turns, list) or any(isinstance(turn, dict) for turn in turns):
        return turns
    texts = [turn for turn in turns if not is_empty(turn)]
    if len(texts) > 1:
        raise UnreadableRow(f"it has {len(texts)} turns, and the later ones need answers to the earlier ones")
    return texts[0] if texts else ""


def yes_or_no(value: Any) -> bool | None:
    """What a value says, which tables hold as a text; None for any other value."""
    return YES_OR_NO.get(str(value).strip().lower())


def is_learnt(marks: Mapping[str, Any], names: Sequence[str]) -> bool | None:
    """Whether marks like ``weight: 0`` or ``train: false`` let a turn or row be learnt; None without a mark.

    marks: a lowered turn or row. Raises UnreadableRow for other weights, marks that disagree, and marks of another
    form or by another name.
    """
    values = {yes_or_no(marks[name]) for name in names if name in marks}
    if None in values or len(values) > 1:
        shown = ", ".join(f"{name} {marks[name]!r:.20}" for name in names if name in marks)
        raise UnreadableRow(f"it has {shown}; only 0 and 1 are read")
    for name in NOT_LEARNT:
        if yes_or_no(marks.get(name, False)) is not False:
            raise UnreadableRow(f"it has {name}, which is not read")
    for name, value in marks.items():
        if name in (*names, *NOT_LEARNT):
            continue
        if WEIGHT_MARK.fullmatch(name):
            is_mark = _is_other_weight(value)
        else:
            is_mark = LEARNING_MARK.fullmatch(name) is not None and _is_yes_or_no(value)
        if is_mark:
            raise UnreadableRow(f"it has {name}, which may say what is learnt and is not read")
    return values.pop() if values else None


def _is_yes_or_no(value: Any) -> bool:
    """Whether a value is yes or no, or one of them for each token or turn."""
    return all(yes_or_no(part) is not None for part in _listed(value))


def _is_other_weight(value: Any) -> bool:
    """Whether a value is a weight other than 1, or has one among those of its tokens or turns; text is not ("2 kg")."""
    for part in _listed(value):
        with suppress(TypeError, ValueError):
            if float(part) != 1:
                return True
    return False


def _listed(value: Any) -> list[Any]:
    """A list of the values of tokens or turns as it is, and one value alone as a list."""
    return value if isinstance(value, list) else [value]


def unsafe_answer(row: Mapping[str, Any]) -> str | None:
    """The column of a lowered row that says that its answer is unsafe, and how; None if none does."""
    labels = ((name, str(row[name]).strip().lower()) for name in UNSAFE_ANSWER if name in row)
    return next((f"{name} is {label}" for name, label in labels if label in UNSAFE_ANSWER[name]), None)


def columns_beside(
    rows: Sequence[Mapping[Any, Any]], read: Collection[str], also: Collection[str] = (), apart: Collection[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(columns that some question is read with, columns that no row is read from), as the rows spell them.

    All names are in lower case. read: columns of the question itself. also: columns that are read with it, whatever
    their names usually mean; apart: columns that are not.
    """
    used = {*also, *(name for row in rows for name in _beside(row, {*read, *apart}))}
    known = ({*read, *SYSTEM, *HISTORY, *INPUTS, *OPTIONS} - {*apart}) | used
    known |= {*LETTERS} if used & {*LETTERS} else set()  # one of them may be empty
    has_options = any(OPTION.fullmatch(name) for name in used)
    names = {str(name): str(name).strip().lower() for row in rows for name in row}
    unread = (name for name, key in names.items() if key not in known and not (has_options and OPTION.fullmatch(key)))
    return tuple(name for name, key in names.items() if key in used), tuple(unread)


def _beside(row: Mapping[Any, Any], without: Collection[str]) -> list[str]:
    """The columns, in lower case, that hold what belongs to the row's question. without: names that are left out."""
    try:
        other = lowered(row, without)
        instances = [] if any(name in other for name in INPUTS) or not _first_instance(other) else ["instances"]
    except UnreadableRow:
        return []
    inputs = [name for name in (*SYSTEM, *INPUTS) if name in other]
    return [*inputs, *instances, *names_with(other, HISTORY), *_option_columns(other)]
