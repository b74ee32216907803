"""A file of answers from an endpoint: slow, failing and truncating servers, another model, and going on."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, num_lines
from endpoint_server import CASES, Server, running_server

from esi_ds.ask import _only_one, main
from esi_ds.data.answers import load_answers
from esi_ds.data.goals import recorded_goals
from esi_ds.data.prompts import PromptSet, QuestionSet, load_responses
from esi_ds.eval import endpoint
from esi_ds.eval.asking import is_same_model, messages_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "random", SimpleNamespace(uniform=lambda low, high: 0.05))  # short pauses
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    with running_server() as server:
        yield server


def words_for(server: Server, folder: Path, cases: list[str], *options: str) -> list[str]:
    prompts = [f"CASE {case}; {number}" for number, case in enumerate(cases)]
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    limits = ["--request-timeout", "1", "--item-timeout", "4", "--max-attempts", "2"]
    words = [
        "--base-url",
        url,
        "--model",
        "m",
        "--prompts",
        str(folder / "p.jsonl"),
        "--output",
        str(folder / "o.jsonl"),
    ]
    return [*words, *limits, *options]


def ask(server: Server, folder: Path, cases: list[str], *options: str) -> int:
    return main(words_for(server, folder, cases, *options))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]


def test_answers_are_written_in_order_and_cut_ones_are_marked(server: Server, tmp_path: Path, capsys) -> None:
    cases = ["slow", "cut", "400", "503 once", "null", "one"]
    assert ask(server, tmp_path, ["400"]) == 2  # nothing tells a bad question from a bad model or key
    assert not (tmp_path / "o.jsonl").read_text()
    assert ask(server, tmp_path, ["one"]) == 0  # it has replied before: a 400 is the question's fault
    assert ask(server, tmp_path, ["one", "400"]) == 0
    (tmp_path / "o.jsonl").unlink()
    assert ask(server, tmp_path, ["one"]) == 0
    assert ask(server, tmp_path, ["one", *cases], "--concurrency", "3") == 0
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == [f"CASE {case}; {n}" for n, case in enumerate(["one", *cases])]
    assert [row["cut"] for row in rows] == [False, False, True, False, False, False, False]
    assert [row["response"] is None for row in rows] == [False, False, False, True, False, True, False]
    assert "HTTP 400" in rows[3]["excluded"] and "no text" in rows[5]["excluded"]
    assert "1 cut at 256 tokens, 2 without a response" in capsys.readouterr().out
    assert all(authorization is None for _, authorization, _ in server.seen)  # no key unless one is named
    assert {body["temperature"] for _, _, body in server.seen} == {0}
    # The file is what an evaluation and ESI read.
    question_set = QuestionSet("a", "harmful", PromptSet(tuple(row["prompt"] for row in rows), "prompt", "f", ()))
    answers = load_answers(str(tmp_path / "o.jsonl"), "f", "m", [question_set]).answers
    assert [answers["a", n].response for n in range(7)] == [row["response"] for row in rows]
    assert answers["a", 2].is_cut and answers["a", 3].excluded == rows[3]["excluded"]
    assert len(load_responses(str(tmp_path / "o.jsonl"))) == 7


def test_penalties_that_are_switched_off_are_told(server: Server, tmp_path: Path, capsys) -> None:
    server.models, server.owner = ["m"], "vllm"
    assert ask(server, tmp_path, ["one"]) == 0
    assert capsys.readouterr().out.count("are switched off") == 1 and server.seen[-1][2]["repetition_penalty"] == 1


def test_what_is_there_is_not_asked_again(server: Server, tmp_path: Path, capsys) -> None:
    assert ask(server, tmp_path, ["one", "silent", "five"]) == 2
    shown = capsys.readouterr()
    assert "2 of 3 answers" in shown.out and "no answer to 1 question " in shown.err and "start again" in shown.err
    before = [row["prompt"] for row in rows_of(tmp_path)]
    with (tmp_path / "o.jsonl").open("a") as opened:
        opened.write('{"prompt": "torn')  # by a kill
    server.seen.clear()
    assert ask(server, tmp_path, ["one", "one", "five"]) == 0
    assert [body["messages"][-1]["content"] for _, _, body in server.seen] == ["CASE one; 1"]
    assert set(before) < {row["prompt"] for row in rows_of(tmp_path)} and len(rows_of(tmp_path)) == 3
    whole = (tmp_path / "o.jsonl").read_bytes()
    for option in (["--max-tokens", "9"], ["--system-prompt", "Be kind."]):
        assert ask(server, tmp_path, ["one", "one", "five", "two"], *option) == 2
        assert "give a new file" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_bytes() == whole and len(server.seen) == 1


def test_a_file_system_without_locks_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with _only_one(tmp_path / "o.jsonl"):
        pass


def test_a_killed_start_keeps_its_answers_and_a_second_one_is_refused(server: Server, tmp_path: Path, capsys) -> None:
    words = words_for(server, tmp_path, ["slow"] * 12, "--concurrency", "1")
    process = subprocess.Popen([sys.executable, "-m", "esi_ds.ask", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while num_lines(tmp_path / "o.jsonl") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert main(words) == 2
    assert "is being filled by another process" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = rows_of(tmp_path)
    assert len(kept) < 12
    server.seen.clear()
    assert main(words) == 0
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == [f"CASE slow; {number}" for number in range(12)]
    assert rows[: len(kept)] == kept
    asked = [body["messages"][-1]["content"] for _, _, body in server.seen]
    assert asked == [row["prompt"] for row in rows[len(kept) :]]


def test_sampled_answers_and_further_keys_of_the_request(server: Server, tmp_path: Path, capsys) -> None:
    sampled = ["--temperature", "0.7", "--extra", '{"top_p": 0.9, "seed": 3}']
    assert ask(server, tmp_path, ["one"], *sampled) == 0
    (row,) = rows_of(tmp_path)
    assert row["asked"]["extra"] == {"top_p": 0.9, "seed": 3, "temperature": 0.7}
    body = server.seen[0][2]
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.7, 0.9, 3)
    assert ask(server, tmp_path, ["one", "one"]) == 2  # greedy answers do not go into a file of sampled ones
    assert "give a new file" in capsys.readouterr().err and rows_of(tmp_path) == [row]
    assert ask(server, tmp_path, ["one", "five"], *sampled) == 0 and len(server.seen) == 2
    (tmp_path / "o.jsonl").unlink()
    assert ask(server, tmp_path, ["one"], "--extra", '{"max_tokens": null, "max_completion_tokens": 9}') == 0
    assert "max_tokens" not in server.seen[-1][2] and server.seen[-1][2]["max_completion_tokens"] == 9


def test_several_answers_to_a_prompt(server: Server, tmp_path: Path) -> None:
    sampled = ["--temperature", "0.7", "--seed", "5"]
    assert ask(server, tmp_path, ["one", "five"], *sampled, "--samples", "2", "--concurrency", "1") == 0
    seeds = [body["seed"] for _, _, body in server.seen]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    rows = rows_of(tmp_path)
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (f"CASE {case}; {number}", sample) for number, case in enumerate(["one", "five"]) for sample in range(2)
    ]
    # An evaluation of as many samples reads them.
    question_set = QuestionSet("a", "harmful", PromptSet(tuple(row["prompt"] for row in rows[::2]), "prompt", "f", ()))
    answers = load_answers(str(tmp_path / "o.jsonl"), "f", "m", [question_set], 2).answers
    assert [answers["a", n, sample].response for n in range(2) for sample in range(2)] == [r["response"] for r in rows]
    # More samples later: the others stay, and a prompt's seed is not that of its place.
    server.seen.clear()
    assert ask(server, tmp_path, ["one", "five"], *sampled, "--samples", "3", "--limit", "1") == 0
    assert [row for row in rows_of(tmp_path) if row["sample"] < 2] == rows and len(server.seen) == 1
    (tmp_path / "o.jsonl").unlink()
    assert ask(server, tmp_path, ["one"], *sampled) == 0
    assert [body["seed"] for _, _, body in server.seen][1:] == seeds[:1] and "sample" not in rows_of(tmp_path)[0]


def test_what_the_server_says_itself_is_no_answer_of_the_model(server: Server, tmp_path: Path) -> None:
    cases = ["one", "filtered", "filtered late", "aborted once", "error once", "error", "refuses apart", "flagged"]
    cases.append("rate limited once")
    assert ask(server, tmp_path, cases, "--concurrency", "1") == 0
    rows = {case: (row["response"], row["excluded"]) for case, row in zip(cases, rows_of(tmp_path), strict=True)}
    for case in ("filtered", "filtered late"):
        assert rows[case] == (None, "the server's filter ended the reply (content_filter)")
    for case in ("aborted once", "error once", "rate limited once"):  # asked again
        assert rows[case] == ("#thescore: 5", None)
    assert rows["error"][0] is None and "what is this" in rows["error"][1]
    assert rows["refuses apart"] == ("I can't.", None)
    assert rows["flagged"][0] is None and "flagged by moderation" in rows["flagged"][1]
    (tmp_path / "o.jsonl").unlink()
    assert ask(server, tmp_path, ["one", "suspended"], "--concurrency", "1") == 2  # the asker: to be asked anew
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize(
    ("key", "said", "kept"),
    [
        ("sk-proj-abcdefghijk", "Keep a risk-profile", "Keep a risk-profile"),
        ("ollama", "tools in ollama", "tools in ollama"),
        ("sk-proj-abcdefghijk", "it is sk-proj-abcdefghijk", "it is ***"),
    ],
)
def test_an_answer_is_changed_for_the_whole_key_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, said: str, kept: str
) -> None:
    monkeypatch.setitem(CASES, "says", said)
    monkeypatch.setenv("ITS_KEY", key)
    assert ask(server, tmp_path, ["says"], "--key-variable", "ITS_KEY") == 0
    assert rows_of(tmp_path)[0]["response"] == kept


@pytest.mark.parametrize("content", ["How do I bake?\nAnd how long?\n", "prompt\nHow do I bake?", "one line"])
def test_a_file_that_holds_something_else_is_left_alone(server: Server, tmp_path: Path, content: str, capsys) -> None:
    (tmp_path / "o.jsonl").write_text(content)
    assert ask(server, tmp_path, ["one"]) == 2
    assert f"error: --output = {tmp_path / 'o.jsonl'}" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_text() == content and not server.seen
    assert ask(server, tmp_path, ["one"], "--output", str(tmp_path / "p.jsonl")) == 2
    assert "is the file of --prompts" in capsys.readouterr().err


def test_goals_of_attacks_are_kept(server: Server, tmp_path: Path) -> None:
    rows = [{"prompt": "CASE one; a", "aim": "A"}, {"prompt": "CASE one; a", "aim": "B"}]
    (tmp_path / "attacks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ask(server, tmp_path, [], "--prompts", str(tmp_path / "attacks.jsonl"), "--goal", "aim") == 0
    assert [row["goal"] for row in rows_of(tmp_path)] == ["A", "B"]
    file = str(tmp_path / "o.jsonl")
    assert recorded_goals(load_responses(file)) == ["A", "B"]  # as ESI reads them


def test_an_endpoint_that_is_down_is_given_up(server: Server, tmp_path: Path, capsys) -> None:
    assert ask(server, tmp_path, ["500"] * 30, "--max-attempts", "1", "--concurrency", "4") == 2
    assert "no answer to 30 questions (the last: HTTP 500" in capsys.readouterr().err
    assert len(server.seen) < 30


def test_another_model_is_refused(server: Server, tmp_path: Path, capsys) -> None:
    server.models = ["a", "b"]
    assert ask(server, tmp_path, ["one"]) == 2
    assert "--model = m" in (shown := capsys.readouterr().err) and "serves: a, b" in shown and not server.seen
    server.models = ["m"]
    assert ask(server, tmp_path, ["model m", "model other"], "--concurrency", "1") == 2
    assert "calls itself other" in (shown := capsys.readouterr().err) and "set --replies-as" in shown
    assert [row["response"] for row in rows_of(tmp_path)] == ["#thescore: 5"]  # the named model's own
    assert is_same_model("gpt-4o", "gpt-4o-2024-08-06") and is_same_model("gpt-4", "gpt-4-0613")
    assert not is_same_model("llama-3", "llama-3-8b") and not is_same_model("gpt-4o", "gpt-4o-mini")


def test_a_model_that_replies_as_another(server: Server, tmp_path: Path, capsys) -> None:
    assert ask(server, tmp_path, ["model other"], "--replies-as", "other") == 0
    (row,) = rows_of(tmp_path)
    assert row["response"] == "#thescore: 5" and row["asked"]["replies_as"] == "other"
    assert ask(server, tmp_path, ["model other", "model m"]) == 2  # the file's answers are another model's
    assert "give a new file" in capsys.readouterr().err


def test_mistakes_are_named(server: Server, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    for options, word in (
        (["--limit", "0"], "--limit"),
        (["--concurrency", "0"], "--concurrency"),
        (["--base-url", "localhost"], "--base-url"),
        (["--key-variable", "NO_KEY"], "--key-variable"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "1", "--extra", '{"temperature": 0}'], "--extra.temperature"),
        (["--samples", "0"], "--samples"),
        (["--samples", "2"], "--samples"),
        (["--temperature", "1", "--samples", "2", "--extra", '{"seed": 1}'], "--extra.seed"),
        (["--seed", "1", "--extra", '{"seed": null}'], "--extra.seed"),
        (["--goal", "gaol"], "error: --goal = gaol"),
        (["--column", "none"], "error: --column = none"),
        (["--prompts", str(tmp_path / "no.jsonl")], "error: --prompts = "),
        (["--request-timeout", "inf"], "--request-timeout = inf: is too long; give at most 100,000,000 seconds"),
        (["--item-timeout", "nan"], "--item-timeout"),
        (["--extra", "top_p=1"], "--extra"),
        (["--extra", "[1]"], "--extra"),
        (["--extra", '{"n": 2}'], "--extra.n"),
        (["--output", str(tmp_path / "p.jsonl" / "o.jsonl")], "--output"),
        (["--output", str(tmp_path)], "--output"),
        (["--base-url", "http://127.0.0.1:9/v1"], "error: --base-url = http://127.0.0.1:9/v1: cannot be reached"),
    ):
        assert ask(server, tmp_path, ["one"], *options) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists() and not server.seen
    assert ask(server, tmp_path, ["one"], "--key-variable", "OPENAI_API_KEY") == 0
    assert server.seen[0][1] == "Bearer sk-of-another-server"


def test_turns_are_sent_as_they_are() -> None:
    chat = [{"role": "system", "content": "A"}, {"role": "user", "content": "B<|im_end|>"}]
    assert messages_of(chat, "S") == [chat[0], {"role": "user", "content": "B< |im_end|>"}]
    assert messages_of("B", "S") == [{"role": "system", "content": "S"}, {"role": "user", "content": "B"}]
