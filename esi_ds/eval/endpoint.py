"""A bounded client of any OpenAI-compatible chat-completions endpoint: every question gets a reply or a reason.

One event loop asks ``concurrency`` questions at a time. asyncio and not threads: a deadline on an awaited request holds
whatever the server does, even if it sends a byte a second, which a socket's timeout does not stop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from esi_ds.config.checks import check_url
from esi_ds.data.thoughts import REASONING_KEYS, whole_response
from esi_ds.data.turns import Turn
from esi_ds.errors import UserError

BASE_URL_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
OPENAI_URL = "https://api.openai.com/v1"
# Transient failures: request timeout, conflict, too early, too many requests. Every 5xx is tried again too.
TRANSIENT = {408, 409, 425, 429}
# The server takes no question for now: it limits the asker's rate, or is overloaded. Such a refusal does not count as
# an attempt.
BUSY = {429, 503, 529}
# Of OpenAI's 429 that no pause overcomes: the account has no credit, or the question alone is above its limit.
NO_CREDIT, TOO_LARGE = b"insufficient_quota", b"Request too large"
# Refusals of one question (too long) while others get replies; a wrong key or model refuses them all.
OF_THE_QUESTION = {400, 413, 422}
# A longer reply is not read. A judge's is a few kilobytes; a model's answer may hold a thought of 100,000 tokens twice,
# and escaped (``reasoning`` and ``reasoning_content``).
MAX_REPLY_BYTES, MAX_ANSWER_BYTES = 1 << 20, 1 << 24
MAX_TOKENS = 1 << 31  # more than a model reads or writes at once: a larger number is not a count
# Runs of so many characters of the key are removed from whatever is kept but for models' answers (``MIN_KEY``); a
# shorter key is a placeholder, not a secret.
KEY_RUN = 6
MIN_KEY = 16  # characters of a key that is looked for in answers: shorter ones are words
# How servers say in a reply (finish_reason; gateways pass on Gemini's, Anthropic's and Bedrock's own) that the model
# ended it, or its longest length; and that they did: by a filter, or because something went wrong.
WHOLE = {"none", "", "stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "tool_calls", "function_call"}
CUT = {"length", "max_tokens", "max_length", "model_length", "model_context_window_exceeded"}
FILTERED = {"content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii"}
FILTERED |= {"image_safety", "sensitive", "guardrail_intervened", "refusal"}
BROKEN_OFF = {"abort", "error", "cancelled", "timeout", "network_error", "insufficient_system_resource"}
# What a refusal says that is of the question's content, and what one of the asker says. A malformed request is refused
# with 400 or 422, too, and may "violate" a schema: there the words must be a filter's own.
FILTERS = re.compile(
    rb"content.?(filter|management|polic|exists.?risk)|moderat|flagged|data.?inspection|inappropriate"
    rb'|sensitive.?(word|content)|"1301"',  # 1301: GLM, whose words are Chinese
    re.I,
)
MODERATED = re.compile(
    rb"(input|prompt|content|message|request).{0,80}(flagged|moderat|violat|filter|polic)", re.I | re.S
)
SAYS_FILTERED = {400: FILTERS, 403: MODERATED, 422: FILTERS, 451: MODERATED}
OF_THE_ASKER = re.compile(rb"account|organi[sz]ation|api.?key|suspend|deactivat|terminat|permission|billing", re.I)
# What an error that is sent as HTTP 200 says, without a number, where it may pass: 503 and 500.
PASSING = {
    503: re.compile(rb"rate.?limit|overload|unavailable|try again", re.I),
    500: re.compile(rb"timeout|timed out|internal", re.I),
}
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS  # zlib recognises the header
Body = dict[str, Any]  # of a request
POLL_S = 0.25  # between two checks whether to stop
NO_TEXT = "the reply has no text"
ONCE_IT_WORKS = "once it works (with a lower concurrency if it limits the rate)"  # in remedies
EXCERPT = 200  # characters of an error's body that a message shows


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and how long to wait for it. Times are in seconds.

    item_timeout bounds a question with all its attempts and pauses, from its first attempt. max_attempts does not count
    what a busy server refuses. give_up_after: after so many questions in a row without a reply the endpoint counts
    as down, and the rest are not asked.
    extra: further keys of the request's body; None removes a key, such as a ``temperature`` that a model rejects.
    replies_as: what the model is called in its replies, if that is not ``model``, as behind a gateway.
    keeps_cut: whether a reply that is empty or was cut at ``max_tokens`` counts, as a model's own answer does.
    A judge's does not: nobody knows what it would have said.
    Raises ValueError for limits under which nothing could be asked.
    """

    model: str
    url: str
    key: str | None = field(default=None, repr=False)
    request_timeout: float = 60.0
    item_timeout: float = 300.0
    max_attempts: int = 5
    backoff: float = 1.0
    max_backoff: float = 30.0
    concurrency: int = 8
    max_tokens: int = 1024
    give_up_after: int = 20
    extra: Mapping[str, Any] = field(default_factory=dict)
    keeps_cut: bool = False
    replies_as: str | None = None

    def __post_init__(self) -> None:
        for name in ("request_timeout", "item_timeout", "max_attempts", "concurrency", "give_up_after"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} leaves no room to ask anything")

    @classmethod
    def from_environment(cls, model: str, config_field: str, **limits: Any) -> Endpoint:
        """Read base URL and key from the environment, as OpenAI's client does.

        The default URL is OpenAI's, which needs a key; a private server (vLLM) may need none. Raises UserError naming
        ``config_field`` or the variable.
        """
        url, key = os.environ.get(BASE_URL_VARIABLE, "").strip(), os.environ.get(KEY_VARIABLE, "").strip()
        if not url and not key:
            raise UserError(
                config_field,
                model,
                f"has no endpoint: neither {BASE_URL_VARIABLE} nor {KEY_VARIABLE} is set",
                f"export {KEY_VARIABLE}, and {BASE_URL_VARIABLE} for a server other than OpenAI's",
            )
        if url:
            check_url(BASE_URL_VARIABLE, url, remove_key(url, key))
        if not (key.isascii() and key.isprintable()):
            raise UserError(KEY_VARIABLE, None, "holds characters that a key cannot have", "export it again")
        return cls(model, (url or OPENAI_URL).rstrip("/"), key or None, **limits)

    @classmethod
    def at(
        cls, model: str, url: str, key_variable: str | None, fields: tuple[str, str], max_tokens: int, **limits: Any
    ) -> Endpoint:
        """An endpoint with a URL of its own; the key of another one is not sent there.

        key_variable: of the environment; None sends no key. Raises UserError naming one of ``fields``: the URL's, the
        variable's.
        """
        check_url(fields[0], url)
        key = None
        if key_variable is not None:
            key = os.environ.get(key_variable, "").strip()
            if not key or not (key.isascii() and key.isprintable()):
                raise UserError(fields[1], key_variable, "holds no key", "export it")
        return cls(model, url.rstrip("/"), key, max_tokens=max_tokens, **limits)

    def body(self, text: str | Sequence[Mapping[str, Any]], system: str | None = None) -> Body:
        """The body of a request with one user message, or the turns of a chat, behind a ``system`` message if any,
        decoded greedily where ``extra`` has no temperature."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        turns = [{"role": "user", "content": text}] if isinstance(text, str) else text
        body = {
            "model": self.model,
            "messages": [*messages, *turns],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **self.extra,
        }
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class Reply:
    """A reply's text, or the problem that prevented one, and what was used either way.

    asked: False if the question was not asked, its attempts were cut short, the server stayed too busy for it, or the
    server could not be reached: nothing is known of the question itself. is_alive: whether the endpoint answered at
    all, if only with a refusal. is_cut: whether the text ends at ``max_tokens``. model: which one replied, in its own
    words.
    """

    text: str | None
    problem: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_requests: int = 0
    asked: bool = True
    is_alive: bool = True
    is_cut: bool = False
    model: str | None = None


@dataclass
class Patience:
    """What ends the asking early, over several calls of ``ask_all``.

    num_failed: failures in a row. was_alive: whether the endpoint ever gave a reply, or refused what a question holds.
    should_stop: ends it at once.
    """

    num_failed: int = 0
    was_alive: bool = False
    should_stop: Callable[[], bool] = lambda: False


class _Transient(Exception):
    """A failure that another attempt may overcome.

    pause: seconds the server asks for. is_busy: it takes no question for now. was_asked: as of ``Reply``.
    """

    def __init__(self, problem: str, pause: float = 0.0, is_busy: bool = False, was_asked: bool = True):
        super().__init__(problem)
        self.pause, self.is_busy, self.was_asked = pause, is_busy, was_asked and not is_busy


def ask_all(
    endpoint: Endpoint,
    texts: Sequence[str | tuple[str, str] | list[Turn]],
    on_reply: Callable[[int, Reply], None] = lambda index, reply: None,
    patience: Patience | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Reply]:
    """A reply to each text, in order. ``on_reply`` is called for each as it comes, in this thread or one other.

    texts: of the user, each alone or with the system's: (user, system); or the turns of a chat. patience: pass the same
    one if the questions come in several calls, to count failures over all of them. seeds: what a server that samples is
    to begin each reply with; None sends none. ``on_reply`` is not called for questions that ``should_stop`` ends. Takes
    at most ⌈texts / concurrency⌉ · item_timeout seconds.
    """
    questions = [endpoint.body(*text) if isinstance(text, tuple) else endpoint.body(text) for text in texts]
    if seeds is not None and "seed" not in endpoint.extra:  # null there: the server takes none
        questions = [{"seed": seed, **body} for seed, body in zip(seeds, questions, strict=True)]
    return _run(_ask_all(endpoint, questions, on_reply, patience or Patience()))


def _run(coroutine: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:  # a loop is running already, as in a notebook
        return pool.submit(asyncio.run, coroutine).result()


async def _ask_all(
    endpoint: Endpoint, questions: Sequence[Body], on_reply: Callable[[int, Reply], None], patience: Patience
) -> list[Reply]:
    replies = [Reply(None, "not asked: stopped", asked=False, is_alive=False)] * len(questions)

    def take(index: int, reply: Reply) -> None:
        replies[index] = reply
        on_reply(index, reply)

    # A small compressed reply may unfold to gigabytes. Servers that compress all the same: see ``_post``.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    waiting = list(range(len(questions)))
    # By default a client has 100 connections, and keeps 20: a request's time would pass while it waits for one.
    limits = httpx2.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
    # Deadlines are set per question; the client's timeouts would only cut them short.
    async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        # Again where a request that was under way shows that the endpoint replies after all.
        while waiting and patience.num_failed < endpoint.give_up_after and not patience.should_stop():
            waiting = await _ask_some(endpoint, client, questions, waiting, take, patience)
    if not patience.should_stop():
        problem = f"not asked: the endpoint failed {patience.num_failed} times in a row"
        for index in waiting:
            take(index, Reply(None, problem, asked=False, is_alive=False))
    return replies


async def _ask_some(
    endpoint: Endpoint,
    client: httpx2.AsyncClient,
    questions: Sequence[Body],
    indices: Sequence[int],
    take: Callable[[int, Reply], None],
    patience: Patience,
) -> list[int]:
    """Ask the questions of these indices; those that are not asked, because the endpoint was down by then."""
    waiting, skipped = iter(indices), list[int]()

    async def work() -> None:
        for index in waiting:  # shared by the workers: each takes the next one
            if patience.num_failed >= endpoint.give_up_after:
                skipped.append(index)
                continue
            reply, status = await _ask(endpoint, client, questions[index])
            # A malformed request is refused like a bad question; only an earlier reply tells them apart.
            is_alive = status == 200 or (status in OF_THE_QUESTION and patience.was_alive)
            patience.num_failed = 0 if is_alive else patience.num_failed + 1
            patience.was_alive |= status == 200
            take(index, replace(reply, is_alive=is_alive))

    num_workers = min(endpoint.concurrency, len(indices))
    working: set[asyncio.Task[None]] = {asyncio.create_task(work()) for _ in range(num_workers)}
    while working and not patience.should_stop():
        done, working = await asyncio.wait(working, timeout=POLL_S)
        for task in done:
            task.result()  # raises what the worker raised
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    return skipped


async def _ask(endpoint: Endpoint, client: httpx2.AsyncClient, question: Body) -> tuple[Reply, int | None]:
    """The reply and its HTTP status; None if every attempt failed or time ran out. A refusal of what the question holds
    has 200: the endpoint works."""
    failures: list[_Transient] = []
    try:
        status, body = await asyncio.wait_for(_attempts(endpoint, client, question, failures), endpoint.item_timeout)
    except asyncio.TimeoutError:
        problem, was_asked = f"no reply within {endpoint.item_timeout:g} s", True
        if failures:
            problem, was_asked = f"{problem} (before: {failures[-1]})", failures[-1].was_asked
        return Reply(None, problem, num_requests=len(failures) + 1, asked=was_asked), None
    except _Transient as failure:
        problem = f"{failure}, {len(failures)} attempts"
        return Reply(None, problem, num_requests=len(failures), asked=failure.was_asked), None
    num_requests = len(failures) + 1
    if status != 200:
        problem = f"HTTP {status}: {_excerpt(body, endpoint.key)}"
        refusal = Reply(None, problem, num_requests=num_requests, asked=status not in BUSY)
        return refusal, 200 if _is_moderated(status, body) else status
    reply = read_completion(body, num_requests, endpoint.key, endpoint.keeps_cut)
    if not reply.text or not endpoint.key:
        return reply, status
    if not endpoint.keeps_cut:
        return replace(reply, text=remove_key(reply.text, endpoint.key)), status
    # An answer that is evaluated may share letters with the key: it is changed for the whole key alone.
    hidden = reply.text.replace(endpoint.key, "***") if len(endpoint.key) >= MIN_KEY else reply.text
    return replace(reply, text=hidden), status


async def _attempts(
    endpoint: Endpoint, client: httpx2.AsyncClient, question: Body, failures: list[_Transient]
) -> tuple[int, bytes]:
    """Status and body of the first answer that is not transient. Raises the last attempt's _Transient, at once where
    ``item_timeout`` leaves no time for another: before Python 3.12, wait_for may lose the cancellation at its end."""
    backoff, deadline = endpoint.backoff, time.monotonic() + endpoint.item_timeout
    while True:
        try:
            return await _request(endpoint, client, question)
        except _Transient as failure:
            failures.append(failure)
            # Random, so that the workers do not all ask again at once, also after a time that the server names.
            named = failure.pause if failure.is_busy else min(failure.pause, endpoint.max_backoff)
            pause = named + min(backoff, endpoint.max_backoff) * random.uniform(0.5, 1.5)
            num_attempts = sum(not failure.is_busy for failure in failures)
            if num_attempts >= endpoint.max_attempts or time.monotonic() + pause >= deadline:
                raise
            await asyncio.sleep(pause)
            backoff *= 2


async def _request(endpoint: Endpoint, client: httpx2.AsyncClient, question: Body) -> tuple[int, bytes]:
    """One request. Raises _Transient for a failure that another attempt may overcome."""
    try:
        status, headers, body = await asyncio.wait_for(_post(endpoint, client, question), endpoint.request_timeout)
    except asyncio.TimeoutError as error:
        raise _Transient(f"timeout after {endpoint.request_timeout:g} s") from error
    except httpx2.HTTPError as error:
        was_asked = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        problem = remove_key(f"{type(error).__name__}: {error}", endpoint.key)
        raise _Transient(problem, was_asked=was_asked) from error
    except zlib.error as error:
        raise _Transient(f"the reply cannot be decompressed: {error}") from error
    inner_status = _status_within(body) if status == 200 else None
    effective = inner_status or status
    if effective in BUSY and TOO_LARGE in body:
        return 413, body  # which other servers say
    if (effective in TRANSIENT or effective >= 500) and not (effective in BUSY and NO_CREDIT in body):
        words = f", which says: {_excerpt(body, endpoint.key)}" if inner_status else ""
        raise _Transient(f"HTTP {status}{words}", _seconds(headers.get("retry-after", "")), effective in BUSY)
    return effective, body


def _is_moderated(status: int, body: bytes) -> bool:
    """Whether a refusal is of what the question holds: a filter's, as servers have before their models."""
    words = SAYS_FILTERED.get(status)
    return words is not None and words.search(body) is not None and OF_THE_ASKER.search(body) is None


def _status_within(body: bytes) -> int | None:
    """The status that a reply with HTTP 200 should have had, as routers pass on errors of the server behind them, and
    engines that give a request up; None where it is a completion, or nothing that is known."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if (error := content.get("error")) and not content.get("choices"):
        code = str(error.get("code")) if isinstance(error, dict) else ""
        if code.isdecimal() and len(code) <= 3:  # Python reads no number of thousands of digits
            return int(code) if 400 <= int(code) < 600 else 500
        return next((status for status, words in PASSING.items() if words.search(body)), 400)
    choice = _first_choice(content)
    return 500 if choice is not None and _reason(choice) in BROKEN_OFF else None


def _first_choice(content: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = content.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def _reason(choice: Mapping[str, Any]) -> str:
    return str(choice.get("finish_reason")).lower()


async def _post(endpoint: Endpoint, client: httpx2.AsyncClient, question: Body) -> tuple[int, Mapping[str, str], bytes]:
    body, limit = bytearray(), MAX_ANSWER_BYTES if endpoint.keeps_cut else MAX_REPLY_BYTES
    # Escaped to ASCII: an answer read from a file may hold half a surrogate pair, which UTF-8 cannot encode.
    content = json.dumps(question).encode()
    async with client.stream("POST", f"{endpoint.url}/chat/completions", content=content) as response:
        is_compressed = response.headers.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate")
        decompressor = zlib.decompressobj(ZLIB_OR_GZIP) if is_compressed else None
        async for chunk in response.aiter_raw():
            room = limit + 1 - len(body)
            body += decompressor.decompress(chunk, room) if decompressor else chunk[:room]
            if len(body) > limit:
                break
    return response.status_code, response.headers, bytes(body)


def _seconds(retry_after: str) -> float:
    """A Retry-After in seconds, of which some gateways send fractions; 0 for a date, which the back-off covers."""
    return float(retry_after) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", retry_after) else 0.0


def remove_key(text: str, key: str | None) -> str:
    """The text with ``***`` for every run of ``KEY_RUN`` or more characters of the key, which some servers repeat.

    Case does not matter. A key shorter than that is left alone: "EMPTY", which private servers take, is not a secret.
    """
    key = (key or "").lower()
    runs = {key[start : start + KEY_RUN] for start in range(len(key) - KEY_RUN + 1)}
    # lower() may lengthen other letters, which would shift positions; a key is ASCII.
    lowered = "".join(letter.lower() if letter.isascii() else letter for letter in text)
    starts = [start for start in range(len(text) - KEY_RUN + 1) if lowered[start : start + KEY_RUN] in runs]
    hidden = {position for start in starts for position in range(start, start + KEY_RUN)}
    pieces = itertools.groupby(range(len(text)), hidden.__contains__)
    return "".join("***" if is_hidden else "".join(text[position] for position in span) for is_hidden, span in pieces)


def _excerpt(body: bytes, key: str | None) -> str:
    """The beginning of an error's body on one line, without the key. The key goes first: a cut would hide a part."""
    return " ".join(remove_key(body.decode(errors="replace"), key).split())[:EXCERPT] or "no explanation"


def read_completion(body: bytes, num_requests: int = 1, key: str | None = None, keeps_cut: bool = False) -> Reply:
    """The reply in a completion's body, or the problem with any other body; ``key`` is removed from excerpts.

    keeps_cut: as of ``Endpoint``.
    """

    def reply(text: str | None, problem: str | None = None, is_cut: bool = False) -> Reply:
        name = content.get("model")
        model = " ".join(name.split()) if isinstance(name, str) else None  # a line of its own could forge one of a log
        tokens = used("prompt_tokens"), used("completion_tokens")
        return Reply(text, problem, *tokens, num_requests, is_cut=is_cut, model=model)

    def used(name: str) -> int:
        usage = content.get("usage")
        count = usage.get(name) if isinstance(usage, dict) else None
        return count if isinstance(count, int) and not isinstance(count, bool) and 0 < count < MAX_TOKENS else 0

    content: Any = {}
    limit = MAX_ANSWER_BYTES if keeps_cut else MAX_REPLY_BYTES
    if len(body) > limit:
        return reply(None, f"the reply is longer than {limit} bytes")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return reply(None, f"the reply is not JSON: {_excerpt(body, key)}")
    if not isinstance(parsed, dict):
        return reply(None, "the reply is not a JSON object")
    content = parsed
    choice = _first_choice(content)
    if choice is None:
        return reply(None, "the reply has no choices")
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    if (reason := _reason(choice)) in FILTERED:
        return reply(None, f"the server's filter ended the reply ({reason})")
    is_whole, is_cut = reason in WHOLE, reason in CUT
    text = _whole_text(message, is_whole) if keeps_cut else _parts(message.get("content"))[1]
    if not isinstance(text, str) or not (text.strip() or (keeps_cut and is_whole)):
        if is_whole or (is_cut and not keeps_cut):
            return reply(None, NO_TEXT)
        ended = f"the server ended the reply ({_excerpt(reason.encode(errors='replace'), key)})"
        return reply(None, "the reply was cut before its answer began" if is_cut else ended)
    # A judge's reply that was cut off may end anywhere, even inside a quotation.
    return reply(None, "the reply was cut off") if is_cut and not keeps_cut else reply(text, is_cut=is_cut)


def _whole_text(message: Mapping[str, Any], is_whole: bool) -> str | None:
    """A model's own answer behind its thought, which some servers give apart; None if there is neither."""
    thought, text = _parts(message.get("content"))
    if text is None and isinstance(refusal := message.get("refusal"), str):  # OpenAI's models refuse apart
        text = refusal
    apart = [thought, *(message.get(name) for name in REASONING_KEYS)]
    thoughts = [thought for thought in apart if isinstance(thought, str) and thought.strip()]
    if thoughts and not is_whole and not (text or "").strip():
        text = None  # it ends within its thought
    return whole_response(thoughts[0] if thoughts else None, text)


def _parts(content: Any) -> tuple[str | None, str | None]:
    """Thought and text of a message's content: a text, or a list of parts of these kinds, as Mistral's API gives it.

    None for one that there is not, and for both where a part is of another kind.
    """
    if isinstance(content, str):
        return None, content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None, None
    texts_by_kind: dict[str, list[str]] = {"thinking": [], "text": []}
    for part in content:
        kind = part.get("type")
        inner = part.get(kind) if kind in texts_by_kind else None
        text = _parts(inner)[1] if kind == "thinking" else inner  # a thought is a text or a list of parts of text
        if not isinstance(text, str):
            return None, None
        texts_by_kind[str(kind)].append(text)
    thought, answer = ("".join(texts) if texts else None for texts in texts_by_kind.values())
    return thought, answer


def served_models(endpoint: Endpoint) -> dict[str, str] | None:
    """Names of the models that the endpoint lists under ``/models``, each with whoever owns it; None where it has no
    such list.

    Raises OSError where it cannot be reached.
    """
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    try:
        response = httpx2.get(f"{endpoint.url}/models", headers=headers, timeout=endpoint.request_timeout)
    except httpx2.HTTPError as error:
        raise OSError(remove_key(f"{type(error).__name__}: {error}", endpoint.key)) from error
    try:
        listed = response.json() if response.status_code == 200 else None
    except (ValueError, RecursionError):
        return None
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        return None
    named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    return {entry["id"]: str(entry.get("owned_by")) for entry in named}
