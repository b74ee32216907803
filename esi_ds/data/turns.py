"""Turns of a conversation from a user's row: role, text, and whether a turn of the assistant is learnt."""

from __future__ import annotations

from typing import Any

from typing_extensions import NotRequired, TypedDict

from esi_ds.data.columns import LEARNT, REFUSED, UnreadableRow, is_learnt, lowered, names_with

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
# What a turn says beside its text; templates may show it, and it would be dropped.
BESIDE_TEXT = (*REFUSED, "thinking", "thought", "thoughts", "reasoning", "reasoning_content", "refusal", "attachments")


class Turn(TypedDict):
    """One turn. role: of ROLES. learnt: False for a turn of the assistant that is context only."""

    role: str
    content: str
    learnt: NotRequired[bool]


def read_turns(value: Any) -> list[Turn]:
    """The turns of a chat: {"role", "content"} or {"from", "value"}. Raises UnreadableRow."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UnreadableRow("it is not a list of turns")
    return [_read_turn(turn) for turn in value]


def _read_turn(turn: dict[str, Any]) -> Turn:
    texts = {str(name).lower(): value for name, value in turn.items() if value is not None}
    role, content = _one_of(texts, "role", "from"), _text(_one_of(texts, "content", "value"))
    if not isinstance(role, str) or content is None:
        raise UnreadableRow("a turn has no text or no role")
    role = OTHER_NAMES.get(role, role)
    if role not in ROLES:  # templates write a role as it is: one with an end of turn inside would forge turns
        raise UnreadableRow(f"a turn's role is not one of {', '.join(ROLES)}")
    marks = lowered(turn)
    for name in names_with(marks, BESIDE_TEXT):
        raise UnreadableRow(f"a turn has {name}, which the model would not be given")
    try:
        learnt = is_learnt(marks, LEARNT)
    except UnreadableRow as error:
        raise UnreadableRow(f"of a turn, {error}") from error
    if learnt and role != "assistant":
        raise UnreadableRow(f"a turn of the {role} is marked to be learnt")
    chat_turn: Turn = {"role": role, "content": content}
    if role == "assistant" and learnt is False:
        chat_turn["learnt"] = False
    return chat_turn


def _one_of(turn: dict[str, Any], name: str, other: str) -> Any:
    """The value of either key. Raises UnreadableRow where they differ."""
    if name in turn and other in turn and turn[name] != turn[other]:
        raise UnreadableRow(f"a turn's {name} and {other} differ")
    return turn.get(name, turn.get(other))


def _text(content: Any) -> str | None:
    """The text of a turn; of a list of parts, their texts on end. None where it has none; raises UnreadableRow."""
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
