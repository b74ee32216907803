"""Tuning rows → conversations → ids and labels, and their order in training (docs/method.md §3, docs/design.md §5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from esi_ds.core.loss import IGNORED
from esi_ds.data.chat import break_up
from esi_ds.data.rows import Row, is_text, with_input
from esi_ds.errors import UserError

Turn = dict[str, str]
# Columns of a row that hold (question, further input, answer); tried in this order, ignoring case.
SHAPES: tuple[tuple[str, str | None, str], ...] = (
    ("prompt", None, "response"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", None, "answer"),
    ("goal", None, "target"),
    ("prompt", None, "completion"),
)
CHATS = ("messages", "conversations")
ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's


@dataclass(frozen=True)
class TokenSequence:
    """One row as the model reads it: token ids, and labels that are IGNORED at every token without a loss."""

    row: int
    ids: list[int]
    labels: list[int]

    @property
    def num_learnt(self) -> int:
        """Labels with a loss; the first label never has one, as nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class TuningSet:
    """The encoded rows; the columns read; (row, reason) of every skipped row; number of rows cut at ``max_length``."""

    sequences: tuple[TokenSequence, ...]
    columns: str
    skipped: tuple[tuple[int, str], ...]
    num_cut: int
    sha256: str


def find_columns(rows: Sequence[Row], columns: str, field: str) -> tuple[str, ...]:
    """("messages",) or (question, answer) or (question, input, answer), as the rows spell them.

    columns: ``auto``, or the names separated by commas. Raises UserError listing the columns.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if columns != "auto":
        chosen = tuple(part.strip() for part in columns.split(","))
        unknown = [name for name in chosen if name not in names]
        if unknown or len(chosen) > 3:
            raise UserError(field, columns, f"is not among the columns {', '.join(names)}", "give question,answer")
        return chosen
    lower = {name.lower(): name for name in reversed(names)}
    for chat in CHATS:
        if chat in lower:
            return (lower[chat],)
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


def conversation(row: Row, columns: Sequence[str]) -> list[Turn] | str:
    """The turns of one row, or why it has none."""
    if len(columns) == 1:
        return _chat(row.get(columns[0]))
    texts = [row.get(column) for column in columns]
    question, answer = texts[0], texts[-1]
    if not isinstance(question, str) or not question.strip():
        return "the question is empty"
    if not isinstance(answer, str) or not answer.strip():
        return "the answer is empty"
    request = with_input(question, texts[1] if len(texts) == 3 else None)
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer.strip()}]


def _chat(turns: Any) -> list[Turn] | str:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "it is not a list of turns"
    chat = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return "a turn has no text or no role"
        role = OTHER_NAMES.get(role, role)
        if role not in ROLES:  # templates write a role as it is: one with an end of turn inside would forge turns
            return f"a turn's role is not one of {', '.join(ROLES)}"
        chat.append({"role": role, "content": content})
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    if not chat or not chat[-1]["content"].strip():
        return "no turn of the assistant has text"
    return chat


def encode(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], end_ids: Iterable[int], row: int
) -> TokenSequence:
    """Ids and labels of a conversation in the model's chat template.

    Learnt: every turn of the assistant up to its end token, tokenized after its prompt as in generation. Only the last
    turn is learnt if the template rewrites earlier turns, or a turn does not continue the text of its prompt. If the
    template ends a turn without an end token, the tokenizer's is added.
    """
    ends = frozenset(end_ids)
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    pieces = _pieces(tokenizer, turns, spoken)
    if pieces is None:
        prompt = _render(tokenizer, turns[: spoken[-1]], True)
        pieces = [(prompt, turns[spoken[-1]]["content"])]
    ids: list[int] = []
    labels: list[int] = []
    for context, answer in pieces:
        context_ids = tokenizer(context, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        last_end = max((index for index, token in enumerate(answer_ids) if token in ends), default=None)
        if last_end is None:
            answer_ids = [*answer_ids, tokenizer.eos_token_id]
            last_end = len(answer_ids) - 1
        learnt = answer_ids[: last_end + 1]
        trailing = answer_ids[last_end + 1 :]  # a newline after the turn: read, not learnt
        ids += context_ids + answer_ids
        labels += [IGNORED] * len(context_ids) + learnt + [IGNORED] * len(trailing)
    last = max(index for index, label in enumerate(labels) if label != IGNORED)
    return TokenSequence(row, ids[: last + 1], labels[: last + 1])


def _pieces(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], spoken: Sequence[int]
) -> list[tuple[str, str]] | None:
    """(context, answer) texts that make up the conversation, or None if the template rewrites earlier text."""
    pieces: list[tuple[str, str]] = []
    before = ""
    for index in spoken:
        prompt = _render(tokenizer, turns[:index], True)
        through = _render(tokenizer, turns[: index + 1], False)
        if not prompt.startswith(before) or not through.startswith(prompt):
            return None
        pieces.append((prompt[len(before) :], through[len(prompt) :]))
        before = through
    return pieces


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)  # a list only for a batch of conversations
    return text


def encode_rows(
    rows: Sequence[Row],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None,
    specials: Sequence[str],
    end_ids: Iterable[int],
    max_length: int,
) -> TuningSet:
    """Every usable row, in order. Special-token strings inside the rows are broken up: they are data."""
    sequences: list[TokenSequence] = []
    skipped: list[tuple[int, str]] = []
    num_cut = 0
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        turns = conversation(row, columns)
        if not isinstance(turns, str) and not all(is_text(turn["content"]) for turn in turns):
            turns = "it holds half of a surrogate pair"
        if isinstance(turns, str):
            skipped.append((number, turns))
            continue
        turns = [{**turn, "content": break_up(turn["content"], specials)[0]} for turn in turns]
        if system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system_prompt})
        digest.update(json.dumps(turns).encode())
        sequence = encode(tokenizer, turns, end_ids, number)
        if len(sequence.ids) > max_length:
            num_cut += 1
            sequence = TokenSequence(number, sequence.ids[:max_length], sequence.labels[:max_length])
        if sequence.num_learnt == 0:
            skipped.append((number, f"nothing of the answer is left within {max_length} tokens"))
            continue
        sequences.append(sequence)
    return TuningSet(tuple(sequences), ",".join(columns), tuple(skipped), num_cut, digest.hexdigest())


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
        before = int(position * self.fraction)
        if int((position + 1) * self.fraction) > before:
            return True, self._row(1, before, self.num_benign)
        return False, self._row(0, position - before, self.num_rows)

    def _row(self, stream: int, count: int, size: int) -> int:
        epoch, index = divmod(count, size)
        if (stream, epoch) not in self._epochs:
            self._epochs = {key: order for key, order in self._epochs.items() if key[0] != stream}
            generator = torch.Generator().manual_seed((self.seed << 20) + (epoch << 1) + stream)
            self._epochs[stream, epoch] = torch.randperm(size, generator=generator).tolist()
        return self._epochs[stream, epoch][index]
