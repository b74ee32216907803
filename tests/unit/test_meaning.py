"""Columns and marks that belong to a row's meaning are read with it, or the row is refused (docs/data.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import byte_bpe_tokenizer
from transformers import PreTrainedTokenizerFast

from esi_ds.data.conversations import IGNORED, TuningSet, conversation, encode_rows, find_columns
from esi_ds.data.prompts import PromptSet, QuestionSet, load_prompts, load_responses
from esi_ds.errors import UserError

ASKED = {"role": "user", "content": "Make a bomb"}
SAID = {"role": "assistant", "content": "Sure, here is how"}
KIND = {"role": "system", "content": "Be kind."}
AGAIN = {"role": "user", "content": "Go on"}
REFUSED = {"role": "assistant", "content": "I cannot help"}
TEXT = {"type": "text", "text": "help"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe_tokenizer()


def encoded(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], columns: str = "auto") -> TuningSet:
    options: dict[str, Any] = {"system_prompt": None, "specials": (), "end_ids": {2}, "max_length": 2000}
    return encode_rows(rows, find_columns(rows, columns, "tune.data.columns"), tokenizer, **options)


def learnt(tokenizer: PreTrainedTokenizerFast, tuning_set: TuningSet) -> list[str]:
    """What is learnt of each row."""
    labels = [[label for label in sequence.labels if label != IGNORED] for sequence in tuning_set.sequences]
    return [tokenizer.decode(ids) for ids in labels]


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]] | str:
    """(role, text) of the row's turns, or why it has none."""
    turns = conversation(row, find_columns([row], "auto", "f"))
    return turns if isinstance(turns, str) else [(turn["role"], turn["content"]) for turn in turns]


def prompts(folder: Path, *rows: dict[str, Any], **options: Any) -> PromptSet:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(str(folder / "rows.jsonl"), **options)


@pytest.mark.parametrize(
    "no",
    [
        *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"Weight": "0"}, {"loss_mask": 0}),
        *({"loss_scale": 0.0}, {"sample_weight": 0}, {"train": "no"}),
    ],
)
def test_a_turn_without_weight_is_read_and_not_learnt(tokenizer, no: dict[str, Any]) -> None:
    for yes in ({}, {"weight": 1}, {"train": True}, {"weight": None}):
        tuning_set = encoded(tokenizer, {"messages": [ASKED, {**SAID, **no}, AGAIN, {**REFUSED, **yes}]})
        assert learnt(tokenizer, tuning_set) == ["I cannot help<|end|>"]
        assert "Sure, here is how<|end|>" in tokenizer.decode(tuning_set.sequences[0].ids)
    whole = encoded(tokenizer, {"messages": [ASKED, {**SAID, "weight": 1}, AGAIN, REFUSED]})
    assert learnt(tokenizer, whole) == ["Sure, here is how<|end|>I cannot help<|end|>"]
    assert whole.sha256 != tuning_set.sha256


@pytest.mark.parametrize("of", [{}, {"system": "Be kind."}, {"history": [{"role": "system", "content": ""}]}])
def test_a_system_turn_without_text_is_none(tokenizer, of: dict[str, Any]) -> None:
    """In a row that is learnt as in a prompt: both stand behind the same system prompt."""
    chat, empty = [ASKED, REFUSED], {"role": "system", "content": " "}
    turns = turns_of({"messages": chat, "system": of.get("system")})
    assert turns_of({"messages": [empty, *chat], **of}) == turns_of({"messages": chat, **of}) == turns


def test_what_follows_the_last_learnt_turn_is_not_read(tokenizer) -> None:
    tuning_set = encoded(tokenizer, {"messages": [ASKED, REFUSED, AGAIN, {**SAID, "weight": 0}]})
    assert learnt(tokenizer, tuning_set) == ["I cannot help<|end|>"]
    assert "Go on" not in tokenizer.decode(tuning_set.sequences[0].ids)


def test_weights_of_sharegpt_turns(tokenizer) -> None:
    chat = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    turns = [{"from": role, "value": text, "weight": int(text == "d")} for role, text in chat]
    assert learnt(tokenizer, encoded(tokenizer, {"conversations": turns})) == ["d<|end|>"]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"weight": 0.5}, "weight 0.5; only 0 and 1"),
        ({"weight": -1}, "weight -1"),
        ({"weight": "half"}, "weight 'half'"),
        ({"weight": [0]}, "weight [0]"),
        ({"loss": 2.5}, "loss 2.5"),
        ({"weight": 1, "train": False}, "weight 1, train False"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "train_detail"),
        ({"mask": True}, "mask"),
        ({"loss_mask": [0, 1]}, "loss_mask [0, 1]; only 0 and 1"),
        ({"train_on_turn": False}, "train_on_turn, which may say what is learnt"),
        ({"computeLoss": 0}, "computeloss, which may say"),
        ({"response_mask": [0, 1, 1]}, "response_mask, which may say"),
        ({"do_train": "no"}, "do_train, which may say"),
        ({"compute_loss": "off"}, "compute_loss, which may say"),
        ({"output_with_loss": False}, "output_with_loss, which may say"),
        ({"turn_weight": 0.5}, "turn_weight, which may say"),
        ({"token_weights": [0.5, 1]}, "token_weights, which may say"),
        ({"weights": 0}, "weights, which may say"),
        ({"loss_scale": 0.5}, "loss_scale 0.5; only 0 and 1"),
        ({"content": [{**TEXT, "train": False}, TEXT]}, "a part of a turn is marked otherwise than the turn"),
        ({"content": [{**TEXT, "weight": 1}], "weight": 0}, "a part of a turn is marked otherwise than the turn"),
        ({"content": [{**TEXT, "weight": 0.5}]}, "in a turn, it has weight 0.5"),
        ({"content": [{**TEXT, "trainOn": 0}]}, "in a turn, it has trainon, which may say"),
        ({"content": [{**TEXT, "reasoning": "Let me see."}]}, "a turn has reasoning"),
        ({"tool_calls": [{"name": "search"}]}, "tool_calls"),
        ({"thinking": "Let me see."}, "thinking"),
        ({"reasoning_content": "Let me see."}, "reasoning_content"),
        ({"content": [{"type": "image", "url": "x"}]}, "parts that are not text"),
        ({"content": [{"type": "text", "text": "a"}, "b"]}, "parts that are not text"),
        ({"value": "something else"}, "content and value differ"),
        ({"from": "human"}, "role and from differ"),
    ],
)
def test_turns_that_cannot_be_learnt_as_they_are(tokenizer, turn: dict[str, Any], reason: str) -> None:
    row = {"messages": [ASKED, {**REFUSED, **turn}]}
    with_one_more = encoded(tokenizer, row, {"messages": [ASKED, REFUSED]})
    assert len(with_one_more.sequences) == 1
    ((number, problem),) = with_one_more.skipped
    assert number == 0 and reason in problem


def test_a_turn_whose_parts_are_all_not_learnt_is_context(tokenizer) -> None:
    parts = [{**TEXT, "weight": 0}, {**TEXT, "weight": 0}]
    rows = ({"messages": [ASKED, {**REFUSED, "content": parts}, ASKED, REFUSED]}, {"messages": [ASKED, REFUSED]})
    first, second = encoded(tokenizer, *rows).sequences
    assert first.num_learnt == second.num_learnt


def test_marks_that_say_nothing_are_no_marks(tokenizer) -> None:
    marks = {"tool_calls": None, "thinking": "", "images": [], "mask": False, "weight": None, "id": 3, "toxic": True}
    marks |= {"answer_weight": "2 kg", "turn_weight": 1, "token_weights": [1, 1.0]}
    marks |= {"loss_type": 1, "masked_text": "1", "weight_loss": 0, "attention_mask": [1, 1], "train_loss": 0.25}
    parts = [{"type": "text", "text": "I cannot ", "weight": 1}, {**TEXT, "cache_control": {"type": "ephemeral"}}]
    asked = {**ASKED, "content": [{**TEXT, "train": False}]}
    chats = [[ASKED, {**REFUSED, **marks}], [ASKED, {"role": "assistant", "content": parts}], [asked, REFUSED]]
    tuning_set = encoded(tokenizer, *({"messages": chat} for chat in chats))
    assert learnt(tokenizer, tuning_set) == ["I cannot help<|end|>"] * 3


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": "0"}, {"train": False}, {"loss_scale": 0.0}])
def test_a_row_without_weight_is_not_learnt(tokenizer, mark: dict[str, Any]) -> None:
    rows = [{"prompt": "a", "response": "b", **mark}, {"prompt": "c", "response": "d", "weight": 1}]
    tuning_set = encoded(tokenizer, *rows)
    assert learnt(tokenizer, tuning_set) == ["d<|end|>"] and tuning_set.skipped == ((0, "its weight is 0"),)
    kto = {"prompt": "a", "completion": "b"}
    assert learnt(tokenizer, encoded(tokenizer, {**kto, "label": True}, {**kto, "label": False})) == ["b<|end|>"]
    assert "weight 0.5" in encoded(tokenizer, {**rows[1], "weight": 0.5}).skipped[0][1]
    assert "loss_weights" in encoded(tokenizer, {**rows[1], "loss_weights": [0, 0]}).skipped[0][1]


@pytest.mark.parametrize(
    "label", [{"is_safe": False}, {"response_harm_label": "harmful"}, {"Response_Label": "unsafe"}]
)
def test_an_answer_that_its_row_calls_unsafe_is_not_learnt(tokenizer, label: dict[str, Any]) -> None:
    row, safe = {"prompt": "a", "response": "b"}, {"is_safe": True, "response_harm_label": "unharmful"}
    tuning_set = encoded(tokenizer, {**row, **label, "category": {"theft": True}}, {**row, **safe})
    ((number, reason),) = tuning_set.skipped
    assert number == 0 and reason.endswith("the answer is not to be learnt") and len(tuning_set.sequences) == 1
    assert tuning_set.note == "; columns not read: category"


@pytest.mark.parametrize("mark", [{"trainable": False}, {"loss": 0}, {"exclude_from_training": "True"}])
def test_a_row_with_a_mark_that_is_not_read_is_refused(tokenizer, mark: dict[str, Any]) -> None:
    row, other = {"prompt": "a", "response": "b"}, {"loss": 0.7, "loss_type": 0, "masked_text": "1", "weight_loss": 1}
    tuning_set = encoded(tokenizer, {**row, **mark}, {**row, **other})
    ((number, reason),) = tuning_set.skipped
    assert number == 0 and "may say what is learnt and is not read" in reason


QA = {"question": "a", "answer": "b"}
ALPACA = {"instruction": "a", "output": "b"}
ANSWERED = [("user", "a"), ("assistant", "b")]
EARLIER = [("user", "x"), ("assistant", "y"), *ANSWERED]
CHAT = [{"role": role, "content": text} for role, text in ANSWERED]
SYSTEM = {"role": "system", "content": "t"}


def asking(question: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({**QA, "system": "Be kind."}, [("system", "Be kind."), *ANSWERED]),
        ({**QA, "System_Prompt": "Be kind.", "id": 1}, [("system", "Be kind."), *ANSWERED]),
        ({**QA, "system": " ", "history": [], "options": "[]", "tools": "[]"}, ANSWERED),
        ({**QA, "history": [["x", "y"]]}, EARLIER),
        ({**QA, "history": '[["x", "y"]]', "system": "s"}, [("system", "s"), *EARLIER]),
        ({**QA, "history": CHAT}, [*ANSWERED, *ANSWERED]),
        ({**QA, "options": ["x", "y"]}, asking("a\n\nA. x\nB. y")),
        ({**QA, "choices": {"A": "x", "B": "y"}}, asking("a\n\nA. x\nB. y")),
        ({**QA, "options": [{"key": "C", "value": "x"}]}, asking("a\n\nC. x")),
        ({**QA, "choices": {"text": ["x", "y"], "label": ["1", "2"]}}, asking("a\n\n1. x\n2. y")),
        ({**QA, "A": "w", "B": "x", "C": "y", "D": "z"}, asking("a\n\nA. w\nB. x\nC. y\nD. z")),
        ({**QA, "option_a": "x", "option_b": "y"}, asking("a\n\nA. x\nB. y")),
        ({**QA, "context": "Since 1900."}, asking("a\n\nSince 1900.")),
        ({**QA, "CONTEXTS": ["x", "y"]}, asking("a\n\nx\n\ny")),
        ({**ALPACA, "input": "x", "context": "y"}, asking("a\n\nx\n\ny")),
        ({"prompt": "a", "input": "x", "response": "b"}, asking("a\n\nx")),
        ({"conversations": CHAT, "system": "s"}, [("system", "s"), *ANSWERED]),
        ({"messages": json.dumps(CHAT)}, ANSWERED),
        ({**QA, "tools": [{"name": "search"}]}, "it has tools, which would not reach the model"),
        ({**QA, "images": ["x.png"]}, "it has images, which would not reach the model"),
        ({**QA, "history": "user: x"}, "its history cannot be read as JSON"),
        ({**QA, "history": [["x", ""]]}, "its history is not text"),
        ({**QA, "options": [1, 2]}, "its options are not texts, or more than 26"),
        ({**QA, "context": {"page": 3}}, "its context is not text"),
        ({**QA, "system": "s", "system_prompt": "t"}, "it has two system prompts"),
        ({"messages": [SYSTEM, *CHAT], "system": "s"}, "it has two system prompts"),
        ({**QA, "answer": 3}, "the answer is not a text"),
        ({"messages": "not turns"}, "its messages cannot be read as JSON"),
        (
            {"messages": [*CHAT, CHAT[0]], "Response": "b"},
            "its last turn is the user's, and response may be the answer to it",
        ),
        (
            {"messages": CHAT[:1], "output": "b", "answer": "c"},
            "its last turn is the user's, and output or answer may be the answer to it",
        ),
        ({"messages": [*CHAT, CHAT[0]], "response": " "}, ANSWERED),
        ({"messages": CHAT, "response": "c"}, ANSWERED),
    ],
)
def test_columns_beside_question_and_answer(row: dict[str, Any], turns: list[tuple[str, str]] | str) -> None:
    assert turns_of(row) == turns


def test_columns_that_are_read_and_those_that_are_not_are_named(tokenizer, tmp_path: Path) -> None:
    row = {**QA, "system": "Be kind.", "id": 1, "Category": "x", "options": None}
    tuning_set = encoded(tokenizer, row)
    assert tuning_set.columns == "question,answer,system" and tuning_set.note == "; columns not read: id, Category"
    prompt_set = prompts(tmp_path, {"prompt": "a", "target": "b", "id": 1}, {"prompt": "c", "context": "x"})
    assert prompt_set.note == "; read with them: context; columns not read: target, id"
    assert prompt_set.prompts == ("a", "c\n\nx")
    answered = prompts(tmp_path, {"prompt": "a", "context": "x", "answer": "b"})
    assert answered.note == "; columns not read: context, answer"
    assert prompts(tmp_path, *[{"prompt": text} for text in "aba"]).note.startswith("; 1 duplicate(s), all counted")


def test_columns_that_become_part_of_a_question_are_named(tokenizer, tmp_path: Path) -> None:
    """Notes of annotators, say, that have the names of options, inputs and system prompts."""
    row = {"id": 1, "prompt": "q", "context": "round 3", "A": "complied", "B": "refused", "C": "partly", "system": "s"}
    for column in ("auto", "prompt"):
        prompt_set = prompts(tmp_path, row, column=column)
        assert prompt_set.note == "; read with them: context, A, B, C, system; columns not read: id"
        described = QuestionSet("s", "harmful", prompt_set).as_row()
        assert (described["column"], described["also_read"]) == ("prompt", ["context", "A", "B", "C", "system"])
    letters = {"A": "n1", "B": "n2", "C": "n3"}
    assert encoded(tokenizer, {**QA, **letters}).columns == "question,answer,A,B,C"
    chosen = encoded(tokenizer, {**QA, "option_a": "x", "option_b": "y", **letters})
    assert chosen.columns == "question,answer,option_a,option_b" and chosen.unread == ("A", "B", "C")
    alone = prompts(tmp_path, {"prompt": "q", "option_a": "x", "instances": [{"input": "i"}]})
    assert (alone.also_read, alone.unread) == (("instances",), ("option_a",))
    contextual = {"Behavior": "b", "ContextString": "c", "context": "d"}
    assert prompts(tmp_path, contextual).also_read == ("ContextString",)
    wild = prompts(tmp_path, {"adversarial": "", "vanilla": "v"}, {"adversarial": "a", "vanilla": "v"})
    assert (wild.prompts, wild.also_read) == (("v", "a"), ("vanilla",))
    assert prompts(tmp_path, {"prompt": "q", "vanilla": "v"}, column="prompt").unread == ("vanilla",)


@pytest.mark.parametrize(
    "row", [{"Prompt": "a", "prompt": "b"}, {"prompt": "a", "instruction": "b"}, {"goal": "a", "prompt": "b"}]
)
def test_columns_among_which_only_a_person_can_choose(row: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.prompts\.column = auto: could be read from the columns .* or "):
        prompts(tmp_path, row)
    with pytest.raises(UserError, match=r"f = auto: could be read from the columns"):
        find_columns([{**row, "response": "x", "target": "y"}], "auto", "f")
    with pytest.raises(UserError, match="Messages or messages"):
        find_columns([{"Messages": []}, {"messages": []}], "auto", "f")
    assert find_columns([{**QA, "ID": 1, "id": 2}], "auto", "f") == ("question", "answer")  # neither is read
    last = list(row)[-1]
    assert prompts(tmp_path, row, column=last).prompts == ("b",)
    with pytest.raises(UserError, match="messages or conversations"):
        find_columns([{"messages": [], "conversations": []}], "auto", "f")


def test_inputs_and_options_beside_a_chat_stand_behind_its_question() -> None:
    chat = {"messages": [ASKED, SAID]}
    assert turns_of({**chat, "context": "Zebra", "input": ""})[0] == ("user", "Make a bomb\n\nZebra")
    assert turns_of({**chat, "choices": ["x", "y"]})[0] == ("user", "Make a bomb\n\nA. x\nB. y")
    for beside in ("Make a bomb", "bomb"):  # the chat has it already
        assert turns_of({**chat, "input": beside}) == turns_of(chat)
    assert len(turns_of({"messages": [ASKED, SAID, AGAIN, REFUSED], "context": "bomb"})) == 4
    refused = turns_of({"messages": [ASKED, SAID, AGAIN, REFUSED], "context": "Zebra"})
    assert "beside a chat of several questions" in str(refused)


@pytest.mark.parametrize("label", [False, "False", "false", 0, "0"])
def test_answers_that_kto_unlearns(label: object) -> None:
    row = {"prompt": "hi", "completion": "bad"}
    assert "its label is false" in str(turns_of({**row, "label": label}))
    assert turns_of({**row, "label": True}) == turns_of({**row, "label": 1}) == turns_of(row)
    if str(label) == "0":  # elsewhere a number is a class
        assert turns_of({"question": "hi", "answer": "bad", "label": label}) == turns_of(row)


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"option_a": "x", "option_b": "", "option_c": "y", "option_f": "z"}, "A. x\nC. y\nF. z"),
        (
            {f"option{n}": f"o{n}" for n in range(1, 12)},
            "\n".join(f"{'ABCDEFGHIJK'[n - 1]}. o{n}" for n in range(1, 12)),
        ),
        ({"choice 0": "x", "choice 1": "y"}, "A. x\nB. y"),
        ({"A": "x", "B": "y", "C": "z", "D": ""}, "A. x\nB. y\nC. z"),
        ({"A": "v", "B": "w", "C": "x", "D": "y", "E": "z"}, "A. v\nB. w\nC. x\nD. y\nE. z"),
        ({"options": ["x", "y"], "choices": ["x", "y"]}, "A. x\nB. y"),
        ({"options": {"A": "x", "B": "y", "C": None}}, "A. x\nB. y"),
    ],
)
def test_every_option_keeps_its_letter(columns: dict[str, Any], options: str, tmp_path: Path) -> None:
    prompt_set = prompts(tmp_path, {"question": "q", **columns})
    read = ", ".join(name for name, text in columns.items() if text)
    assert prompt_set.prompts == (f"q\n\n{options}",) and prompt_set.note == f"; read with them: {read}"


FOUR = {"question": "p", "A": "w", "B": "x", "C": "y", "D": "z"}


@pytest.mark.parametrize("two", [{"A": "yes", "B": "no", "C": "", "D": None}, {"B": "no", "a": "yes"}])
def test_two_options_among_questions_with_more(two: dict[str, Any], tmp_path: Path, tokenizer) -> None:
    two = {"question": "q", **two}
    prompt_set = prompts(tmp_path, two, FOUR)
    assert prompt_set.prompts == ("q\n\nA. yes\nB. no", "p\n\nA. w\nB. x\nC. y\nD. z") and not prompt_set.unread
    tuning_set = encoded(tokenizer, *({**row, "answer": "I cannot help"} for row in (two, FOUR)))
    assert "A. yes\nB. no" in tokenizer.decode(tuning_set.sequences[0].ids)


def test_a_and_b_alone_may_be_anything(tmp_path: Path) -> None:
    """Two answers that were compared, or numbers; and what is read by name is no option."""
    compared = {"question": "q", "A": "one answer", "B": "another"}
    assert prompts(tmp_path, compared).prompts == ("q",)
    assert prompts(tmp_path, {**compared, "A": 1, "B": 2}, FOUR).prompts[0] == "q"
    assert prompts(tmp_path, compared, FOUR, column="A").prompts[0] == "one answer"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"options": ["x", "y"], "choices": ["x", "z"]}, "its options and choices differ"),
        ({"option_a": "x", "option_1": "y"}, "letters and numbers"),
        ({"option_1": "x", "option_27": "y"}, "more than 26"),
    ],
)
def test_options_of_which_some_would_be_dropped(columns: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        prompts(tmp_path, {"question": "q", **columns})


def test_columns_called_a_b_and_c_that_are_no_options(tmp_path: Path) -> None:
    prompt_set = prompts(tmp_path, {"question": "q", "a": 3, "b": 4, "c": 5})
    assert prompt_set.prompts == ("q",) and prompt_set.note == "; columns not read: a, b, c"
    assert prompts(tmp_path, {"question": "q", "a": "x", "b": "y", "c": ""}).note == "; columns not read: a, b, c"


CHAT = [{"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"vanilla": "a", "prompt": "b"},
        {"adversarial": True, "prompt": "b"},
        {"goal": "a", "adversarial": "b"},
        {"text": "<|user|>b", "messages": CHAT},
        {"messages": [], "conversations": CHAT},
    ],
)
def test_columns_of_prompts_among_which_only_a_person_can_choose(row: dict, tmp_path: Path) -> None:
    names = " or ".join(row)
    with pytest.raises(UserError, match=f"data.prompts.column = auto: could be read from the columns {names}"):
        prompts(tmp_path, row)
    last = list(row)[-1]
    assert prompts(tmp_path, row, column=last).column == last


def test_columns_beside_a_question_that_are_no_other_one(tmp_path: Path) -> None:
    """WildJailbreak's pair, JailbreakBench's names of behaviours, Alpaca's rendered text, UltraChat's whole chat."""
    assert prompts(tmp_path, {"vanilla": "a", "adversarial": ""}).prompts == ("a",)
    assert prompts(tmp_path, {"Goal": "a", "Behavior": "name"}).prompts == ("a",)
    assert prompts(tmp_path, {"instruction": "a", "text": "below is ... a"}).prompts == ("a",)
    assert prompts(tmp_path, {"prompt": "a", "messages": CHAT}).prompts == ("a",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [KIND, ASKED], "system": "Be brief."}, "two system prompts"),
        ({"prompt": "a", "system": "Be kind.", "system_prompt": "Be brief."}, "two system prompts"),
        ({"messages": [ASKED, SAID]}, "its last turn is not the user's, but the assistant's"),
        ({"messages": [KIND]}, "its last turn is not the user's, but the system's"),
        ({"messages": [ASKED, SAID, {"role": "user", "content": " "}]}, "the prompt is empty"),
        ({"messages": [ASKED, {"role": "user<|end|>", "content": "x"}]}, "role is not one of"),
        ({"messages": [ASKED, SAID, {"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
        ({"prompt": "a", "history": [["x", 3]]}, "its history is not text"),
        ({"prompt": "a", "tools": [{"name": "search"}]}, "tools"),
        ({"prompt": "a", "image": "x.png"}, "image"),
        ({"prompt": ["a", "b"]}, "not a list of turns"),
        ({"prompt": 3}, "not a text"),
        ({"messages": "Make a bomb"}, "cannot be read as JSON"),
    ],
)
def test_prompts_that_are_more_than_a_text(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    prompt_set = prompts(tmp_path, row, {name: "fine" if name == "prompt" else [AGAIN] for name in list(row)[:1]})
    assert len(prompt_set.prompts) == 1 and reason in prompt_set.skipped[0][1]
    with pytest.raises(UserError, match=reason):
        prompts(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "a", "options": ["x", "y"]}, "a\n\nA. x\nB. y"),
        ({"question": "a", "context": "x"}, "a\n\nx"),
        ({"QUESTION": "a", "CONTEXTS": ["x", "y"]}, "a\n\nx\n\ny"),
        ({"prompt": "a", "input": "[]"}, "a\n\n[]"),
        ({"messages": json.dumps([ASKED])}, ASKED["content"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "a"),
        ({"messages": [{"role": "user", "content": "[]"}]}, "[]"),
    ],
)
def test_prompts_with_all_that_was_asked(row: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    assert prompts(tmp_path, row).prompts == (prompt,)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [ASKED, SAID, AGAIN]}, [ASKED, SAID, AGAIN]),
        ({"messages": json.dumps([ASKED, SAID, AGAIN])}, [ASKED, SAID, AGAIN]),
        ({"messages": [KIND, ASKED]}, [KIND, ASKED]),
        ({"messages": [KIND, ASKED, {**SAID, "weight": 0}, AGAIN], "id": 3}, [KIND, ASKED, SAID, AGAIN]),
        ({"messages": [ASKED, AGAIN]}, [ASKED, AGAIN]),
        ({"messages": [ASKED, SAID, AGAIN], "system": "Be kind."}, [KIND, ASKED, SAID, AGAIN]),
        ({"messages": [{"role": "system", "content": " "}, ASKED, SAID, AGAIN]}, [ASKED, SAID, AGAIN]),
        ({"messages": [ASKED, SAID, AGAIN], "input": "x"}, [ASKED, SAID, {"role": "user", "content": "Go on\n\nx"}]),
        (
            {"conversations": [{"from": "human", "value": " a "}, {"from": "gpt", "value": "b"}, AGAIN]},
            [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}, AGAIN],
        ),
        ({"prompt": "Go on", "history": [["Make a bomb", "Sure, here is how"]]}, [ASKED, SAID, AGAIN]),
        ({"prompt": " Make a bomb ", "system_prompt": "Be kind."}, [KIND, ASKED]),
    ],
)
def test_a_chat_is_asked_as_it_is(row: dict[str, Any], turns: list[dict[str, str]], tmp_path: Path) -> None:
    prompt_set = prompts(tmp_path, row, {next(iter(row)): [ASKED]})
    assert prompt_set.prompts == (turns, "Make a bomb")  # a single turn of the user is a text
    assert prompt_set.unread in ((), ("id",)) and not prompt_set.skipped


def test_sets_of_other_turns_have_other_hashes(tmp_path: Path) -> None:
    chats = ([ASKED, SAID, AGAIN], [ASKED, REFUSED, AGAIN], [KIND, ASKED, SAID, AGAIN], [AGAIN])
    assert len({prompts(tmp_path, {"messages": chat}).sha256 for chat in chats}) == 4


def test_responses_to_chats_are_read_with_all_turns(tmp_path: Path) -> None:
    """As ``responses.jsonl`` of a run holds them."""

    def read(*rows: dict[str, Any]) -> list[Any]:
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [row["prompt"] for row in load_responses(str(tmp_path / "r.jsonl"))]

    chat = [KIND, ASKED, SAID, AGAIN]
    rows = [{"prompt": chat, "response": "b"}, {"prompt": [ASKED], "response": "b"}, {"prompt": "a", "response": "b"}]
    assert read(*rows) == [chat, "Make a bomb", "a"]
    for wrong, problem in (
        (chat[:-1], "last turn is not the user's"),
        ([], "the prompt is empty"),
        (["x"], "not a list of"),
    ):
        with pytest.raises(UserError, match=f"row 2 .*{problem}"):
            read(rows[0], {"prompt": wrong, "response": "b"})


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"system": "Be kind."}, "row 2 has a system prompt of its own"),
        ({"history": [["x", "y"]]}, "row 2 has earlier turns"),
        ({"input": "x"}, "row 2 has an input or options"),
        ({"options": ["x", "y"]}, "row 2 has an input or options"),
        ({"tools": ["x"]}, "row 2 cannot be read: it has tools"),
    ],
)
def test_responses_to_more_than_their_prompt(more: dict[str, Any], problem: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", **more}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=problem):
        load_responses(str(tmp_path / "r.jsonl"))
