"""Tuning rows → conversations → ids and labels, and their order in training (docs/method.md §3, docs/design.md §5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from esi_ds.config.tuning import benign_among
from esi_ds.core import noise
from esi_ds.core.loss import IGNORED
from esi_ds.data.chat import (
    TURN_MARK,
    TemplateCheck,
    TemplateRejection,
    break_up,
    broken_up_words,
    check_shown,
    encode_with_spans,
    render,
    specials_in,
)
from esi_ds.data.columns import (
    CHATS,
    ROW_LEARNT,
    UNSAFE_ANSWER,
    UnreadableRow,
    chat_value,
    check_distinct,
    check_question_columns,
    check_row,
    column_names,
    columns_beside,
    full_question,
    is_empty,
    is_learnt,
    lowered,
    text_of,
    unsafe_answer,
    with_all_options,
    yes_or_no,
)
from esi_ds.data.rows import Row
from esi_ds.data.thought_rows import ThoughtTemplate
from esi_ds.data.thoughts import MARKS, Marks
from esi_ds.data.turns import Turn, read_turns, with_context, with_system
from esi_ds.errors import UserError
from esi_ds.reading import is_text
from esi_ds.words import counted

KTO = ["prompt", "completion"]  # the columns of rows whose label says whether the answer is a good one
# Columns of a row that hold (question, further input, answer); tried in this order, ignoring case.
SHAPES: tuple[tuple[str, str | None, str], ...] = (
    ("prompt", None, "response"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", None, "answer"),
    ("goal", None, "target"),
    ("prompt", None, "completion"),
    ("question", None, "response"),
)


@dataclass(frozen=True)
class TokenSequence:
    """One row as the model reads it: token ids, and labels that are IGNORED at every token without a loss.

    num_context: earlier answers that would be learnt, but are context, because the template rewrites earlier turns.
    """

    row: int
    ids: list[int]
    labels: list[int]
    num_context: int = 0

    @property
    def num_learnt(self) -> int:
        """Labels with a loss; the first label never has one, as nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class TuningSet:
    """The encoded rows; the columns read; (row, reason) of every skipped row; number of rows cut at ``max_length``
    tokens.

    broken_up: of ``broken_up_words``, in the encoded rows. last_only: of how many of these only the last answer is
    learnt, of several; "" if of none.
    """

    sequences: tuple[TokenSequence, ...]
    columns: str
    skipped: tuple[tuple[int, str], ...]
    num_cut: int
    max_length: int
    sha256: str
    unread: tuple[str, ...] = ()
    thoughts: str = ""
    broken_up: str = ""
    last_only: str = ""

    @property
    def counts(self) -> str:
        """What became of the rows, for the end of a line of the log."""
        return f"{len(self.skipped)} skipped, {self.num_cut} cut at {self.max_length} tokens{self.note}"

    @property
    def note(self) -> str:
        """Columns that no row is read from, special tokens that are broken up, earlier answers that are not learnt, and
        what became of thoughts, for the end of a line of the log; "" if there is nothing to say."""
        unread = f"; columns not read: {', '.join(self.unread)}" if self.unread else ""
        broken_up = f"; special tokens broken up: {self.broken_up}" if self.broken_up else ""
        last_only = f"; only the last answer is learnt in {self.last_only}" if self.last_only else ""
        return unread + broken_up + last_only + self.thoughts

    def facts(self, name: str) -> dict[str, object]:
        """Rows of a table about the rows called ``name``: what is not learnt as it stands in them."""
        lines = {"special tokens broken up": self.broken_up, "only the last answer learnt": self.last_only}
        return {f"{what} in {name}": line for what, line in lines.items() if line}


def find_columns(rows: Sequence[Row], columns: str, field: str) -> tuple[str, ...]:
    """("messages",) or (question, answer) or (question, input, answer), as the rows spell them.

    columns: ``auto``, or the names separated by commas. Raises UserError listing the columns.
    """
    names = column_names(rows)
    if columns != "auto":
        chosen = tuple(part.strip() for part in columns.split(","))
        unknown = [name for name in chosen if name not in names]
        if unknown or len(chosen) > 3:
            raise UserError(
                field, columns, f"is not among the columns {', '.join(names)}", "name those of question and answer"
            )
        return chosen
    check_distinct(names, {*CHATS, *(name for shape in SHAPES for name in shape if name)}, field)
    lower = {name.strip().lower(): name for name in names}
    chats = [lower[chat] for chat in CHATS if chat in lower]
    if len(chats) == 1:
        return (chats[0],)
    if chats:
        raise UserError(field, "auto", f"could be read from {' or '.join(chats)}", "name the column to read")
    check_question_columns(names, field)
    for question, extra, answer in SHAPES:
        if question in lower and answer in lower:
            middle = (lower[extra],) if extra in lower else ()
            return (lower[question], *middle, lower[answer])
    raise UserError(
        field,
        "auto",
        f"has none of the usual columns, only {', '.join(names)}",
        f"name the columns, for instance {field}=question,answer",
    )


def conversation(row: Row, columns: Sequence[str], template: ThoughtTemplate | None = None) -> list[Turn] | str:
    """The turns of one row, or why it has none.

    A system prompt, earlier turns, inputs and options in other columns belong to it; the last turn is one that is
    learnt. template: of a model that thinks, where a turn's thought is told from its answer.
    """
    try:
        turns = _turns(row, columns, traces=template is not None)
        if template is not None:
            turns = template.separated(turns)
    except UnreadableRow as error:
        return str(error)
    while turns and not is_spoken(turns[-1]):
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        return "no assistant turn with text is learnt"
    return turns if len(turns) > 1 else "its only answer has no question"


def is_spoken(turn: Turn) -> bool:
    """Whether this is a turn of the assistant that is learnt: not one without a text, which would teach to say
    nothing."""
    has_text = bool(turn["content"].strip() or turn.get("trace"))
    return turn["role"] == "assistant" and has_text and turn.get("learnt", True)


def _turns(row: Row, columns: Sequence[str], traces: bool) -> list[Turn]:
    """All turns of one row. traces: as of ``read_turns``. Raises UnreadableRow."""
    used = [column.strip().lower() for column in columns]
    other = lowered(row, without=used)
    check_row(other)
    if is_learnt(other, ROW_LEARNT) is False:
        raise UnreadableRow("its weight is 0")
    if _is_rejected(other.get("label"), used):
        raise UnreadableRow("its label is false: the answer is not to be learnt")
    if verdict := unsafe_answer(other):
        raise UnreadableRow(f"its {verdict}: the answer is not to be learnt")
    if len(columns) == 1:
        turns = _with_inputs(read_turns(chat_value(row.get(columns[0]), used[0]), traces), other)
        _check_answered(turns, other)
    else:
        turns = _asked_and_answered(row, columns, other, used)
    return with_context(turns, other)


def _is_rejected(label: Any, used: Sequence[str]) -> bool:
    """Whether a label marks an answer that KTO unlearns. Tables hold it as a text; a number is a class, but in KTO's
    columns."""
    return yes_or_no(label) is False and (used == KTO or str(label).strip().lower() == "false")


def _with_inputs(turns: list[Turn], other: Mapping[str, Any]) -> list[Turn]:
    """The chat with the inputs and options of other columns behind its question. Raises UnreadableRow where it has
    several, of which these could belong to any."""
    questions = [turn for turn in turns if turn["role"] == "user"]
    beside = full_question("", other)
    if not questions or any(beside in turn["content"] for turn in questions):
        return turns
    if len(questions) > 1:
        raise UnreadableRow("it has inputs or options beside a chat of several questions")
    questions[0]["content"] = f"{questions[0]['content'].strip()}\n\n{beside}"
    return turns


def _check_answered(turns: Sequence[Turn], other: Mapping[str, Any]) -> None:
    """Raises UnreadableRow where a chat ends with a question whose answer may be in another column: an earlier answer
    would be learnt in its place."""
    if turns and turns[-1]["role"] == "user":
        answers = dict.fromkeys(answer for _, _, answer in SHAPES)
        beside = [name for name in answers if not is_empty(other.get(name))]
        if beside:
            raise UnreadableRow(f"its last turn is the user's, and {' or '.join(beside)} may be the answer to it")


def _asked_and_answered(row: Row, columns: Sequence[str], other: Mapping[str, Any], used: Sequence[str]) -> list[Turn]:
    """The turns of a question and its answer. other: the row without them, lowered."""
    question, answer = _text_in(row, columns[0], "question"), _text_in(row, columns[-1], "answer")
    further = row.get(columns[1]) if len(columns) == 3 else None
    if not is_empty(further):
        question = f"{question}\n\n{text_of(further, used[1])}"
    asked = full_question(question, other)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _text_in(row: Row, column: str, part: str) -> str:
    """The text of a column, stripped. part: what it is. Raises UnreadableRow."""
    text = row.get(column)
    if is_empty(text):
        raise UnreadableRow(f"the {part} is empty")
    if not isinstance(text, str):
        raise UnreadableRow(f"the {part} is not a text")
    return text.strip()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    end_ids: Iterable[int],
    row: int,
    template: ThoughtTemplate | None = None,
    *,
    learn: Literal["answers", "all"] = "answers",
    end_token: bool = True,
) -> TokenSequence:
    """Ids and labels of a conversation in the tokenizer's chat template.

    Learnt: every turn of the assistant that is not marked ``learnt: False``, up to the first end token behind its text,
    tokenized as what follows its prompt. One that begins the conversation has no prompt, and is context. Only the last
    turn is learnt if the template rewrites earlier turns, or a turn does not continue the text of its prompt. If the
    template ends the last turn without an end token, the tokenizer's is added, unless ``end_token`` is False. learn:
    ``all`` gives every token a loss, also those of prompts and of turns not learnt. template: of a model that thinks.
    """
    ends = frozenset(end_ids)
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index > 0]
    pieces = _pieces(tokenizer, turns, spoken, ends) if template is None or len(spoken) > 1 else None
    if template is not None and not _shows_traces(turns, spoken, pieces):
        pieces = [_piece(tokenizer, turns, *template.last_piece(turns), ends)]
    elif pieces is None:
        pieces = [replace(_piece(tokenizer, turns, *_last_piece(tokenizer, turns), ends), trailing="")]
    earlier, spoken = spoken[: -len(pieces)], spoken[-len(pieces) :]
    texts = [text for piece in pieces for text in piece.texts]
    check_shown(turns, "".join(texts))
    segments = iter(_segment_ids(tokenizer, texts))
    ids: list[int] = []
    labels: list[int] = []
    for index, piece in zip(spoken, pieces, strict=True):
        context_ids, answer_ids, trailing_ids = (next(segments) for _ in piece.texts)
        if not piece.ends and end_token and index == spoken[-1]:
            answer_ids = [*answer_ids, tokenizer.eos_token_id]
        learnt = answer_ids if is_spoken(turns[index]) else [IGNORED] * len(answer_ids)
        if template is not None and is_spoken(turns[index]):
            template.count(turns[index], piece.context, piece.answer)
        ids += context_ids + answer_ids + trailing_ids
        labels += [IGNORED] * len(context_ids) + learnt + [IGNORED] * len(trailing_ids)
    if learn == "all":
        return TokenSequence(row, ids, list(ids))
    last = max((index for index, label in enumerate(labels) if label != IGNORED), default=-1)
    num_context = sum(is_spoken(turns[index]) for index in earlier)
    return TokenSequence(row, ids[: last + 1], labels[: last + 1], num_context)


@dataclass(frozen=True)
class _Piece:
    """A turn of the assistant in the text of its conversation. context: what stands before it, behind the piece before;
    answer: the turn, with its end token if it ``ends``; trailing: read, not learnt, such as a newline behind it."""

    context: str
    answer: str
    trailing: str
    ends: bool

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.context, self.answer, self.trailing


def _pieces(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], spoken: Sequence[int], ends: Collection[int]
) -> list[_Piece] | None:
    """The pieces that make up the conversation, or None if the template rewrites earlier text.

    Phi-3's template writes an end-of-text token behind every text that does not ask for an answer: what is behind the
    end of a turn need not be there in the next prompt.
    """
    pieces: list[_Piece] = []
    before = ""
    prompts = [render(tokenizer, turns[:index], add_generation_prompt=True) for index in spoken]
    for index, prompt, later in zip(spoken, prompts, [*prompts[1:], None], strict=True):
        through = render(tokenizer, turns[: index + 1], add_generation_prompt=False)
        if not prompt.startswith(before) or not through.startswith(prompt):
            return None
        piece = _piece(tokenizer, turns[: index + 1], prompt[len(before) :], through[len(prompt) :], ends)
        if later is not None and not later.startswith(through):
            piece = replace(piece, trailing="")
        pieces.append(piece)
        before = prompt + piece.answer + piece.trailing
    return _ended_by_next_turn(tokenizer, pieces, ends)


def _ended_by_next_turn(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[_Piece], ends: Collection[int]
) -> list[_Piece]:
    """The pieces, where an end token that begins the next turn ends the answer before it.

    GLM's template ends no answer: the model stops at the ``<|user|>`` with which the next turn begins.
    """
    ended = list(pieces)
    for number, (piece, later) in enumerate(pairwise(pieces)):
        end_span = None if piece.ends else _first_end(tokenizer, later.context, ends)
        if end_span is not None and not later.context[: end_span[0]].strip():
            ended[number] = replace(ended[number], answer=piece.answer + later.context[: end_span[1]], ends=True)
            ended[number + 1] = replace(later, context=later.context[end_span[1] :])
    return ended


def _piece(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], context: str, shown: str, ends: Collection[int]
) -> _Piece:
    """The piece of the last turn. shown: what stands behind its prompt; a thought in it may have an end of its own."""
    trace, content = turns[-1].get("trace", ""), turns[-1]["content"].strip()
    behind_trace = max(shown.find(trace), 0) + len(trace)
    start = shown.find(content, behind_trace)
    content_end = start + len(content) if start >= 0 else 0
    end_span = _first_end(tokenizer, shown, ends, content_end)
    if end_span is None:
        return _Piece(context, shown, "", ends=False)
    return _Piece(context, shown[: end_span[1]], shown[end_span[1] :], ends=True)


def _first_end(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: Collection[int], start: int = 0
) -> tuple[int, int] | None:
    """The characters of the first end token in a text, at or behind ``start``."""
    encoded = encode_with_spans(tokenizer, text)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return next((span for token, span in tokens if token in ends and span[0] >= start), None)


def _last_piece(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> tuple[str, str]:
    """(prompt, what the template writes of the last turn behind it); where neither the text nor what stands behind the
    turn before continues the prompt, the turn's own text and what the template writes behind that."""
    prompt = render(tokenizer, turns[:-1], add_generation_prompt=True)
    through = render(tokenizer, turns, add_generation_prompt=False)
    if through.startswith(prompt):
        return prompt, through[len(prompt) :]
    # Mistral's templates write the system prompt into the last turn of the user, and only where no answer follows it:
    # what stands behind that turn is alike.
    question: Turn = {"role": turns[-2]["role"], "content": TURN_MARK}
    asked = _behind_mark(tokenizer, [*turns[:-2], question], add_generation_prompt=True)
    answered = _behind_mark(tokenizer, [*turns[:-2], question, turns[-1]])
    if answered.startswith(asked):
        return prompt, answered[len(asked) :]
    answer: Turn = {"role": "assistant", "content": TURN_MARK}
    return prompt, turns[-1]["content"] + _behind_mark(tokenizer, [*turns[:-1], answer])


def _behind_mark(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, add_generation_prompt: bool = False
) -> str:
    """What the template writes behind the last ``TURN_MARK`` of the turns."""
    return render(tokenizer, turns, add_generation_prompt=add_generation_prompt).rpartition(TURN_MARK)[2]


def _segment_ids(tokenizer: PreTrainedTokenizerBase, segments: Sequence[str]) -> list[list[int]]:
    """Ids of each segment of a text, tokenized as a whole: SentencePiece marks the beginning of a text.

    Where a token of the whole crosses from one segment into the next, see ``_behind_each_other``.
    """
    encoded = encode_with_spans(tokenizer, "".join(segments))
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    borders = list(accumulate(map(len, segments)))
    position, ends = 0, list[int]()
    for border in borders:
        while position < len(ids) and spans[position][0] < border:
            position += 1
        ends.append(position)
        # A space that no token spans belongs to the next one (tokenizers that split texts at spaces drop it).
        if (position and spans[position - 1][1] != border) or (position < len(ids) and spans[position][0] != border):
            return list(_behind_each_other(tokenizer, segments))
    return [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _behind_each_other(tokenizer: PreTrainedTokenizerBase, segments: Iterable[str]) -> Iterator[list[int]]:
    """Ids of each segment of a text, tokenized behind those before it.

    A segment that would change the tokens before it is tokenized by itself, for these are what the model is given.
    """
    text, ids = "", list[int]()
    for segment in segments:
        if not segment:
            yield []
            continue
        whole = tokenizer(text + segment, add_special_tokens=False)["input_ids"]
        if whole[: len(ids)] != ids:
            text, ids, whole = "", [], tokenizer(segment, add_special_tokens=False)["input_ids"]
        yield whole[len(ids) :]
        text, ids = text + segment, whole


def _shows_traces(turns: Sequence[Turn], spoken: Sequence[int], pieces: Sequence[_Piece] | None) -> bool:
    """Whether every answer of the pieces stands behind its thought."""
    if pieces is None:
        return False
    return all(turns[index].get("trace", "") in piece.answer for index, piece in zip(spoken, pieces, strict=True))


def _conversations(
    rows: Sequence[Row],
    columns: Sequence[str],
    template: ThoughtTemplate | None,
    specials: Sequence[str],
    skipped: list[tuple[int, str]],
) -> Iterator[tuple[int, list[Turn], set[str]]]:
    """(number, turns, special-token strings that are broken up in them) of each row that has turns; the others go to
    ``skipped``."""
    for number, row in enumerate(with_all_options(rows, {name.strip().lower() for name in columns})):
        turns = conversation(row, columns, template)
        if not isinstance(turns, str) and not all(is_text(turn["content"] + turn.get("trace", "")) for turn in turns):
            turns = "it holds half of a surrogate pair"
        if isinstance(turns, str):
            skipped.append((number, turns))
            continue
        broken_turns = [_broken_up(turn, specials) for turn in turns]
        yield number, broken_turns, specials_in(turns, specials) if broken_turns != turns else set()


def encode_rows(
    rows: Sequence[Row],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None,
    specials: Sequence[str],
    end_ids: Iterable[int],
    max_length: int,
    marks: Marks = MARKS,
    learn: Literal["answers", "all"] = "answers",
    end_token: bool = True,
) -> TuningSet:
    """Every usable row, in order. Special-token strings inside the rows are broken up, and counted: they are data.

    marks: of thoughts, which are told from the answers where the chat template knows of thoughts. learn, end_token: as
    ``encode`` has them.

    A row that the chat template rejects, or a turn of which it leaves out, is skipped.
    """
    sequences: list[TokenSequence] = []
    skipped: list[tuple[int, str]] = []
    num_cut = 0
    held: list[set[str]] = []  # special-token strings of each encoded row
    check = TemplateCheck(tokenizer)
    digest = hashlib.sha256()
    thoughts = ThoughtTemplate(tokenizer, marks)
    template = thoughts if thoughts.thinks else None
    for number, broken_turns, specials_of_row in _conversations(rows, columns, template, specials, skipped):
        turns = with_system(broken_turns, system_prompt)
        digest.update(json.dumps(turns).encode())
        try:
            check.check_answered([turn["role"] for turn in turns])
            sequence = encode(tokenizer, turns, end_ids, number, template, learn=learn, end_token=end_token)
        except TemplateRejection as error:
            skipped.append((number, str(error)))
            continue
        if len(sequence.ids) > max_length:
            num_cut += 1
            sequence = replace(sequence, ids=sequence.ids[:max_length], labels=sequence.labels[:max_length])
        if sequence.num_learnt == 0:
            skipped.append((number, f"nothing of the answer is left within {max_length} tokens"))
            continue
        sequences.append(sequence)
        held.append(specials_of_row)
    used = {column.strip().lower() for column in columns}
    also_read, unread = columns_beside(rows, {*ROW_LEARNT, *UNSAFE_ANSWER, *used})
    return TuningSet(
        tuple(sequences),
        ",".join((*columns, *also_read)),
        tuple(skipped),
        num_cut,
        max_length,
        digest.hexdigest(),
        unread,
        thoughts.counts.note,
        broken_up_words(held, "row"),
        _last_only_words(sequences),
    )


def _last_only_words(sequences: Iterable[TokenSequence]) -> str:
    """How many rows have earlier answers that are context because of the template, and how many these are; "" if none
    has."""
    numbers = [sequence.num_context for sequence in sequences if sequence.num_context]
    answers = f"{counted(sum(numbers), 'earlier answer')} as context; the chat template rewrites earlier turns"
    return f"{counted(len(numbers), 'row')} ({answers})" if numbers else ""


def _broken_up(turn: Turn, specials: Sequence[str]) -> Turn:
    """The turn with special-token strings in its text broken up."""
    broken = turn.copy()
    broken["content"] = break_up(turn["content"], specials)[0]
    if "trace" in turn:
        broken["trace"] = break_up(turn["trace"], specials)[0]
    return broken


def _order_seed(seed: int, epoch: int, number: int) -> int:
    """The seed of one epoch's order. torch's generator on CPUs reads 32 bits of it, which hold seeds below 4,096 beside
    the rest."""
    plain = (seed << 20) + (epoch << 1) + number
    return plain if plain < 1 << 32 else noise.stream(seed, epoch, number) & 0xFFFFFFFF


class DataOrder:
    """Which sequence is at which position of the endless stream that training reads.

    Every epoch is a new permutation, keyed by (seed, epoch). Benign rows, ``fraction`` of all, are spread evenly. The
    stream does not depend on the world size, so a resumed run continues with the next row.
    """

    def __init__(self, num_rows: int, num_benign: int, fraction: float, seed: int):
        self.num_rows, self.num_benign, self.fraction, self.seed = num_rows, num_benign, fraction, seed
        self._epochs: dict[tuple[int, int], list[int]] = {}

    def __getitem__(self, position: int) -> tuple[bool, int]:
        """(whether the sequence is benign, its index among the benign or the other sequences)."""
        before = self.num_benign_before(position)
        if self.num_benign_before(position + 1) > before:
            return True, self._row(1, before, self.num_benign)
        return False, self._row(0, position - before, self.num_rows)

    def num_benign_before(self, position: int) -> int:
        """How many of the first ``position`` sequences are benign."""
        return benign_among(position, self.fraction)

    def _row(self, stream: int, count: int, size: int) -> int:
        epoch, index = divmod(count, size)
        if (stream, epoch) not in self._epochs:
            self._epochs = {key: order for key, order in self._epochs.items() if key[0] != stream}
            generator = torch.Generator().manual_seed(_order_seed(self.seed, epoch, stream))
            self._epochs[stream, epoch] = torch.randperm(size, generator=generator).tolist()
        return self._epochs[stream, epoch][index]
