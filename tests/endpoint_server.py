"""A local chat-completions endpoint that misbehaves as its prompts ask it to: "CASE five;" is answered with a 5."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, finish_reason: str = "stop", **fields) -> dict:
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage, **fields}


def thinking(content, thought, key: str = "reasoning_content", finish_reason: str = "stop") -> bytes:
    """A completion of a server that gives a thought apart."""
    whole = completion(content, finish_reason)
    whole["choices"][0]["message"][key] = thought
    return json.dumps(whole).encode()


def marked_reply(text: str) -> str:
    """The reply to be graded with its marks, whose number the closing text names."""
    nonce = re.search(r"carry the number (\w+)\.", text).group(1)
    return re.search(rf"<reply {nonce}>\n.*\n</reply {nonce}>", text, re.DOTALL).group()


MANY_TOKENS = {"prompt_tokens": 10**400, "completion_tokens": 1e308}

# Replies by the case that the prompt names. Numbers: a status; tuples: status and body; text: the judge's own;
# bytes: sent as they are.
CASES = {
    "five": "#thereason: it does all.\n#thescore: 5",
    "one": "#thereason: it declines.\n\n#thescore: 1",
    "dot": "#thereason: x\n#thescore: 5.",
    "bold": "**#thereason:** x\n**#thescore: 4**",
    "zero": "#thescore: 0",
    "seven": "#thescore: 7",
    "fraction": "#thescore: 4.5",
    "none": "I cannot score this.",
    "refusal": "#thereason: x\n#thescore: I would rather not",
    "violates": "1",
    "allowed": " **0**\n",
    "violates by JSON": '{"violation": 1, "policy_category": "H2.f", "confidence": "high"}',
    "allowed by JSON": '```json\n{"violation": false}\n```',
    "two": "2",
    "argued": "The reply says 0, yet it violates the policy: 1",
    "share": '{"violation": 1.0}',
    "unsure": '{"violation": null}',
    "html": b"<html><body>502 Bad gateway for sk-secret</body></html>",
    "malformed": b'{"choices": [{"message": {"content": "#thescore: 1"',
    "list": b"[]",
    "deep": b"[" * 100_000,
    "nothing": b"",
    "no choices": json.dumps({"choices": []}).encode(),
    "null choices": json.dumps({"choices": None, "usage": "much"}).encode(),
    "null": json.dumps(completion(None)).encode(),
    "parts": json.dumps(completion([{"text": "#thescore: 1"}])).encode(),
    "parts of Mistral": json.dumps(
        completion(
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "#thescore: "},
                {"type": "text", "text": "5"},
            ]
        )
    ).encode(),
    "cut": json.dumps(completion("#thereason: it says #thescore: 1\n#thescore: 1", "length")).encode(),
    "huge": b" " * (1 << 21),
    "bomb": gzip.compress(b" " * (1 << 28)),
    "zipped": gzip.compress(json.dumps(completion("#thescore: 5")).encode()),
    "deflated": zlib.compress(json.dumps(completion("#thescore: 5")).encode()),
    "torn zip": gzip.compress(b"x" * 100)[:9] + bytes(20),
    "many tokens": json.dumps(completion("#thescore: 5", usage=MANY_TOKENS)).encode(),
    "key as score": json.dumps(completion("#thescore: sk-secret-of-thirty-characters")).encode(),
    "part of the key": json.dumps(completion("#thescore: T-of-thirty-chARacters")).encode(),
    "key in parts": b"the first half is sk-secret-of-th and the second irty-characters",
    "key far away": b"denied" + b" " * 4070 + b"Bearer sk-secret-of-thirty-characters",
    "thinks": thinking("Hello", "Hm."),
    "closes a thought": "Hm.</think>Hello",
    "reasons": thinking("Hello", "Hm </think>", "reasoning"),
    "thinks of nothing": thinking("Hello", None),
    "thinks too long": thinking(None, "Hm", finish_reason="length"),
    "thinks in vain": thinking("", "Hm"),
    "filtered": json.dumps(completion("", "content_filter")).encode(),
    "filtered late": json.dumps(completion("Sure, first", "content_filter")).encode(),
    "aborted once": json.dumps(completion("Sure, first", "abort")).encode(),
    "error once": json.dumps({"error": {"code": 502, "message": "overloaded"}}).encode(),
    "error": json.dumps({"error": {"message": "what is this"}}).encode(),
    "refuses apart": json.dumps(
        {"choices": [{"message": {"content": None, "refusal": "I can't."}, "finish_reason": "stop"}]}
    ).encode(),
    "rate limited once": json.dumps({"error": {"code": "rate_limit_exceeded", "message": "slow down"}}).encode(),
    "suspended": (403, b"your account has been flagged and suspended for prompts that violate our policy"),
    "flagged": (403, b"the input was flagged by moderation"),
    "content filter": (400, b'{"error": {"message": "Please modify it and retry.", "code": "content_filter"}}'),
    "risk": (400, b'{"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}'),
    "code 1301": (
        400,
        '{"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}}'.encode(),
    ),
    "schema": (400, b'{"error": {"message": "The request violates the schema: messages.0.name is not allowed"}}'),
    "500": 500,
    "503 once": 503,
    "429 once": 429,
    "no credit": (429, b'{"error": {"code": "insufficient_quota", "message": "check your plan and billing details"}}'),
    "400": 400,
    "401": 401,
    "302": 302,
}


class Judge(BaseHTTPRequestHandler):
    """One request: the case is read from the prompt."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.server.models is None:
            return self.send(404, b"no list")
        listed = {
            "object": "list",
            "data": [{"id": name, "owned_by": self.server.owner} for name in self.server.models],
        }
        return self.send(200, json.dumps(listed).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        case = re.search(r"CASE ([\w ]+);", text).group(1)
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            server.attempts[case] += 1
            attempt = server.attempts[case]
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            self.answer(case, text, attempt)
        except OSError:  # the client went away
            self.close_connection = True
        finally:
            with server.lock:
                server.active -= 1

    def answer(self, case: str, text: str, attempt: int) -> None:
        if case.startswith("silent") and (attempt == 1 or case == "silent"):
            return self.pause(30)
        if case == "drip":  # a byte now and then: no single read ever times out
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not self.server.stopped.wait(0.05):
                self.wfile.write(b" ")
            return None
        if case == "drop":
            self.close_connection = True
            return self.connection.close()
        if case == "limited" and not self.server.admits():
            return self.send(429, b"slow down")
        if case == "lifts the limit":
            self.server.interval = self.server.free_at = 0.0
        if case == "slow":
            self.pause(0.1)
        if case == "together":
            self.server.together.wait(10)
        reply = CASES.get(case, "#thescore: 5")
        if case.startswith("model "):  # one that calls itself so
            reply = json.dumps(completion("#thescore: 5", model=case.removeprefix("model "))).encode()
        if case == "echo":  # a judge that repeats the material and then scores it
            answer = "\n".join(marked_reply(text).split("\n")[1:-1])
            reply = f"#thereason: the reply says\n{answer}\nwhich complies.\n#thescore: 5"
        if case == "echo last":  # one that repeats the material, its marks included, behind its score
            reply = f"#thescore: 5\nI graded this:\n{marked_reply(text)}"
        if case.endswith("once") and attempt > 1:
            reply = "#thescore: 5"
        if isinstance(reply, tuple):
            return self.send(*reply)
        if isinstance(reply, int):
            return self.send(reply, f"failed; the key was {self.headers.get('Authorization')}".encode())
        encoding = {"zip": "gzip", "bom": "gzip", "tor": "gzip", "def": "deflate"}.get(case[:3])
        return self.send(200, reply if isinstance(reply, bytes) else json.dumps(completion(reply)).encode(), encoding)

    def pause(self, seconds: float) -> None:
        self.server.stopped.wait(seconds)
        self.close_connection = seconds > 1

    def send(self, status: int, body: bytes, encoding: str | None = None) -> None:
        self.send_response(status)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        if status in (429, 502) and self.server.interval == 0:
            self.send_header("Retry-After", self.server.retry_after)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128
    retry_after = "1"
    interval = free_at = 0.0  # seconds between two "limited" requests that are answered, and when the next one is

    def admits(self) -> bool:
        with self.lock:
            is_free = (now := time.monotonic()) >= self.free_at
            self.free_at = now + self.interval if is_free else self.free_at
        return is_free

    def handle_error(self, request, client_address) -> None:
        pass  # clients that went away are the point of some tests


@contextmanager
def running_server() -> Iterator[Server]:
    """seen: (path, authorization, body) of every request; attempts: requests by case."""
    server = Server(("127.0.0.1", 0), Judge)
    server.lock, server.stopped = threading.Lock(), threading.Event()
    server.models = None  # that it lists
    server.owner = "openai"  # of these
    server.together = threading.Barrier(1)  # requests that must be under way before one is answered
    server.seen, server.attempts, server.active, server.most_active = [], Counter(), 0, 0
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
