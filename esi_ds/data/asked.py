"""What besides its prompt decides a response, as rows of responses record it (``asked``): one that was given to another
question is not read as the answer to this one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esi_ds.config import Model
from esi_ds.data.rows import Row
from esi_ds.errors import UserError

TEMPLATE = "chat_template_kwargs"  # where vLLM and SGLang read values of the chat template


@dataclass(frozen=True)
class Asked:
    """How this run asks. max_tokens: the longest answer; None where that is not this run's. sampling: temperature and
    top_p, nothing of greedy answers."""

    model: Model
    max_tokens: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """As ``esi-ds ask`` writes it into its rows."""
        values = {TEMPLATE: dict(self.model.template_kwargs)} if self.model.template_kwargs else {}
        extra = {**values, **self.sampling}
        length = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {**length, "system_prompt": self.model.system_prompt, **({"extra": extra} if extra else {})}

    def check_system_prompt(self, rows: Sequence[Row], path: str) -> None:
        """Raise UserError for a row that was asked with another system prompt than ``model.system_prompt``."""
        for number, row, asked in _recorded(rows):
            if not _has_own_system(row) and asked["system_prompt"] != self.model.system_prompt:
                _refuse("system_prompt", self.model.system_prompt, asked["system_prompt"], number, path)

    def check_template(self, rows: Sequence[Row], path: str) -> None:
        """Raise UserError for a row that was asked with other values of the template than ``model.template_kwargs``."""
        for number, _, asked in _recorded(rows):
            if _extra(asked, TEMPLATE, {}) != self.model.template_kwargs:
                _refuse("template_kwargs", self.model.template_kwargs, _extra(asked, TEMPLATE, {}), number, path)

    def differences(self, rows: Sequence[Row]) -> str:
        """What else the rows were asked with that is not this run's; "" if nothing."""
        ours = {
            "max_tokens": self.max_tokens,
            "temperature": self.sampling.get("temperature", 0),
            "top_p": self.sampling.get("top_p", 1),
            TEMPLATE: self.model.template_kwargs,
        }
        others: dict[str, dict[str, None]] = {name: {} for name in ours}  # name → distinct values, in their order
        for _, _, asked in _recorded(rows):
            are_sampled = bool(self.sampling) and _extra(asked, "temperature", 0) != 0
            theirs = {
                "max_tokens": asked.get("max_tokens", self.max_tokens),
                "temperature": _extra(asked, "temperature", 0),
                "top_p": (_extra(asked, "top_p", None) or 1) if are_sampled else ours["top_p"],
                TEMPLATE: _extra(asked, TEMPLATE, {}),
            }
            for name, value in theirs.items():
                if value != ours[name]:
                    others[name][json.dumps(value)] = None
        return "; ".join(
            f"{name} {' or '.join(values)}, not {json.dumps(ours[name])}" for name, values in others.items() if values
        )

    def unrecorded(self, rows: Sequence[Row]) -> str:
        """Whether rows that a run wrote fail to record the system prompt or template values that this run asks with, as
        the end of a remark; "" if not. Other engines' rows are not looked at."""
        silent = [row for row in rows if "excluded" in row and "asked" not in row]
        keys = {
            "model.system_prompt": self.model.system_prompt is not None and not all(map(_has_own_system, silent)),
            "model.template_kwargs": bool(self.model.template_kwargs) and bool(silent),
        }
        names = " and ".join(key for key, is_silent in keys.items() if is_silent)
        problem = (
            f"do not record {names}: rows of runs that set none look like this, and so do those of earlier versions"
        )
        return problem if names else ""


def changes_the_prompt(asked: Mapping[str, Any]) -> bool:
    """Whether the model read more than the prompt and its template: only then do the rows of a run record it."""
    return asked.get("system_prompt") is not None or bool(_extra(asked, TEMPLATE, {}))


def _recorded(rows: Sequence[Row]) -> Iterator[tuple[int, Row, Mapping[str, Any]]]:
    """(number from 1, row, how it was asked) of the rows that say so."""
    for number, row in enumerate(rows, 1):
        asked = row.get("asked")
        if isinstance(asked, dict) and "system_prompt" in asked:
            yield number, row, asked


def _has_own_system(row: Row) -> bool:
    """Whether the row's prompt is a chat with a system turn, which stands in place of ``model.system_prompt``."""
    prompt = row["prompt"]
    return isinstance(prompt, list) and prompt[0]["role"] == "system"


def _extra(asked: Mapping[str, Any], key: str, default: Any) -> Any:
    """A further key of the request."""
    extra = asked.get("extra")
    return extra.get(key, default) if isinstance(extra, dict) else default


def _refuse(key: str, ours: Any, theirs: Any, number: int, path: str) -> None:
    problem = f"differs from that of row {number} of {path}, {json.dumps(theirs)[:80]}"
    raise UserError(f"model.{key}", ours, problem, "set it to that, or give responses that were asked with this")
