"""Sampled answers: drawn from the softmax that was asked for, and the same whatever stands beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import build_model, byte_bpe_tokenizer, question_set
from endpoint_server import Server
from scipy import stats
from transformers import AutoModelForCausalLM, PreTrainedModel, TopPLogitsWarper

from esi_ds.config import validate
from esi_ds.config.needs import require_tune
from esi_ds.core.batch import left_pad
from esi_ds.core.noise import gumbel, stream
from esi_ds.data.answers import RecordedAnswer, load_answers
from esi_ds.errors import UserError
from esi_ds.eval.endpoint import Endpoint
from esi_ds.eval.rows import ANSWER_KEY, AnswerRow, answer_key
from esi_ds.models.decoding import Sampling, greedy_ids, sampled_ids
from esi_ds.stages.ledger import Ledger
from esi_ds.stages.questions import answer_stream, request_seed, unanswered_rows
from esi_ds.stages.served import AnswerRounds, ServedModel
from esi_ds.tracking import Tracker

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11], [5, 6, 7]]
KEYS = [stream(0, n) for n in range(4)]
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = build_model("llama", tmp_path_factory.mktemp("sampling") / "model", byte_bpe_tokenizer())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def draw(model: PreTrainedModel, numbers: list[int], sampling: Sampling) -> list[list[int]]:
    batch = left_pad([PROMPTS[n] for n in numbers], 0, torch.device("cpu"))
    keys = [KEYS[n] for n in numbers]
    return sampled_ids(model, batch, sampling=sampling, keys=keys, end_ids={3}, pad_id=0, max_new_tokens=NUM_TOKENS)


def written_out(model: PreTrainedModel, number: int, sampling: Sampling) -> list[int]:
    """The oracle: one plain forward pass per token, no cache, no batch and no generate()."""
    ids = list(PROMPTS[number])
    for step in range(NUM_TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float() / sampling.temperature
        order = logits.argsort(descending=True)
        before = logits.softmax(0)[order].cumsum(0) - logits.softmax(0)[order]
        logits[order[before >= sampling.top_p]] = -torch.inf  # what the likelier tokens hold without it
        noise = gumbel(KEYS[number], torch.tensor([step]), len(logits))[0]
        token = int((logits + noise).argmax())
        if token == 3:
            break
        ids.append(token)
    return ids[len(PROMPTS[number]) :]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9), Sampling(3.0, 0.5)])
def test_rows_do_not_depend_on_the_rows_beside_them(model: PreTrainedModel, sampling: Sampling) -> None:
    expected = [written_out(model, number, sampling) for number in range(4)]
    assert draw(model, [0, 1, 2, 3], sampling) == expected
    assert [draw(model, [number], sampling)[0] for number in range(4)] == expected
    assert draw(model, [3, 1], sampling) == [expected[3], expected[1]]
    assert expected[0] != expected[3]  # one prompt, two samples
    batch = left_pad(PROMPTS, 0, torch.device("cpu"))
    assert expected != greedy_ids(model, batch, end_ids={3}, pad_id=0, max_new_tokens=NUM_TOKENS)


def test_tokens_are_drawn_from_the_softmax_that_top_p_leaves(model: PreTrainedModel) -> None:
    """4,000 first tokens: χ² against the exact probabilities, fixed seed."""
    n, sampling = 4000, Sampling(2.0, 0.8)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits = model(ids).logits[:, -1].float()
    probabilities = TopPLogitsWarper(0.8)(ids, logits / 2.0).double().softmax(1)[0].numpy()
    batch = left_pad([PROMPTS[0]] * n, 0, torch.device("cpu"))
    keys = [stream(7, number) for number in range(n)]
    rows = sampled_ids(model, batch, sampling=sampling, keys=keys, end_ids=(), pad_id=0, max_new_tokens=1)
    counts = np.bincount([row[0] for row in rows], minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0 and (probabilities > 0).sum() > 5
    likely = probabilities * n >= 5
    expected = np.append(probabilities[likely], probabilities[~likely].sum()) * n
    observed = np.append(counts[likely], counts[~likely].sum())
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 0.01


def test_every_answer_has_noise_of_its_own() -> None:
    sets = [question_set("a", "x", "x"), question_set("b", "x", "x")]
    rows = unanswered_rows("m", sets, 3)
    assert [answer_key(row)[1:] for row in rows] == [(s, i, n) for s in "ab" for i in range(2) for n in range(3)]
    assert len({answer_stream(seed, row) for row in rows for seed in (0, 1)}) == 24
    assert all(0 <= request_seed(0, row) < 2**31 for row in rows)
    single, other = unanswered_rows("m", sets, 1), unanswered_rows("other", sets, 1)
    assert all("sample" not in row and len(answer_key(row)) == 3 for row in single)  # rows as they always were
    # The first of several answers is the only one of one, and models are compared on the same noise.
    assert answer_stream(0, single[0]) == answer_stream(0, rows[0]) == answer_stream(0, other[0])


def config(**section: Any) -> dict[str, Any]:
    base = {"run": {"output_dir": "x"}, "model": {"path": "y"}}
    return {**base, "eval": {"prompts": {"path": "z"}, **section}}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"samples": 3}, r"eval\.samples.*copies of one greedy answer.*eval\.temperature"),
        ({"top_p": 0.9}, r"eval\.top_p.*greedy.*eval\.temperature"),
        ({"temperature": 1e-4}, r"eval\.temperature.*nearly greedy"),
        ({"temperature": -1.0}, r"eval\.temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, r"eval\.top_p"),
        ({"temperature": 1.0, "samples": 0}, r"eval\.samples"),
    ],
)
def test_samples_without_a_temperature_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(config(**section))


def test_a_request_has_one_owner_of_its_temperature() -> None:
    def served(extra: dict[str, Any], **section: Any) -> dict[str, Any]:
        endpoint = {"base_url": "http://h/v1", "model": "m", "extra": extra}
        return config(models=[{"endpoint": endpoint}], **section)

    for key in ("temperature", "top_p", "seed"):
        with pytest.raises(UserError, match=rf"endpoint\.extra\.{key}.*cannot be set here"):
            validate(served({key: 1}, temperature=0.5))
    validate(served({"seed": None, "top_p": None}, temperature=0.5))
    with pytest.raises(UserError, match=r"endpoint\.extra\.top_p.*eval\.top_p sets it"):
        validate(served({"top_p": None}, temperature=0.5, top_p=0.9))
    with pytest.raises(UserError, match=r"endpoint\.extra\.temperature = 1: .*set eval\.temperature instead"):
        validate(served({"temperature": 1}))
    for greedy in (0, None):  # null: for a server that takes none
        validate(served({"temperature": greedy}))


def test_tuning_answers_greedily_and_says_so() -> None:
    data = {"mask": "m", "data": {"path": "d"}}
    with pytest.raises(UserError, match=r"eval\.temperature.*before and after tuning are greedy"):
        require_tune(validate({**config(temperature=0.7), "tune": data}))
    require_tune(validate({**config(), "tune": data}))


def test_a_served_model_is_asked_for_every_sample_with_its_seed(server: Server, tmp_path: Path) -> None:
    url, sets = f"http://127.0.0.1:{server.server_port}/v1", [question_set("a", "CASE one; 0", "CASE five; 1")]
    answers: Ledger[AnswerRow] = Ledger(tmp_path / "a.jsonl", ("model", "set", "index", "sample"), AnswerRow)
    tracker = Tracker(tmp_path, enabled=False, tensorboard=False, stage="eval", monitor=[])
    sampling = {"temperature": 0.7, "top_p": 1.0}

    def ask(extra: dict[str, Any]) -> list[dict[str, Any]]:
        model = ServedModel("m", "base", Endpoint("m", url, extra=extra), "f", None).sampled(sampling, 5)
        AnswerRounds(model, answers, tracker).ask(sets, 3)
        return [body for _, _, body in server.seen]

    bodies = ask({})
    assert len(bodies) == 6 and len(answers.rows) == 6
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(0.7, 1.0)}
    asked = {(body["messages"][0]["content"], body["seed"]) for body in bodies}
    assert asked == {(row["prompt"], request_seed(5, row)) for row in unanswered_rows("m", sets, 3)}
    assert len(ask({})) == 6  # what is on disk is not asked again
    answers.rows.clear()
    assert all("seed" not in body and "top_p" in body for body in ask({"seed": None})[6:])
    answers.rows.clear()
    assert all("top_p" not in body and "seed" in body for body in ask({"top_p": None})[12:])  # as some APIs want it


def test_a_server_that_samples_answers_of_its_own_accord_is_named(server: Server, tmp_path: Path) -> None:
    def remarks(temperature: float | None) -> str:
        tracker = Tracker(tmp_path, enabled=False, tensorboard=False, stage="eval", monitor=[])
        answers: Ledger[AnswerRow] = Ledger(tmp_path / "a.jsonl", ANSWER_KEY, AnswerRow)
        endpoint = Endpoint("m", f"http://127.0.0.1:{server.server_port}/v1", extra={"temperature": temperature})
        AnswerRounds(ServedModel("theirs", "base", endpoint, "f", None), answers, tracker).ask(
            [question_set("a", "CASE one;")]
        )
        return "; ".join(tracker.remarks)

    assert remarks(0) == ""
    assert "answers of theirs are sampled as its server does" in remarks(None)
    assert "answers of theirs are sampled at temperature 0.9" in remarks(0.9)  # of ESI's


def file_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "a.jsonl")


def test_several_answers_of_a_file_are_matched_by_occurrence(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "response": response} for prompt, response in
            (("Why?", "a"), ("How?", "x"), ("Why?", "b"), ("Why?", "a"), ("Who?", "i"))]  # fmt: skip
    sets = [question_set("s", "How?", "Why?", "Who?")]
    answers = load_answers(file_of(tmp_path, rows), "f", "m", sets, 3).answers
    texts = {key: answer.response for key, answer in answers.items()}
    assert texts == {("s", 0, 0): "x", ("s", 1, 0): "a", ("s", 1, 1): "b", ("s", 1, 2): "a", ("s", 2, 0): "i"}
    with pytest.raises(UserError, match=r"has 3 answers to the prompt .Why.*, not 2.*eval\.samples"):
        load_answers(file_of(tmp_path, rows), "f", "m", sets, 2)
    twice = [question_set("s", "Why?", "Why?")]
    four = [{"prompt": "Why?", "response": text} for text in "abcd"]
    answers = load_answers(file_of(tmp_path, four), "f", "m", twice, 2).answers
    assert [answer.response for answer in answers.values()] == ["a", "b", "c", "d"]
    shared = load_answers(file_of(tmp_path, four), "f", "m", twice, 4).answers
    assert [answer.response for answer in shared.values()] == [*"abcd", *"abcd"]


def test_answers_of_a_sampled_evaluation_keep_their_numbers(tmp_path: Path) -> None:
    rows = [
        {"model": "m", "set": "s", "index": 0, "sample": n, "prompt": "Why?", "response": str(n), "excluded": None}
        for n in (2, 0, 1)
    ]
    answers = load_answers(file_of(tmp_path, rows), "f", "m", [question_set("s", "Why?")], 3).answers
    assert answers == {("s", 0, n): RecordedAnswer(str(n), None) for n in range(3)}
