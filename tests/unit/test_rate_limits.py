"""A server that limits the rate: what it is too busy for is asked again, and is never a missing answer or verdict."""

from __future__ import annotations

import asyncio
import math
import re
import time
from pathlib import Path

import httpx2
import pytest
from endpoint_server import CASES, Server
from test_ask import ask as ask_for_file
from test_ask import rows_of
from test_served_models import ask, model_at

from esi_ds.config import EvalRubric
from esi_ds.errors import UserError
from esi_ds.eval.endpoint import _attempts, _seconds, _Transient, ask_all
from esi_ds.eval.rows import VerdictRow
from esi_ds.stages.evaluate.judging import VERDICT_KEY, judge_all
from esi_ds.stages.evaluate.prepare import PreparedEndpoint
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker


def test_a_limited_rate_loses_no_answer(server: Server, tmp_path: Path) -> None:
    server.interval = 0.02
    rows = ask(model_at(server, concurrency=4, item_timeout=20.0), tmp_path, ["limited"] * 40)
    assert [row["response"] for row in rows] == ["#thescore: 5"] * 40
    assert server.attempts["limited"] > 40 * 2  # more than max_attempts allows of another failure


def test_what_the_server_was_too_busy_for_is_asked_at_the_end_and_by_the_next_start(
    server: Server, tmp_path: Path
) -> None:
    server.interval, server.free_at = 1.0, math.inf
    model = model_at(server, item_timeout=0.3, concurrency=1)
    problem = r"no answer to 1 prompt \(the last: .*HTTP 429.*\); .* a lower concurrency"
    with pytest.raises(UserError, match=problem):
        ask(model, tmp_path, ["one", "limited", "one", "400"])
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3  # between two replies, too
    rows = ask(model, tmp_path, ["one", "limited", "one", "400", "lifts the limit"])
    assert [row["response"] for row in rows if row["index"] in (1, 4)] == ["#thescore: 5"] * 2


def test_a_judge_that_limits_the_rate_leaves_verdicts_to_the_next_start(server: Server, tmp_path: Path) -> None:
    def judged(*cases: str) -> list[VerdictRow]:
        rows = [
            {"model": "m", "set": "s", "index": n, "prompt": f"CASE {c};", "response": "A"} for n, c in enumerate(cases)
        ]
        ledger: Ledger[VerdictRow] = Ledger(tmp_path / "verdicts.jsonl", VERDICT_KEY, VerdictRow)
        endpoint = model_at(server, item_timeout=0.3, concurrency=1).endpoint
        judge = PreparedEndpoint("j", "eval.judges", EvalRubric(kind="rubric", model="m"), endpoint)
        with Tracker(tmp_path, enabled=True, tensorboard=False, stage="eval") as tracker:
            judge_all([judge], rows, ledger, None, {}, tracker)
        return list(ledger.rows.values())

    server.interval, server.free_at = 1.0, math.inf
    assert [row["index"] for row in judged("one", "limited", "five")] == [0, 2]
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"no verdict on 1 answer \(the endpoint's last problem: .*HTTP 429", log)
    assert "manifest.json and start again once it works (with a lower concurrency if it limits the rate)" in log
    server.free_at = 0.0
    assert [row["index"] for row in judged("one", "limited", "five")] == [0, 2, 1]


def test_a_file_of_answers_is_filled_at_the_end_of_the_same_start(server: Server, tmp_path: Path) -> None:
    server.interval, server.free_at = 1.0, math.inf
    options = "--concurrency", "1", "--item-timeout", "1.5"
    assert ask_for_file(server, tmp_path, ["limited", "lifts the limit"], *options) == 0
    assert [row["response"] for row in rows_of(tmp_path)] == ["#thescore: 5"] * 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("6.5", 6.5),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0),
        ("", 0),
        ("-1", 0),
        ("inf", 0),
        ("1e9", 0),
        ("²", 0),
    ],
)
def test_retry_after_may_have_a_fraction(header: str, seconds: float) -> None:
    assert _seconds(header) == seconds


def test_a_limit_that_outlasts_the_question_is_not_waited_for(server: Server, monkeypatch) -> None:
    monkeypatch.setitem(CASES, "tomorrow", (429, b"no more today"))
    monkeypatch.setattr(Server, "retry_after", "86400")
    start = time.monotonic()
    (reply,) = ask_all(model_at(server, item_timeout=60.0).endpoint, ["CASE tomorrow;"])
    assert time.monotonic() - start < 30 and reply.problem == "HTTP 429, 1 attempts" and not reply.asked


def test_a_failure_has_its_attempts_whenever_the_server_wants_to_be_asked_again(server: Server, monkeypatch) -> None:
    monkeypatch.setitem(CASES, "maintenance", (502, b"be patient"))
    monkeypatch.setattr(Server, "retry_after", "86400")
    endpoint = model_at(server, item_timeout=60.0, max_backoff=0.01).endpoint
    (reply,) = ask_all(endpoint, ["CASE maintenance;"])
    assert reply.problem == "HTTP 502, 2 attempts" and reply.asked


def test_a_question_above_the_limit_is_refused_for_itself(server: Server, monkeypatch) -> None:
    """As OpenAI says it, with the status of a limit: asked again, it would be refused at every start."""
    body = b'{"error": {"message": "Request too large for gpt-4o on tokens per min", "code": "rate_limit_exceeded"}}'
    monkeypatch.setitem(CASES, "too many tokens", (429, body))
    replies = ask_all(model_at(server, concurrency=1).endpoint, ["CASE one;", "CASE too many tokens;"])
    assert replies[1].asked and replies[1].is_alive and "Request too large" in str(replies[1].problem)
    assert server.attempts["too many tokens"] == 1


def test_asking_a_busy_server_ends_without_being_cancelled(server: Server) -> None:
    """A cancellation that comes as a reply does may be lost, and no number of attempts would end it."""
    server.interval, server.free_at = 1.0, math.inf
    endpoint = model_at(server, item_timeout=0.3).endpoint

    async def attempts() -> None:
        async with httpx2.AsyncClient() as client:
            await asyncio.wait_for(_attempts(endpoint, client, endpoint.body("CASE limited;"), []), 20)

    with pytest.raises(_Transient, match="HTTP 429"):
        asyncio.run(attempts())


def test_a_server_out_of_reach_has_heard_no_question(server: Server, tmp_path: Path) -> None:
    endpoint = model_at(server).endpoint
    server.shutdown()
    server.server_close()
    (reply,) = ask_all(endpoint, ["CASE one;"])
    assert not reply.asked and reply.num_requests == 2 and "ConnectError" in str(reply.problem)


def test_an_account_without_credit_is_not_a_limit(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answer to 1 prompt .*insufficient_quota"):
        ask(model_at(server, concurrency=1), tmp_path, ["one", "no credit", "one"])
    assert server.attempts["no credit"] == 2  # at once, and at the end


@pytest.mark.parametrize("code", ["503", "429", '"overloaded_error"'])
def test_an_error_sent_as_a_reply_may_say_that_the_server_is_busy(server: Server, monkeypatch, code: str) -> None:
    monkeypatch.setitem(CASES, "busy", f'{{"error": {{"code": {code}, "message": "no"}}}}'.encode())
    (reply,) = ask_all(model_at(server, item_timeout=0.3).endpoint, ["CASE busy;"])
    assert not reply.asked and "which says" in str(reply.problem)
