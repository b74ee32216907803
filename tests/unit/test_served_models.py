"""A model behind an endpoint under evaluation: what is kept, what is missing, and when the run stops instead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import CASES, Server, completion, thinking

from esi_ds.config import EvalRubric, Model, validate
from esi_ds.config.needs import require_eval
from esi_ds.data.prompts import PromptSet, QuestionSet
from esi_ds.data.thoughts import UNFINISHED, final_answer
from esi_ds.errors import UserError
from esi_ds.eval.endpoint import Endpoint, Reply, read_completion
from esi_ds.eval.rows import AnswerRow, VerdictRow
from esi_ds.stages.esi.served import ask_endpoint
from esi_ds.stages.evaluate.judging import VERDICT_KEY, UnjudgedAnswer, VerdictRounds
from esi_ds.stages.evaluate.prepare import PreparedEndpoint
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.questions import unanswered_rows
from esi_ds.stages.served import AnswerRounds, ServedModel
from esi_ds.tracking import Tracker

MODEL = Model(path="y")
LIMITS = {"request_timeout": 0.5, "item_timeout": 3.0, "max_attempts": 2, "concurrency": 2, "backoff": 0.01}


def model_at(server: Server, **limits: Any) -> ServedModel:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return ServedModel("m", "base", Endpoint("m", url, **{**LIMITS, **limits}), "eval.models.0.endpoint", "Be kind.")


def ask(model: ServedModel, folder: Path, cases: list[str]) -> list[AnswerRow]:
    prompts = tuple(f"CASE {case}; {number}" for number, case in enumerate(cases))
    answers: Ledger[AnswerRow] = Ledger(folder / "answers.jsonl", ("model", "set", "index"), AnswerRow)
    tracker = Tracker(folder, enabled=False, tensorboard=False, stage="eval", monitor=[])
    AnswerRounds(model, answers, tracker).ask([QuestionSet("a", "harmful", PromptSet(prompts, "p", "f", ()))])
    return answers.sort(("m", "a", number) for number in range(len(cases)))


def one_case(case: str) -> QuestionSet:
    return QuestionSet("a", "harmful", PromptSet((f"CASE {case};",), "p", "f", ()))


def test_every_prompt_has_a_row_and_is_asked_once(server: Server, tmp_path: Path) -> None:
    rows = ask(model_at(server), tmp_path, ["one", "cut", "silent", "slow", "400", "503 once", "null", "five"])
    assert [row["response"] is None for row in rows] == [False, False, True, False, True, False, True, False]
    assert [row.get("cut", False) for row in rows] == [number == 1 for number in range(8)]
    assert "timeout" in str(rows[2]["excluded"]) and "HTTP 400" in str(rows[4]["excluded"])
    turns = server.seen[0][2]["messages"]
    assert turns[0] == {"role": "system", "content": "Be kind."} and len(turns) == 2
    server.seen.clear()
    assert ask(model_at(server), tmp_path, ["one", "cut", "silent", "slow", "400", "503 once", "null", "five"]) == rows
    assert not server.seen  # what is on disk is not asked again


@pytest.mark.parametrize(
    ("owner", "extra", "sent"),
    [("vllm", {}, 1.0), ("sglang", {}, 1.0), ("vllm", {"repetition_penalty": 1.2}, 1.2), ("openai", {}, None)],
)
def test_a_model_s_own_penalties_are_turned_off(server: Server, tmp_path: Path, owner: str, extra, sent) -> None:
    """vLLM takes them from generation_config.json; OpenAI refuses keys that it does not know."""
    server.models, server.owner = ["m"], owner
    tracker = Tracker(tmp_path, enabled=False, tensorboard=False, stage="eval", monitor=[])
    model = model_at(server, extra=extra)
    AnswerRounds(model, Ledger(tmp_path / "a.jsonl", ("index",), AnswerRow), tracker).ask([one_case("one")])
    assert len(tracker.remarks) == (sent is not None) and all("are switched off" in text for text in tracker.remarks)
    section = EvalRubric(kind="rubric", model="m", template="{prompt} and {response}")
    judge = PreparedEndpoint("j", "eval.judges.0", section, model.endpoint)
    (row,) = unanswered_rows("m", [one_case("five")], 1)
    VerdictRounds(judge, Ledger(tmp_path / "v.jsonl", VERDICT_KEY, VerdictRow), tracker).ask(
        [UnjudgedAnswer(row, "so")]
    )
    assert len(server.seen) == 2
    for _, _, body in server.seen:
        assert body.get("repetition_penalty") == sent and body.get("presence_penalty") == (0 if sent else None)


def test_thoughts_that_a_server_gives_apart(server: Server, tmp_path: Path) -> None:
    """They stand before the answer between marks, as a model's own responses have them; judges have no use for them."""
    cases = ["thinks", "reasons", "thinks of nothing", "thinks too long", "thinks in vain"]
    rows = ask(model_at(server), tmp_path, cases)
    texts = [row["response"] or "" for row in rows]
    assert texts == [
        "<think>\nHm.\n</think>\n\nHello",
        "<think>\nHm < /think>\n</think>\n\nHello",
        "Hello",
        "<think>\nHm",
        "<think>\nHm\n</think>\n\n",
    ]
    assert [final_answer(text) for text in texts] == ["Hello", "Hello", "Hello", None, ""]
    assert [row["excluded"] for row in rows] == [None, None, None, UNFINISHED, None]
    assert [row.get("cut", False) for row in rows] == [False, False, False, True, False]
    assert read_completion(CASES["thinks"]).text == "Hello"
    assert read_completion(CASES["thinks in vain"]).text is None


def test_esi_leaves_out_what_was_cut_within_a_thought_that_the_prompt_opened(server: Server, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, enabled=False, tensorboard=False, stage="esi", monitor=[])
    prompts = [f"CASE {case};" for case in ("cut", "closes a thought", "null")]
    texts, unanswered = ask_endpoint(model_at(server), prompts, tmp_path, tracker)
    assert texts == ["", "Hm.</think>Hello", ""] and unanswered[0] == UNFINISHED and sorted(unanswered) == [0, 2]
    texts, unanswered = ask_endpoint(model_at(server), prompts, tmp_path, tracker)  # from the file, as a restart
    assert texts == ["", "Hm.</think>Hello", ""] and unanswered[0] == UNFINISHED


def test_the_prompts_of_a_control_are_asked_beside_those_of_safety(server: Server, tmp_path: Path) -> None:
    """Each in a file and a set of its own: a restart of one must not take the answers of the other."""
    tracker = Tracker(tmp_path, enabled=False, tensorboard=False, stage="esi", monitor=[])
    for _ in range(2):  # the second time from the files
        assert ask_endpoint(model_at(server), ["CASE null;", "CASE one;"], tmp_path, tracker)[0][0] == ""
        texts, unanswered = ask_endpoint(model_at(server), ["CASE one;"], tmp_path, tracker, control=True)
        assert texts[0] and not unanswered
    rows = {
        name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("answers.jsonl", "control_answers.jsonl")
    }
    sets = {name: {row["set"] for row in lines} for name, lines in rows.items()}
    assert sets == {"answers.jsonl": {"data.prompts"}, "control_answers.jsonl": {"control.prompts"}}
    assert [len(lines) for lines in rows.values()] == [2, 1]


def test_an_endpoint_that_stops_leaves_the_rest_to_a_restart(server: Server, tmp_path: Path) -> None:
    model = model_at(server, give_up_after=3, max_attempts=1, concurrency=1)
    with pytest.raises(UserError, match=r"eval\.models\.0\.endpoint.*no answer to 4 prompts.*HTTP 500.*start again"):
        ask(model, tmp_path, ["one", "500", "500", "500", "five"])
    rows = ask(model, tmp_path, ["one", "one", "one", "one", "five"][:1])
    assert [row["index"] for row in rows] == [0]  # none of the failures is kept as an answer
    rows = ask(
        model, tmp_path, ["one", "400"]
    )  # all that is left: without the earlier answer, a server that refuses all
    assert "HTTP 400" in str(rows[1]["excluded"])


def test_the_parts_of_a_content_are_thought_and_answer(server: Server, tmp_path: Path) -> None:
    whole, unknown = ask(model_at(server), tmp_path, ["parts of Mistral", "parts"])
    assert whole["response"] == "<think>\nHm.\n</think>\n\n#thescore: 5"
    assert unknown["response"] is None and unknown["excluded"] == "the reply has no text"


@pytest.mark.parametrize("reason", ["MAX_TOKENS", "model_length", "something new"])
def test_however_a_server_says_that_it_ended_a_reply_an_empty_one_is_no_answer(reason: str) -> None:
    """An empty answer of the model's own counts as safe."""
    is_length = reason != "something new"

    def read(content: str) -> Reply:
        return read_completion(json.dumps(completion(content, reason)).encode(), keeps_cut=True)

    empty = "the reply was cut before its answer began" if is_length else f"the server ended the reply ({reason})"
    assert (read("").text, read("").problem) == (None, empty)
    assert (read("Sure").text, read("Sure").is_cut) == ("Sure", is_length)
    thought = read_completion(thinking("", "Hm", finish_reason=reason), keeps_cut=True)
    assert (thought.text, thought.is_cut) == ("<think>\nHm", is_length)
    judge = read_completion(json.dumps(completion("#thescore: 1", reason)).encode())
    assert judge.problem == ("the reply was cut off" if is_length else None)


@pytest.mark.parametrize("reason", ["sensitive", "SAFETY", "guardrail_intervened", "refusal"])
def test_half_an_answer_that_a_filter_ended_is_none(reason: str) -> None:
    reply = read_completion(json.dumps(completion("Sure, fi", reason)).encode(), keeps_cut=True)
    assert (reply.text, reply.problem) == (None, f"the server's filter ended the reply ({reason.lower()})")


@pytest.mark.parametrize("reason", ["insufficient_system_resource", "network_error"])
def test_a_reply_that_broke_off_is_asked_for_again(server: Server, tmp_path: Path, monkeypatch, reason: str) -> None:
    monkeypatch.setitem(CASES, "broken once", json.dumps(completion("Sure, fi", reason)).encode())
    (row,) = ask(model_at(server), tmp_path, ["broken once"])
    assert row["response"] == "#thescore: 5"


@pytest.mark.parametrize("case", ["content filter", "risk", "code 1301", "flagged"])
def test_a_server_that_filters_what_it_is_asked_is_alive(server: Server, tmp_path: Path, case: str) -> None:
    rows = ask(model_at(server, give_up_after=3, concurrency=1), tmp_path, [*[case] * 5, "400", "one"])
    assert [row["response"] is None for row in rows] == [True] * 6 + [False]


def test_a_malformed_request_is_not_a_filtered_one(server: Server, tmp_path: Path) -> None:
    """Every question would be refused, and the run would end well with nothing."""
    with pytest.raises(UserError, match="violates the schema.*start again once it works"):
        ask(model_at(server, give_up_after=3, concurrency=1), tmp_path, ["schema"] * 5)


def test_a_late_reply_shows_that_the_others_can_be_asked_after_all(server: Server, tmp_path: Path) -> None:
    """What was passed over while a reply was under way is not left without a reason."""
    rows = ask(model_at(server, give_up_after=2, max_attempts=1), tmp_path, ["slow", "500", "500", *["one"] * 9])
    assert [row["response"] is None for row in rows] == [False, True, True] + [False] * 9


def test_another_model_stops_the_run(server: Server, tmp_path: Path) -> None:
    server.models = ["other"]
    with pytest.raises(UserError, match="is not a model that .* serves: other"):
        ask(model_at(server), tmp_path, ["one"])
    server.models = None
    with pytest.raises(UserError, match=r"eval\.models\.0\.endpoint\.model.*calls itself other"):
        ask(replace(model_at(server)), tmp_path, ["model other"])
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_gateway_may_have_a_name_of_its_own(server: Server, tmp_path: Path) -> None:
    """As Azure's deployments: its list and its replies name what is behind it."""
    server.models = ["other"]
    model = model_at(server, concurrency=1, replies_as="other")
    with pytest.raises(
        UserError, match=r"model = m: .*calls itself third; .* set eval\.models\.0\.endpoint\.replies_as$"
    ):
        ask(model, tmp_path, ["model other", "model third"])
    rows = ask(model, tmp_path, ["model other", "one"])
    assert [row["response"] is None for row in rows] == [False, False]
    assert model.fingerprint == "endpoint:m as other" and model_at(server).fingerprint == "endpoint:m"
    section = require_eval(validate(config(replies_as="other"))).models[0].endpoint
    assert section is not None and ServedModel.of(section, "f", 9, MODEL).endpoint.replies_as == "other"


def test_what_a_server_calls_a_model_is_one_line() -> None:
    """It stands in the log, where a line that begins with "error: " tells Slurm's script that the job failed."""
    assert read_completion(json.dumps(completion("x", model="a\nerror: b")).encode()).model == "a error: b"


@pytest.mark.parametrize("code", ["9" * 5000, "9999", [[]], True, "", "²"], ids=range(6))
def test_a_status_that_is_none_is_not_read(server: Server, tmp_path: Path, monkeypatch, code: Any) -> None:
    monkeypatch.setitem(CASES, "odd", json.dumps({"error": {"code": code, "message": "no"}}).encode())
    rows = ask(model_at(server, concurrency=1), tmp_path, ["one", "odd"])
    assert str(rows[1]["excluded"]).startswith("HTTP 400: ")


def config(**endpoint: Any) -> dict:
    model = {"endpoint": {"base_url": "http://h/v1", "model": "m", **endpoint}}
    return {"run": {"output_dir": "x"}, "model": {"path": "y"}, "eval": {"prompts": {"path": "z"}, "models": [model]}}


def test_the_key_of_another_server_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    section = require_eval(validate(config(concurrency=3))).models[0].endpoint
    assert section is not None
    endpoint = ServedModel.of(section, "f", 99, MODEL).endpoint
    assert (endpoint.key, endpoint.max_tokens, endpoint.concurrency) == (None, 99, 3)
    keyed = section.model_copy(update={"key_variable": "OPENAI_API_KEY"})
    assert ServedModel.of(keyed, "f", 9, MODEL).endpoint.key == "sk-of-another-server"
    assert ServedModel.of(section, "f", 9, MODEL).endpoint.extra == {}
    template = MODEL.model_copy(update={"template_kwargs": {"enable_thinking": False}})
    for extra, sent in ({}, {"enable_thinking": False}), ({"chat_template_kwargs": None}, None):
        told = ServedModel.of(section.model_copy(update={"extra": extra}), "f", 9, template).endpoint
        assert told.extra == {"chat_template_kwargs": sent}
    for update, words in (({"key_variable": "NO_KEY"}, "f.key_variable"), ({"base_url": "h"}, "f.base_url")):
        with pytest.raises(UserError, match=words):
            ServedModel.of(section.model_copy(update=update), "f", 9, MODEL)
    for wrong, words in (
        ({"item_timeout": 900.0}, "endpoint.item_timeout"),
        ({"extra": {"n": 2}}, "endpoint.extra.n"),
        ({"base_url": "h"}, r"endpoint\.base_url = h: is not a URL"),
        ({"base_url": "http://me:secret@h/v1"}, r"endpoint\.base_url = http://h/v1: holds a user"),
    ):
        with pytest.raises(UserError, match=words):
            validate(config(**wrong))


def test_a_judge_whose_server_has_another_model_is_remarked_upon(server: Server, tmp_path: Path) -> None:
    """Once, in log, manifest and report: gateways have names of their own. A restart knows that it has replied."""
    verdicts: Ledger[VerdictRow] = Ledger(tmp_path / "v.jsonl", VERDICT_KEY, VerdictRow)
    tracker = Tracker(tmp_path, enabled=False, tensorboard=False, stage="eval", monitor=[])
    section = EvalRubric(kind="rubric", model="m", template="{prompt} and {response}")
    judge = PreparedEndpoint("j", "eval.judges.0", section, model_at(server).endpoint)
    for cases in (["model m", "model other", "model other"], ["400"]):
        prompts = tuple(f"CASE {case}; {n}" for n, case in enumerate(cases))
        rows = unanswered_rows("m", [QuestionSet(cases[0], "harmful", PromptSet(prompts, "p", "f", ()))], 1)
        VerdictRounds(judge, verdicts, tracker).ask([UnjudgedAnswer(row, "so") for row in rows])
    assert tracker.remarks == ["judge j: other replied, not m"]
    assert [row["score"] for row in verdicts.rows.values()] == [5.0, 5.0, 5.0, None]
    assert "HTTP 400" in str(list(verdicts.rows.values())[-1]["reason"])
