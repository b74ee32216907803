"""Checks of a config that types alone cannot make: numbers out of range, names given twice, keys with another owner."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from esi_ds.errors import UserError
from esi_ds.reading import is_text

MAX_NUMBER = 2**53  # integers up to here are exact wherever they are computed with
# Rows that share a batch may round each other's results differently, and nothing else.
BATCH_SIZES = ("esi.batch_size", "esi.generation_batch_size", "eval.batch_size", "eval.generation_batch_size")
# Keys that say how a run starts and saves and not what it computes: they may differ from one start to the next. The
# DeepSpeed config, expert parallelism included, may have to change where the next start has other nodes, and so may the
# batch sizes that are not part of a tuning step, where a start ran out of memory.
OF_THIS_START = (
    "run.output_dir",  # a folder may be spelt differently, or have been moved
    "run.resume",
    "run.share",
    "run.collective_timeout_s",
    "run.start_timeout_s",
    "run.save_every_min",
    "esi.save_every",
    "tune.save_every",
    "deepspeed",
    *BATCH_SIZES,
)
# Likewise of a server: it may have moved, or bear less. Its answers are those of the model that it is asked for.
OF_THIS_SERVER = re.compile(
    r"(?:eval\.models\.\d+\.endpoint|eval\.judges\.\d+|data\.responses)"
    r"\.(?:base_url|key_variable|concurrency|request_timeout|item_timeout|max_attempts)"
)
MIN_FLOAT, MAX_FLOAT = 1e-37, 1e37  # where fp32 neither rounds to 0 nor overflows


def check_numbers(content: Any, key: str) -> None:
    """Raise UserError for a number that would be rounded, or overflow, where it is computed with, and for half of a
    surrogate pair, which is not text.

    content: of the config's ``key`` and all that is below it; no deeper than a parser has let it be.
    """
    if isinstance(content, dict | list):
        for part, value in content.items() if isinstance(content, dict) else enumerate(content):
            check_numbers(value, f"{key}.{part}" if key else str(part))
    elif isinstance(content, str) and not is_text(content):
        raise UserError(key, ascii(content)[:60], "holds half of a surrogate pair", "write the character itself")
    elif isinstance(content, float) and not math.isfinite(content):
        raise UserError(key, content, "is not a finite number", "give a number")
    elif isinstance(content, float) and content and not MIN_FLOAT <= abs(content) <= MAX_FLOAT:
        raise UserError(key, content, f"is not between {MIN_FLOAT:g} and {MAX_FLOAT:g}", "give another number")
    elif isinstance(content, int) and abs(content) > MAX_NUMBER:
        raise UserError(
            key, f"a number of {content.bit_length()} bits", f"is above {MAX_NUMBER:,}", "give another number"
        )


def check_url(field: str, url: str, shown: str | None = None) -> None:
    """Raise UserError unless this is the URL of a server, to which paths can be appended, and holds no secret.

    shown: the text for the message, if not the URL itself; a user and password, and a query, are never shown.
    """
    import httpx2  # most configs name no server, and pay nothing for it

    shown = re.split("[?#]", re.sub(r"^(\w+://)?.*@", r"\1", shown or url, flags=re.DOTALL))[0]
    example = "give for instance http://localhost:8000/v1"
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise UserError(field, shown, "is not a URL", example) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(field, shown, "is not a URL", example)
    if parsed.userinfo:
        remedy = "leave them out; a key goes into the variable that key_variable names, or into OPENAI_API_KEY"
        raise UserError(field, shown, "holds a user or a password, which would be sent instead of the key", remedy)
    if "?" in url or "#" in url:
        raise UserError(field, shown, "holds a query or a fragment, after which no path can be added", example)


def check_deepspeed_keys(deepspeed: Any) -> None:
    """Raise UserError for an API key in the config's own DeepSpeed mapping."""
    comet = deepspeed.get("comet") if isinstance(deepspeed, dict) else None
    if isinstance(comet, dict) and comet.get("api_key") not in (None, "auto"):
        problem = "would be written to config.yaml and printed by dry runs"
        raise UserError("deepspeed.comet.api_key", None, problem, "remove it, and export COMET_API_KEY")


# What a chat template is given by whoever renders it.
OF_THE_TEMPLATE = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
BY_CONVERSATION = "the conversation sets it"
TOOLS = ("functions", "tool_choice", "function_call")
# Keys of a request's body that ``extra`` may not set, and what does set them. Servers take a template's, too.
OF_THE_REQUEST = dict.fromkeys((*OF_THE_TEMPLATE, *TOOLS), BY_CONVERSATION) | {
    "model": "the key model sets it",
    "stream": "the reply is read whole",
    "echo": "the reply alone is read",
    **dict.fromkeys(("n", "best_of", "use_beam_search"), "one reply is read, greedy or sampled"),
    "max_tokens": "the key max_tokens, or eval.max_new_tokens, sets it",
}
# Those that null may leave out: without max_tokens a server has its own limit, and the others are not sent anyway.
WITHOUT = {"max_tokens", *TOOLS, *OF_THE_TEMPLATE} - {"messages"}


def check_extra(extra: Mapping[str, Any], field: str) -> None:
    """Raise UserError where ``extra`` would replace a part of the request that has another owner."""
    for key, value in extra.items():
        if key in OF_THE_REQUEST and not (value is None and key in WITHOUT):
            raise UserError(f"{field}.{key}", value, f"cannot be set here: {OF_THE_REQUEST[key]}", "remove it")
    if isinstance(values := extra.get("chat_template_kwargs"), dict):
        check_template_kwargs(values, f"{field}.chat_template_kwargs")


def check_template_kwargs(values: Mapping[str, Any], field: str = "model.template_kwargs") -> None:
    """Raise UserError for a name that a chat template cannot read as a value of the user's."""
    for name, value in values.items():
        if not name.isidentifier() or not name.isascii():
            raise UserError(f"{field}.{name}", value, "is not a name that a template can read", "write it as a word")
        if name in OF_THE_TEMPLATE:
            raise UserError(f"{field}.{name}", value, f"cannot be set here: {BY_CONVERSATION}", "remove it")


def check_date(text: str) -> None:
    """Raise UserError unless the text is ``auto`` or a day as ISO 8601 writes it (2026-11-28)."""
    try:
        is_day = text == "auto" or date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_day = False
    if not is_day:
        raise UserError("model.date", text, "is not a date", "write it as 2026-11-28, or auto")


def check_thought_marks(marks: Sequence[str] | None) -> None:
    """Raise UserError unless there are two different marks, or none at all."""
    if marks is None:
        return
    field, texts = "model.thought_marks", [mark.strip().lower() for mark in marks]
    if len(texts) != 2 or not all(texts):
        problem = "is not a pair: one mark opens a thought, the other closes it"
        raise UserError(field, list(marks), problem, 'give both, such as ["<reason>", "</reason>"]')
    if texts[0] == texts[1]:
        raise UserError(field, list(marks), "is the same mark twice", "give the one that opens and the one that closes")


def check_origin(field: str, origins: Mapping[str, Any], revision: str | None) -> None:
    """Raise UserError unless a model under evaluation has one origin. origins: each key that names one → its value."""
    named = [key for key, value in origins.items() if value is not None]
    keys = " or ".join(origins)
    if not named:
        raise UserError(field, None, "has no answers", f"give its {keys}")
    if len(named) > 1:
        raise UserError(
            f"{field}.{named[1]}", origins[named[1]], f"is given together with {named[0]}", f"give only one: {keys}"
        )
    if revision is not None and named != ["path"]:
        raise UserError(f"{field}.revision", revision, "belongs to a model of the hub", "leave it out, or give path")


def check_unique(names: list[tuple[str, str]]) -> None:
    """Check the (field, name) pairs of one table."""
    seen: set[str] = set()
    for field, name in names:
        if name in seen:
            raise UserError(field, name, "is already in use", "give another name")
        seen.add(name)
