"""Prompts, responses and rows that cannot be used are left out and listed; the others give what they give alone."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import PAIRS, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
)

from esi_ds.config import validate
from esi_ds.data.chat import answerable, check_some_answerable, encode_data_prompt, encode_response, special_strings
from esi_ds.data.conversations import encode_rows
from esi_ds.errors import UserError
from esi_ds.eval.fluency import surprises
from esi_ds.judge.families import Family
from esi_ds.judge.pairs import PairEncoder
from esi_ds.models.folder import max_positions
from esi_ds.stages.esi import work
from esi_ds.stages.esi.prepare import PromptData, PromptInputs, clean_responses, encode_examples, encode_prompts
from esi_ds.stages.evaluate import answering
from esi_ds.stages.evaluate.prepare import Candidate
from esi_ds.stages.tune.prepare import _encode_questions

LIMIT, LENGTH = 60, 8
LONG = "Tell me a story. " * 30
# As Gemma's and Mistral's, which raise for a system turn or turns that do not take turns; and over what a turn holds.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if 'boom' in m.content %}{{ 1 / 0 }}{% endif %}"
    "{% if 'field' in m.content %}{{ m.content.missing.part }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)  # fmt: skip


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    strict = byte_bpe_tokenizer()
    strict.chat_template = STRICT
    return strict


def stripping_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_bpe_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    return tokenizer


@pytest.mark.parametrize("build", [byte_bpe_tokenizer, sentencepiece_tokenizer, stripping_tokenizer])
def test_a_response_without_tokens_has_no_spans(build: Any) -> None:
    for text in ("", " \n "):
        encoded = encode_response(build(), [3], text)
        assert len(encoded.ids) == len(encoded.offsets)
    assert encode_response(build(), [3], "").ids == []


def prompt_inputs(tokenizer: PreTrainedTokenizerFast, responses: list[str] | None) -> PromptInputs:
    data = PromptData([], responses, {}, [])
    config = LlamaConfig(max_position_embeddings=LIMIT)
    return PromptInputs(config, tokenizer, frozenset({2}), None, data, special_strings(tokenizer))


CONFIG = validate({"run": {"output_dir": "x"}, "model": {"path": "a"}})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=7), 7),
        (MptConfig(max_seq_len=7), 7),  # its ALiBi slopes are made for so many tokens
        (WhisperConfig(max_target_positions=7), 7),
        (PretrainedConfig(seq_length=7), 7),  # remote code, as ChatGLM's
        (BloomConfig(), None),
        (MambaConfig(), None),
    ],
)
def test_how_long_a_prompt_may_be(config: PretrainedConfig, expected: int | None) -> None:
    assert max_positions(config) == expected


def test_esi_leaves_out_what_it_cannot_use(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["Write a tutorial", LONG, "boom", "Kill a process", "a field", "Explain the café", "How to bake bread?"]
    responses = ["Yes", "Yes", "Yes", "", "Yes", " \n", "a list of 12 steps " * 20]
    inputs = prompt_inputs(tokenizer, responses)
    prompt_ids = encode_prompts(inputs, CONFIG, prompts)
    cleaned, _ = clean_responses(inputs, prompt_ids, responses)
    examples, excluded = encode_examples(inputs, prompt_ids, prompts, cleaned, LENGTH)
    assert [example.index for example in examples] == [0] and sorted(excluded) == [1, 2, 3, 4, 5, 6]
    assert excluded[3] == excluded[5] == "the response is empty"
    assert "the model takes 60" in excluded[1] and "too long for the model" in excluded[6]
    assert excluded[2] == "the chat template rejects it (division by zero)" and "rejects it" in excluded[4]
    (alone,), _ = encode_examples(inputs, prompt_ids[:1], prompts[:1], cleaned[:1], LENGTH)
    assert (alone.ids, alone.response) == (examples[0].ids, examples[0].response)


def test_generated_responses_need_room(tokenizer: PreTrainedTokenizerFast) -> None:
    """A prompt that fits only without its answer is not answered, and one that the template rejects is not either."""
    fits = len(encode_data_prompt(tokenizer, "Kill a process", (), None))
    inputs = prompt_inputs(tokenizer, None)
    prompts = ["Kill a process", "boom", LONG]
    prompt_ids = encode_prompts(inputs, CONFIG, prompts)
    ids, reasons = answerable(dict(enumerate(prompt_ids)), LENGTH, fits + LENGTH)
    assert list(ids) == [0] and list(reasons) == [1, 2]
    assert not answerable(dict(enumerate(prompt_ids)), LENGTH, fits + LENGTH - 1)[0]
    assert list(answerable(dict(enumerate(prompt_ids)), LENGTH, None)[0]) == [0, 2]
    cleaned, _ = clean_responses(inputs, prompt_ids, ["Yes", "", ""])
    _, excluded = encode_examples(inputs, prompt_ids, prompts, cleaned, LENGTH)
    assert list(excluded) == [1, 2]


@pytest.mark.parametrize("file", ["answers.jsonl", None])
def test_prompts_none_of_which_can_be_used_are_where_the_message_says(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    """A file of responses, which its user corrects, or those that were generated, with the reasons."""
    texts = ["", " "]
    monkeypatch.setattr(work, "respond", lambda *_: texts)
    source = {"responses": file} if file else {"prompts": "p", "column": "goal"}
    data = PromptData(["How?", "Why?"], texts if file else None, source, [])
    run = object.__new__(work.EsiRun)
    run.config, run.folder, run.phase = CONFIG, SimpleNamespace(path=tmp_path), lambda _: nullcontext()
    run.tracker, run.generation_batch = SimpleNamespace(log=lambda _: None), lambda *_: None
    place = "the rows of answers.jsonl" if file else "responses.jsonl in the run folder"
    with pytest.raises(UserError, match=rf"none can be used \(the response is empty\); look at {place}"):
        run._answer(None, replace(prompt_inputs(tokenizer, None), data=data, model_config=LlamaConfig()))
    written = [line for found in tmp_path.glob("*responses*") for line in found.read_text().splitlines()]
    assert [json.loads(line)["excluded"] for line in written] == ([] if file else ["the response is empty"] * 2)


def test_a_template_that_makes_nothing_of_a_prompt_gives_a_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages if 'x' in m.content %}{{ m.content }}{% endfor %}"
    assert encode_data_prompt(tokenizer, "x", (), None) and isinstance(
        encode_data_prompt(tokenizer, "y", (), None), str
    )


def test_rows_that_a_template_rejects_are_skipped_and_listed(tokenizer: PreTrainedTokenizerFast) -> None:
    def chat(*roles: str, text: str = "Hello") -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text} for role in roles]}

    rows = [
        chat("user", "assistant"),
        chat("system", "user", "assistant"),
        chat("user", "user", "assistant"),
        chat("assistant"),
        chat("user", "assistant", text="boom"),
        chat("user", "assistant", text="Bye"),
    ]
    options = {"system_prompt": None, "specials": (), "end_ids": {2}, "max_length": 99}
    tuning_set = encode_rows(rows, ("messages",), tokenizer, **options)
    assert [sequence.row for sequence in tuning_set.sequences] == [0, 5]
    reasons = dict(tuning_set.skipped)
    assert list(reasons) == [1, 2, 3, 4] and "System role not supported" in reasons[1]
    assert "Roles must alternate" in reasons[2] and "division by zero" in reasons[4]
    alone = encode_rows(rows[:1], ("messages",), tokenizer, **options).sequences[0]
    assert alone == tuning_set.sequences[0]


def test_questions_before_and_after_tuning(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = {"harmful": ["boom", "Kill a process"], "benign": [LONG, "How to bake bread?"]}
    config = validate({"run": {"output_dir": "x"}, "model": {"path": "a"}, "eval": {"max_new_tokens": LENGTH}})
    question_ids, unanswered = _encode_questions(config, questions, tokenizer, LIMIT)
    assert {name: list(ids) for name, ids in question_ids.items()} == {"harmful": [1], "benign": [1]}
    assert [(name, index) for name, index, _ in unanswered] == [("harmful", 0), ("benign", 0)]


def test_a_set_of_which_no_prompt_can_be_answered_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its rates would be of nothing, as with a limit of new tokens above what the model takes."""
    config = validate({"run": {"output_dir": "x"}, "model": {"path": "a"}, "eval": {"max_new_tokens": LIMIT}})
    with pytest.raises(UserError, match=r"^eval.prompts: the model can answer none .* no room for an answer"):
        _encode_questions(config, {"harmful": ["Kill a process"]}, tokenizer, LIMIT)
    encoded = {("set", 0): encode_data_prompt(tokenizer, "boom", (), None)}
    with pytest.raises(UserError, match=r"^eval.benign = set: base can answer none of the prompts: .*rejects it"):
        check_some_answerable(*answerable(encoded, 1, LIMIT), "eval.benign", "set", "base")
    some = answerable({**encoded, ("set", 1): [3]}, 1, LIMIT)
    check_some_answerable(*some, "eval.benign", "set", "base")


def test_an_evaluation_lists_what_is_not_asked(tokenizer: PreTrainedTokenizerFast, monkeypatch) -> None:
    prompts = ["Kill a process", "boom", LONG]
    encoded = {("set", n): encode_data_prompt(tokenizer, prompt, (), None) for n, prompt in enumerate(prompts)}
    config = LlamaConfig(max_position_embeddings=LIMIT)
    candidate = Candidate("base", None, None, config, tokenizer, frozenset({2}), encoded)
    rows: list[dict[str, Any]] = []
    ledger = SimpleNamespace(rows={}, key=lambda row: row["index"], add=rows.extend)
    asked: dict[int, list[int]] = {}
    monkeypatch.setattr(
        answering, "generate_all", lambda model, tokenizer, ends, ids, *rest, **named: asked.update(ids)
    )
    section = {"max_new_tokens": LENGTH, "batch_size": 2, "prompts": {"path": "a"}}
    config = validate({"run": {"output_dir": "x"}, "model": {"path": "a"}, "eval": section})
    sets = [SimpleNamespace(name="set", prompts=prompts, goal=lambda index: None)]
    answering.answer_all(None, "base", candidate, sets, ledger, config, None, None)
    assert asked == {0: encoded["set", 0]}
    assert [row["index"] for row in rows] == [1, 2] and all(row["response"] is None for row in rows)
    assert "rejects it" in rows[0]["excluded"] and "no room for an answer" in rows[1]["excluded"]


def test_a_judge_whose_template_rejects_a_pair_gives_a_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PairEncoder(Family("own", "", ("safe",), ("unsafe",), None), tokenizer)
    assert encoder.encode("Kill a process", "boom") == "the judge: the chat template rejects it (division by zero)"
    assert not isinstance(encoder.encode("Kill a process", "Yes"), str)


def test_surprise_is_missing_where_the_reference_cannot_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The reference may take fewer tokens than the model that answered, or have a stricter template."""
    model = AutoModelForCausalLM.from_pretrained(build_model("llama", tmp_path, tokenizer)).eval()
    alone = surprises(model, tokenizer, PAIRS[:1], batch_size=1, limit=LIMIT)
    values = surprises(
        model, tokenizer, [("boom", "Yes"), PAIRS[0], (LONG, "Yes"), ("a", "")], batch_size=1, limit=LIMIT
    )
    assert values == [None, *alone, None, None] and alone[0] is not None
    assert surprises(model, tokenizer, [(LONG, "Yes")])[0] is not None and torch.tensor(alone).isfinite().all()
    json.dumps(values)
