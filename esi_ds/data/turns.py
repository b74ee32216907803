"""Turns of a conversation from a user's row: role, text, and whether a turn of the assistant is learnt.

A prompt is a text, the user's only turn, or a chat of several turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from typing_extensions import NotRequired, TypedDict

from esi_ds.data.columns import (
    LEARNT,
    REFUSED,
    UnreadableRow,
    history_value,
    is_learnt,
    lowered,
    names_with,
    system_text,
)

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
# What a turn says beside its text; templates may show it, and it would be dropped.
BESIDE_TEXT = (*REFUSED, "thinking", "thought", "thoughts", "reasoning", "reasoning_content", "refusal", "attachments")


TRACE_KEYS = ("reasoning_content", "thinking", "reasoning")  # of BESIDE_TEXT, those that chat templates read


class Turn(TypedDict):
    """One turn. role: of ROLES. learnt: False for a turn of the assistant that is context only. trace: the thought
    before an answer of the assistant."""

    role: str
    content: str
    learnt: NotRequired[bool]
    trace: NotRequired[str]


# What a model is asked: one turn of the user, or a chat of several turns that ends with one.
Prompt: TypeAlias = str | list[Turn]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for people and for judges that do not read turns; a chat has each turn after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def asked(turns: Sequence[Turn]) -> Prompt:
    """The prompt that a chat is: its text without surrounding white space, if the user's turn is all there is; "" if
    the last turn has no text. Raises UnreadableRow where the last turn is not the user's.
    """
    prompt: list[Turn] = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if not prompt:
        return ""
    if prompt[-1]["role"] != "user":
        raise UnreadableRow(f"its last turn is not the user's, but the {prompt[-1]['role']}'s")
    text = prompt[-1]["content"].strip()
    return prompt if text and len(prompt) > 1 else text


def with_system(prompt: Prompt, system_prompt: str | None) -> list[Turn]:
    """The turns of a prompt behind a system turn with this text, which may be empty.

    None adds no turn, nor does any text to a chat that begins with a system turn of its own.
    """
    turns: list[Turn] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system_prompt}, *turns]


def with_context(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """The turns after the earlier turns and the system prompt that other columns of a lowered row hold.

    Raises UnreadableRow where there are two system prompts.
    """
    whole = [*read_history(history_value(row)), *turns]
    system = system_text(row)
    if system is not None and whole[:1] != [{"role": "system", "content": system}]:
        if any(turn["role"] == "system" for turn in whole):
            raise UnreadableRow("it has two system prompts")
        whole.insert(0, {"role": "system", "content": system})
    return whole


def read_turns(value: Any, traces: bool = False) -> list[Turn]:
    """The turns of a chat: {"role", "content"} or {"from", "value"}. Raises UnreadableRow.

    A system turn without text is none: it would take the place of ``model.system_prompt`` and of a template's default.
    traces: whether a turn of the assistant may hold its thought beside its text (``TRACE_KEYS``).
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UnreadableRow("it is not a list of turns")
    turns = [_read_turn(turn, traces) for turn in value]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _read_turn(turn: dict[str, Any], traces: bool) -> Turn:
    texts = {str(name).lower(): value for name, value in turn.items() if value is not None}
    role, parts = _one_of(texts, "role", "from"), _one_of(texts, "content", "value")
    content = _text(parts)
    if not isinstance(role, str) or content is None:
        raise UnreadableRow("a turn has no text or no role")
    role = OTHER_NAMES.get(role, role)
    if role not in ROLES:  # templates write a role as it is: one with an end of turn inside would forge turns
        raise UnreadableRow(f"a turn's role is not one of {', '.join(ROLES)}")
    marks = lowered(turn)
    trace = _trace(marks) if traces and role == "assistant" else ""
    part_marks = [lowered(part) for part in parts] if isinstance(parts, list) else []
    beside = [name for name in BESIDE_TEXT if not (trace and name in TRACE_KEYS)]
    for name in [*names_with(marks, beside), *(name for part in part_marks for name in names_with(part, BESIDE_TEXT))]:
        raise UnreadableRow(f"a turn has {name}, which would not reach the model")
    try:
        learnt, *learnt_parts = (is_learnt(each, LEARNT) for each in (marks, *part_marks))
    except UnreadableRow as error:
        raise UnreadableRow(f"in a turn, {error}") from error
    if learnt is None and {*learnt_parts} == {False}:
        learnt = False
    if learnt and role != "assistant":
        raise UnreadableRow(f"a turn of the {role} is marked to be learnt")
    if {*learnt_parts} - {None, role == "assistant" and learnt is not False}:
        raise UnreadableRow("a part of a turn is marked otherwise than the turn, and only whole turns are learnt")
    chat_turn: Turn = {"role": role, "content": content}
    if role == "assistant" and learnt is False:
        chat_turn["learnt"] = False
    if trace:
        chat_turn["trace"] = trace
    return chat_turn


def _trace(marks: Mapping[str, Any]) -> str:
    """The thought that a turn holds beside its text, "" if none. Raises UnreadableRow where it has two."""
    texts = {marks[name] for name in TRACE_KEYS if isinstance(marks.get(name), str) and marks[name].strip()}
    if len(texts) > 1:
        raise UnreadableRow("a turn has two thoughts")
    return texts.pop().strip() if texts else ""


def _one_of(turn: dict[str, Any], name: str, other: str) -> Any:
    """The value of either key. Raises UnreadableRow where they differ."""
    if name in turn and other in turn and turn[name] != turn[other]:
        raise UnreadableRow(f"a turn's {name} and {other} differ")
    return turn.get(name, turn.get(other))


def _text(content: Any) -> str | None:
    """The text of a turn; a list of parts gives their texts, one after another. None where it has none; raises
    UnreadableRow."""
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise UnreadableRow("a turn has parts that are not text")
        return "".join(map(str, texts))
    return content if isinstance(content, str) else None


def read_history(value: Any) -> list[Turn]:
    """Earlier turns: a list of turns, or of (question, answer) pairs. Raises UnreadableRow."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        texts = [text for pair in value for text in pair]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UnreadableRow("its history is not text")
        return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]
    return read_turns(value)
