"""A bounded client of any OpenAI-compatible chat-completions endpoint: every question gets a reply or a reason.

One event loop asks ``concurrency`` questions at a time. asyncio and not threads: a deadline on an awaited request holds
whatever the server does, also one that sends a byte a second, which a socket's own timeout does not stop.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from esi_ds.errors import UserError

BASE_URL_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
OPENAI_URL = "https://api.openai.com/v1"
# What may pass by itself: request timeout, conflict, too early, too many requests. Every 5xx is tried again too.
PASSING = {408, 409, 425, 429}
# Refused for what was asked (too long, filtered), where other questions get replies; a wrong key or model refuses all.
OF_THE_QUESTION = {400, 413, 422}
# A judge's reply is a few kilobytes; whoever sends more is no judge.
MAX_REPLY_BYTES = 1 << 20
LOOK_S = 0.25  # between two looks at whether to stop
EXCERPT = 200  # characters of an error's body that are shown


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked and how long anybody waits for it. Times are in seconds.

    item_timeout bounds a question with all its attempts and pauses, from when it is first asked. give_up_after: so many
    questions in a row without a reply, and the rest is not asked: the endpoint is down.
    extra: further keys of the request's body; None takes a key out (a model that knows no ``temperature``).
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

    def __post_init__(self) -> None:
        for name in ("request_timeout", "item_timeout", "max_attempts", "concurrency", "give_up_after"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of {getattr(self, name)} lets nothing be asked")

    @classmethod
    def from_environment(cls, model: str, config_field: str, **limits: Any) -> Endpoint:
        """Base URL and key from the environment, as OpenAI's own client reads them.

        Without a base URL it is OpenAI's, which needs a key; a server of one's own (vLLM) may do without. Raises
        UserError naming ``config_field`` or the variable.
        """
        url, key = os.environ.get(BASE_URL_VARIABLE, "").strip(), os.environ.get(KEY_VARIABLE, "").strip()
        if not url and not key:
            raise UserError(
                config_field,
                model,
                f"has no endpoint: neither {BASE_URL_VARIABLE} nor {KEY_VARIABLE} is set",
                f"export {KEY_VARIABLE}, and {BASE_URL_VARIABLE} for another server than OpenAI's",
            )
        if url and not _is_url(url):
            raise UserError(BASE_URL_VARIABLE, url, "is no URL", "give for instance http://localhost:8000/v1")
        if not (key.isascii() and key.isprintable()):
            raise UserError(KEY_VARIABLE, None, "holds characters that no key has", "export it again")
        return cls(model, (url or OPENAI_URL).rstrip("/"), key or None, **limits)

    def body(self, text: str) -> dict[str, Any]:
        """The request of one user message, greedy."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **self.extra,
        }
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class Reply:
    """Text, or the problem why there is none; what was used either way.

    asked: False where it was not, or to no end. is_alive: whether the endpoint answered, be it with a refusal.
    """

    text: str | None
    problem: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_requests: int = 0
    asked: bool = True
    is_alive: bool = True


@dataclass
class Patience:
    """Failures of an endpoint in a row, kept over several calls of ``ask_all``, and whether it ever gave a reply; and
    what else ends them, at once."""

    num_failed: int = 0
    was_alive: bool = False
    told_to_stop: Callable[[], bool] = lambda: False


class _Passing(Exception):
    """A failure that may pass; ``pause``: seconds the server asks for."""

    def __init__(self, problem: str, pause: float = 0.0):
        super().__init__(problem)
        self.pause = pause


def ask_all(
    endpoint: Endpoint,
    texts: Sequence[str],
    on_reply: Callable[[int, Reply], None] = lambda index, reply: None,
    patience: Patience | None = None,
) -> list[Reply]:
    """A reply to each text, in order. ``on_reply`` is called as each one comes, in this thread or one other.

    patience: given where the questions come in several calls; failures are then counted over all of them. A question
    that is not asked, or not to its end, has a reply with ``asked=False``; ``on_reply`` is not called for those that
    ``told_to_stop`` ends. Takes at most ⌈texts / concurrency⌉ · item_timeout seconds.
    """
    return _run(_ask_all(endpoint, texts, on_reply, patience or Patience()))


def _run(coroutine: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:  # a notebook has a loop of its own
        return pool.submit(asyncio.run, coroutine).result()


async def _ask_all(
    endpoint: Endpoint, texts: Sequence[str], on_reply: Callable[[int, Reply], None], patience: Patience
) -> list[Reply]:
    replies = [Reply(None, "not asked: stopped", asked=False, is_alive=False)] * len(texts)
    waiting = iter(range(len(texts)))

    async def work(client: httpx2.AsyncClient) -> None:
        for index in waiting:  # shared: each worker takes the next one
            if patience.num_failed >= endpoint.give_up_after:
                problem = f"not asked: the endpoint failed {patience.num_failed} times in a row"
                reply = Reply(None, problem, asked=False, is_alive=False)
            else:
                reply, status = await _ask(endpoint, client, texts[index])
                # A request that is wrong in itself is refused like a question that is: only a reply tells them apart.
                is_alive = status == 200 or (status in OF_THE_QUESTION and patience.was_alive)
                patience.num_failed = 0 if is_alive else patience.num_failed + 1
                patience.was_alive |= status == 200
                reply = replace(reply, is_alive=is_alive)
            replies[index] = reply
            on_reply(index, reply)

    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    # Deadlines are set per question; the client's own timeouts would only cut them short.
    async with httpx2.AsyncClient(headers=headers, timeout=None) as client:
        working = [asyncio.create_task(work(client)) for _ in range(min(endpoint.concurrency, len(texts)))]
        while working and not patience.told_to_stop():
            done, working = await asyncio.wait(working, timeout=LOOK_S)
            for task in done:
                task.result()  # raises what it raised
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    return replies


async def _ask(endpoint: Endpoint, client: httpx2.AsyncClient, text: str) -> tuple[Reply, int | None]:
    """The reply, and the status that came with it; None where nothing came that another attempt would not change."""
    problems: list[str] = []  # of the attempts that failed
    try:
        status, body = await asyncio.wait_for(_attempts(endpoint, client, text, problems), endpoint.item_timeout)
    except asyncio.TimeoutError:
        last = f" (before: {problems[-1]})" if problems else ""
        num_requests = min(len(problems) + 1, endpoint.max_attempts)
        return Reply(None, f"no reply within {endpoint.item_timeout:g} s{last}", num_requests=num_requests), None
    except _Passing as failure:
        return Reply(None, f"{failure}, {len(problems)} attempts", num_requests=len(problems)), None
    num_requests = len(problems) + 1
    if status != 200:
        problem = f"HTTP {status}: {_excerpt(body, endpoint.key)}"
        return Reply(None, problem, num_requests=num_requests), status
    return read_completion(body, num_requests, endpoint.key), status


async def _attempts(
    endpoint: Endpoint, client: httpx2.AsyncClient, text: str, problems: list[str]
) -> tuple[int, bytes]:
    """Status and body of the first answer that another attempt would not change. Raises the last attempt's _Passing."""
    while True:
        try:
            return await _request(endpoint, client, text)
        except _Passing as failure:
            problems.append(str(failure))
            if len(problems) >= endpoint.max_attempts:
                raise
            # Random, so that the questions of all workers do not come back at once.
            pause = endpoint.backoff * 2 ** (len(problems) - 1) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(max(pause, failure.pause), endpoint.max_backoff))


async def _request(endpoint: Endpoint, client: httpx2.AsyncClient, text: str) -> tuple[int, bytes]:
    """One request. Raises _Passing for what another attempt may mend."""
    try:
        status, headers, body = await asyncio.wait_for(_post(endpoint, client, text), endpoint.request_timeout)
    except asyncio.TimeoutError as error:
        raise _Passing(f"timeout after {endpoint.request_timeout:g} s") from error
    except httpx2.HTTPError as error:
        raise _Passing(f"{type(error).__name__}: {error}") from error
    if status in PASSING or status >= 500:
        raise _Passing(f"HTTP {status}", _seconds(headers.get("retry-after", "")))
    return status, body


async def _post(endpoint: Endpoint, client: httpx2.AsyncClient, text: str) -> tuple[int, Mapping[str, str], bytes]:
    body = bytearray()
    # Escaped to ASCII: an answer read from a file may hold half a surrogate pair, which UTF-8 cannot write.
    content = json.dumps(endpoint.body(text)).encode()
    async with client.stream("POST", f"{endpoint.url}/chat/completions", content=content) as response:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                break
    return response.status_code, response.headers, bytes(body)


def _is_url(text: str) -> bool:
    try:
        url = httpx2.URL(text)
        return url.scheme in ("http", "https") and bool(url.host)
    except httpx2.InvalidURL:
        return False


def _seconds(retry_after: str) -> float:
    """A Retry-After in seconds; its other form, a date, is left to the back-off."""
    return float(retry_after) if retry_after.isdecimal() else 0.0


def _excerpt(body: bytes, key: str | None) -> str:
    """The beginning of an error's body on one line. Some servers repeat the key."""
    text = " ".join(body[:4096].decode(errors="replace").split())
    return (text.replace(key, "***") if key else text)[:EXCERPT] or "no explanation"


def read_completion(body: bytes, num_requests: int = 1, key: str | None = None) -> Reply:
    """The text of a completion's body, whatever was sent in its place; ``key`` is kept out of what is shown of it."""

    def reply(text: str | None, problem: str | None = None) -> Reply:
        return Reply(text, problem, used("prompt_tokens"), used("completion_tokens"), num_requests)

    def used(name: str) -> int:
        usage = content.get("usage")
        count = usage.get(name) if isinstance(usage, dict) else None
        return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0

    content: Any = {}
    if len(body) > MAX_REPLY_BYTES:
        return reply(None, f"the reply is longer than {MAX_REPLY_BYTES} bytes")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return reply(None, f"the reply is no JSON: {_excerpt(body, key)}")
    if not isinstance(parsed, dict):
        return reply(None, "the reply is no JSON object")
    content = parsed
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return reply(None, "the reply holds no choices")
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        return reply(None, "the reply holds no text")
    # What was cut off may end anywhere, also in a quotation.
    return reply(None, "the reply was cut off") if choices[0].get("finish_reason") == "length" else reply(text)
