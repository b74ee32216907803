"""Answers that another engine gave: three formats, matched by prompt, and never quietly the wrong ones."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from builders import question_set

from esi_ds.config import Model, Prompts, validate
from esi_ds.data.answers import (
    MISSING,
    RecordedAnswer,
    check_unmixed,
    counted_response,
    counted_responses,
    load_answers,
)
from esi_ds.data.asked import TEMPLATE, Asked
from esi_ds.data.prompts import load_responses
from esi_ds.data.thoughts import UNFINISHED
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError
from esi_ds.stages.esi.prepare import PromptData, _read_data
from esi_ds.stages.esi.respond import write_responses
from esi_ds.stages.evaluate.answering import add_recorded, to_read_again
from esi_ds.stages.evaluate.prepare import RecordedModel
from esi_ds.stages.plan.notes import count_responses

CHAT: Prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How?"}]
FIELD = "eval.models.0.answers"


def file_of(folder: Path, content: Any, name: str = "a.jsonl") -> str:
    rows = content if isinstance(content, list) else None
    text = json.dumps(content) if rows is None else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text)
    return str(folder / name)


def evaluated(model: str, name: str, index: int, prompt: Prompt, response: str | None, excluded: str | None = None):
    return {"model": model, "set": name, "index": index, "prompt": prompt, "response": response, "excluded": excluded}


def test_rows_are_matched_by_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": CHAT, "response": "kindly"},
        {"prompt": " Why? ", "response": "because"},
        {"prompt": "elsewhere", "response": "x"},
    ]
    sets = [question_set("a", "Why?", "When?"), question_set("b", CHAT)]
    loaded = load_answers(file_of(tmp_path, rows), FIELD, "m", sets)
    assert loaded.answers == {("a", 0): RecordedAnswer("because", None), ("b", 0): RecordedAnswer("kindly", None)}
    assert loaded.num_unused == 1


def test_completions_of_harmbench(tmp_path: Path) -> None:
    content = {
        "first": [{"test_case": "Why?", "generation": "so"}],
        "second": [{"test_case": "How?", "generation": "thus", "label": 1}],
        "third": [],
    }
    file = file_of(tmp_path, content, "completions.json")
    loaded = load_answers(file, FIELD, "m", [question_set("a", "How?", "Why?")])
    assert {key: answer.response for key, answer in loaded.answers.items()} == {("a", 0): "thus", ("a", 1): "so"}
    assert [row["response"] for row in load_responses(file)] == ["so", "thus"]  # ESI reads the same
    one = file_of(tmp_path, {"first": content["first"]}, "one.json")
    assert load_responses(one) == [{"prompt": "Why?", "response": "so"}]


def test_answers_of_an_evaluation(tmp_path: Path) -> None:
    rows = [
        evaluated("m", "a", 0, "Why?", "first"),
        evaluated("m", "a", 1, "Why?", "second"),  # the same prompt twice: its place decides
        evaluated("m", "a", 2, "How?", None, "no room"),
        evaluated("m", "a", 3, "When?", "<think>so", "unfinished"),
        evaluated("other", "a", 0, "Why?", "not this one"),
    ]
    file = file_of(tmp_path, rows)
    sets = [question_set("a", "Why?", "Why?", "How?", "When?", "Where?")]
    answers = load_answers(file, FIELD, "m", sets).answers
    assert list(answers.values()) == [
        RecordedAnswer("first", None),
        RecordedAnswer("second", None),
        RecordedAnswer(None, "no room"),
        RecordedAnswer("<think>so", "unfinished"),
    ]
    with pytest.raises(UserError, match=r"eval\.models\.0\.answers .*m, other.*eval\.models\.0\.answers_of"):
        load_answers(file, FIELD, "third", sets)
    assert load_answers(file, FIELD, "third", sets, answers_of="other").answers["a", 0].response == "not this one"
    with pytest.raises(UserError, match="answers of m, and none of other"):
        load_answers(file_of(tmp_path, rows[:4], "one.jsonl"), FIELD, "m", sets, answers_of="other")
    with pytest.raises(UserError, match=r"data\.responses.*m, other"):
        check_unmixed(load_responses(file), file, are_matched=True)
    check_unmixed(load_responses(file)[:4], file, are_matched=False)
    assert [counted_response(row) for row in load_responses(file)[:4]] == ["first", "second", "", ""]


def test_answers_to_several_sets_are_not_all_scored_as_harmful(tmp_path: Path) -> None:
    rows = [evaluated("m", "harmful", 0, "Why?", "first"), evaluated("m", "benign", 0, "How?", "second")]
    file, notes = file_of(tmp_path, rows), list[str]()
    with pytest.raises(UserError, match=r"data\.responses.*the sets harmful, benign.*name the harmful prompts in data"):
        count_responses(file, None, notes)
    assert len(load_answers(file, FIELD, "m", [question_set("benign", "How?")]).answers) == 1
    harmful = Prompts(path=file_of(tmp_path, [{"prompt": "Why?"}], "harmful.jsonl"))  # as the message advises
    assert count_responses(file, harmful, notes) == 1 and not notes


def esi_data(prompts: str | dict[str, str] | None, responses: str, **sections: Any) -> PromptData:
    data = {"prompts": {"path": prompts} if isinstance(prompts, str) else prompts, "responses": responses}
    raw = {"run": {"output_dir": "x"}, "model": {"path": "m"}, "judge": {"path": "g"}, "data": data, **sections}
    return _read_data(validate(raw))


def test_esi_scores_the_responses_to_its_prompts(tmp_path: Path) -> None:
    """Benign ones in the same file were scored as responses to harmful prompts, whatever data.prompts said."""
    harmful = file_of(tmp_path, [{"prompt": text} for text in ("Why?", "When?", "How?")], "harmful.jsonl")
    pairs = {"benign": "b", " How? ": "h", "Why?": "w"}
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs.items()]
    file = file_of(tmp_path, rows)
    data = esi_data(harmful, file)
    assert (data.prompts, data.responses) == (["Why?", "When?", "How?"], ["w", "", "h"])
    assert data.unanswered == {1: MISSING} and not data.are_generated
    assert data.remarks == (
        f"not scored: 1 row of {file} with prompts that data.prompts does not have",
        f"excluded: 1 prompt of data.prompts without a response in {file}",
    )
    assert data.origin == f"{harmful} (column prompt), answered by {file}" and len(set(data.source.values())) == 5
    whole = esi_data(None, file)
    assert whole.responses == ["b", "h", "w"] and whole.source.keys() == {"responses", "sha256"} and not whole.remarks
    scored = file_of(tmp_path, [row | {"judge_score": number} for number, row in enumerate(rows)], "scored.jsonl")
    scores = esi_data(harmful, scored, judge=None, esi={"estimator": "score_function"}).scores or []
    assert scores[::2] == [2, 1] and math.isnan(scores[1])


def test_esi_takes_all_responses_to_a_prompt(tmp_path: Path) -> None:
    harmful = file_of(tmp_path, [{"prompt": "Why?"}] * 2, "harmful.jsonl")
    rows = [{"prompt": "Why?", "response": text} for text in "abc"]
    assert esi_data(harmful, file_of(tmp_path, rows[:2])).responses == ["a", "b"]  # of a run on the same prompts
    assert esi_data(harmful, file_of(tmp_path, rows[:1])).responses == ["a", "a"]
    ours = [row | {"index": index, "excluded": None} for index, row in enumerate(rows)]
    assert esi_data(harmful, file_of(tmp_path, ours)).responses == ["a", "b"]  # of more of the same prompts
    with pytest.raises(UserError, match=r'3 rows to the prompt "Why\?", which data.prompts has 2 times; .*: null'):
        esi_data(harmful, file_of(tmp_path, rows))
    prompts = [{"prompt": text, "aim": text.lower()} for text in ("How?", "Why?")]
    goals = {"path": file_of(tmp_path, prompts, "goals.jsonl"), "goal": "aim"}
    sampled = esi_data(goals, file_of(tmp_path, rows))
    assert (sampled.prompts, sampled.responses) == (["How?", "Why?", "Why?", "Why?"], ["", "a", "b", "c"])
    assert sampled.unanswered == {0: MISSING} and sampled.goals == ["how?", "why?", "why?", "why?"]


def test_a_file_that_answers_none_of_the_prompts_is_scored_with_its_own(tmp_path: Path) -> None:
    """It is used instead of generating; that it is about other prompts is remarked on."""
    harmful = {"path": file_of(tmp_path, [{"prompt": "Why?"}], "harmful.jsonl"), "limit": 2}
    rows = [{"prompt": prompt, "response": prompt.lower()} for prompt in ("How?", "When?", "Who?")]
    file, notes = file_of(tmp_path, rows), list[str]()
    data = esi_data(harmful, file)
    assert (data.prompts, data.responses, data.unanswered) == (["How?", "When?"], ["how?", "when?"], {})
    reason = f"{file} answers none of the prompts of data.prompts"
    assert data.remarks == (f"{reason}: the file's own are scored (2 rows)",)
    assert count_responses(file, Prompts(**harmful), notes) == 2
    mixed = [evaluated("m", "harmful", 0, "How?", "first"), evaluated("m", "benign", 0, "When?", "second")]
    with pytest.raises(UserError, match=r"the sets harmful, benign.*name the harmful prompts"):
        esi_data(harmful, file_of(tmp_path, mixed, "mixed.jsonl"))
    with pytest.raises(UserError, match="data.prompts.path"):  # no such file: a slip
        esi_data({"path": str(tmp_path / "nowhere.jsonl")}, file)


@pytest.mark.parametrize(("key", "is_used"), [("path", True), ("column", False)])
def test_prompts_that_the_hub_does_not_provide(
    key: str, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's own prompts stand in for them; a wrong column is a slip, which is refused."""

    def load_section(*_: object) -> None:
        raise UserError(f"data.prompts.{key}", "org/set", "is away", "look")

    monkeypatch.setattr("esi_ds.stages.esi.prepare.load_section", load_section)
    monkeypatch.setattr("esi_ds.models.hub.check_exists", lambda *_: None)
    file = file_of(tmp_path, [{"prompt": "Why?", "response": "w"}])
    with nullcontext() if is_used else pytest.raises(UserError, match=r"data\.prompts\.column"):
        data = esi_data("org/set", file)
        assert data.responses == ["w"]
        assert data.remarks == ("data.prompts = org/set cannot be read (is away): the file's own are scored (1 row)",)


def test_esi_reads_goals_from_its_prompts_or_else_from_recorded_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "goal": "g", "response": "r", "excluded": None}, {"prompt": "q", "response": "r"}]
    file, prompts = file_of(tmp_path, rows), [{"prompt": "q", "aim": "x"}, {"prompt": "p", "aim": "y"}]
    attacks = file_of(tmp_path, prompts, "attacks.jsonl")
    assert esi_data(attacks, file).goals == [None, "g"]
    assert list(esi_data({"path": attacks, "goal": "aim"}, file).goals or []) == ["x", "y"]


def test_what_is_ambiguous_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "response": "a"}, {"prompt": "Why?", "response": "b"}]
    with pytest.raises(UserError, match="2 different answers to the prompt"):
        load_answers(file_of(tmp_path, rows), FIELD, "m", [question_set("a", "Why?")])
    rows[1]["response"] = "a"
    assert load_answers(file_of(tmp_path, rows), FIELD, "m", [question_set("a", "Why?")]).num_unused == 0
    with pytest.raises(UserError, match="answers none of the prompts"):
        load_answers(file_of(tmp_path, rows), FIELD, "m", [question_set("a", "When?")])
    for wrong in ({"prompt": "Why?"}, {"prompt": "Why?", "response": 3}):
        with pytest.raises(UserError, match="row 1 has no text under 'response'"):
            load_answers(file_of(tmp_path, [wrong]), FIELD, "m", [question_set("a", "Why?")])
    image = {"a": [{"test_case": ["x.png", "Why?"], "generation": "so"}]}
    with pytest.raises(UserError, match="row 1 cannot be read"):
        load_answers(file_of(tmp_path, image, "c.json"), FIELD, "m", [question_set("a", "Why?")])
    odd = [evaluated("m", "a", 0, "Why?", "so") | {"excluded": 1}]
    with pytest.raises(UserError, match="'excluded' is 1"):
        load_answers(file_of(tmp_path, odd), FIELD, "m", [question_set("a", "Why?")])


def test_windows_ends_of_lines_do_not_part_an_answer_from_its_prompt(tmp_path: Path) -> None:
    file = file_of(tmp_path, [{"prompt": "One\nTwo", "response": "so"}])
    assert load_answers(file, FIELD, "m", [question_set("a", "One\r\nTwo")]).answers["a", 0].response == "so"


def test_a_file_of_failed_requests_is_read(tmp_path: Path) -> None:
    """Their responses are null, as engines write them, of HarmBench's completions too."""
    completions = {"a": [{"test_case": "Why?", "generation": None}, {"test_case": "How?", "generation": "so"}]}
    file = file_of(tmp_path, completions, "c.json")
    loaded = load_answers(file, FIELD, "m", [question_set("a", "Why?", "How?")])
    assert loaded.answers["a", 0] == RecordedAnswer(None, MISSING) and loaded.answers["a", 1].response == "so"
    data = esi_data(None, file)
    assert data.responses == ["", "so"]
    retried = [{"prompt": "Why?", "response": None}, {"prompt": "Why?", "response": "so"}]
    for rows in (retried, retried[::-1]):
        loaded = load_answers(file_of(tmp_path, rows), FIELD, "m", [question_set("a", "Why?")])
        assert loaded.answers["a", 0].response == "so"
    timeouts = [{"prompt": "Why?", "response": None, "excluded": reason} for reason in ("timeout", "HTTP 500")]
    loaded = load_answers(file_of(tmp_path, timeouts), FIELD, "m", [question_set("a", "Why?")])
    assert loaded.answers["a", 0] == RecordedAnswer(None, "HTTP 500")


def test_goals_of_others_that_esi_does_not_read_are_remarked_on(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "r", "goal": "g"}]
    file = file_of(tmp_path, rows)
    remark = f"responses of {file} have goals that are not read: give data.prompts with goal: goal"
    for prompts in (None, {"path": file, "column": "prompt"}):
        assert esi_data(prompts, file).remarks == (remark,)
    told = esi_data({"path": file, "goal": "goal"}, file)
    assert told.remarks == () and told.goals == ["g"]
    own = file_of(tmp_path, [{**rows[0], "excluded": None}], "own.jsonl")
    assert esi_data(None, own).remarks == () and esi_data(None, own).goals == ["g"]


def test_a_prompt_that_is_there_twice_takes_its_rows_in_turn(tmp_path: Path) -> None:
    """As a file holds them that an engine wrote in the order of the prompts: with one sample as with several."""
    sets = [question_set("a", "Why?", "How?"), question_set("b", "Why?")]
    rows = [{"prompt": prompt, "response": text} for prompt, text in (("Why?", "1"), ("How?", "2"), ("Why?", "3"))]
    loaded = load_answers(file_of(tmp_path, rows), FIELD, "m", sets)
    texts = {key: answer.response for key, answer in loaded.answers.items()}
    assert texts == {("a", 0): "1", ("a", 1): "2", ("b", 0): "3"} and loaded.num_unused == 0
    alone = load_answers(file_of(tmp_path, rows[:2]), FIELD, "m", sets)
    assert [alone.answers[name, 0].response for name in "ab"] == ["1", "1"]
    third = [*rows, {"prompt": "Why?", "response": "4"}]
    with pytest.raises(UserError, match="3 different answers .* asked 2 times; keep one of them, or 2, in the order"):
        load_answers(file_of(tmp_path, third), FIELD, "m", sets)


def test_a_thought_beside_an_answer_is_joined_to_it(tmp_path: Path) -> None:
    """As engines give it; one that the response holds already, or that is empty, changes nothing."""
    whole = "<think>Hm.</think>so"
    rows = [
        {"prompt": "a", "response": "so", "reasoning_content": "Hm."},
        {"prompt": "b", "response": "so", "reasoning": "Hm."},
        {"prompt": "c", "response": "", "reasoning": "Hm.", "cut": True},
        {"prompt": "d", "response": "so", "reasoning": " ", "reasoning_content": None},
        {"prompt": "e", "response": whole, "reasoning": "Hm."},
        {"prompt": "f", "response": None, "reasoning": "Hm."},
        {"prompt": "g", "response": None, "reasoning": "Hm.", "cut": False},
    ]
    loaded = load_answers(file_of(tmp_path, rows), FIELD, "m", [question_set("a", *"abcdefg")])
    texts = [loaded.answers["a", number].response for number in range(7)]
    joined = "<think>\nHm.\n</think>\n\nso"
    assert texts == [joined, joined, "<think>\nHm.", "so", whole, "<think>\nHm.", "<think>\nHm."]


class Rows:
    """A ledger without a file, and a tracker that keeps its lines."""

    def __init__(self) -> None:
        self.rows: dict[Any, Any] = {}
        self.lines: list[str] = []
        self.log = self.remark = self.lines.append

    def add(self, rows: list[Any]) -> None:
        self.rows |= {(row["model"], row["set"], row["index"]): row for row in rows}


def test_missing_answers_are_listed_and_fluency_is_not_measured(tmp_path: Path) -> None:
    """Those without a row, and those whose request failed."""
    rows = [{"prompt": "Why?", "response": "so", "cut": True}, {"prompt": "Who?", "response": "<think>I"}]
    rows.append({"prompt": "When?", "response": None})
    sets = [question_set("a", "How?", "Why?", "Who?", "When?")]
    model = RecordedModel("m", "base", load_answers(file_of(tmp_path, rows), FIELD, "m", sets), FIELD)
    answers = Rows()
    add_recorded(model, sets, answers, answers)  # type: ignore[arg-type]
    kept = list(answers.rows.values())
    assert [row["response"] for row in kept] == [None, "so", "<think>I", None]
    assert kept[0]["excluded"] == kept[3]["excluded"] == MISSING and kept[1]["excluded"] is None
    assert "within a thought" in kept[2]["excluded"] and kept[1]["cut"] is True and "cut" not in kept[0]
    assert any("2 of 4 prompts of a: 0, 3" in line for line in answers.lines)
    assert any("fluency is not measured" in line for line in answers.lines)
    assert [row["index"] for row, _ in to_read_again(answers, Rows(), ())] == [1]  # type: ignore[arg-type]
    assert to_read_again(answers, Rows(), {"m"}) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "eval.models.0.*has no answers.*path or answers or endpoint"),
        ({"path": "a", "answers": "b"}, r"eval\.models\.0\.answers.*together with path"),
        ({"path": "b", "answers_of": "base"}, r"eval\.models\.0\.answers_of = base: belongs to a file of answers"),
        ({"answers": "b", "revision": "main"}, r"eval\.models\.0\.revision.*hub"),
        ({"answers": "b", "before": "x"}, r"eval\.models\.0\.before"),
    ],
)
def test_a_model_has_one_origin(model: dict, words: str) -> None:
    raw = {"run": {"output_dir": "x"}, "model": {"path": "y"}, "eval": {"models": [model]}}
    with pytest.raises(UserError, match=words):
        validate(raw)


def test_esi_leaves_out_a_response_that_was_cut_within_a_thought_that_its_prompt_opened() -> None:
    """As of a server's rows; another response of the file tells that thoughts are opened before it."""
    finished = {"prompt": "a", "response": "I plan.</think>\n\nNo.", "cut": False}
    cut = {"prompt": "b", "response": "I plan to explain how to build", "cut": True}
    assert counted_responses([finished, cut], FIELD) == [finished["response"], ""]
    assert counted_responses([cut], FIELD) == [cut["response"]]
    assert counted_responses([finished, {**cut, "cut": False}], FIELD)[1] == cut["response"]


def test_unfinished_thoughts_of_esi_stay_excluded(tmp_path: Path) -> None:
    """They hold no mark where the template opened the thought. What else excluded a row was that run's own limit."""
    responses = ["I plan.</think>\n\nNo.", "I plan to explain how", "Long."]
    excluded = {1: UNFINISHED, 2: "too long for the judge (9 tokens, it takes 8)"}
    write_responses(tmp_path, ["a", "b", "c"], responses, {0: 1.0}, excluded)
    file = str(tmp_path / "responses.jsonl")
    assert counted_responses(load_responses(file), file) == [responses[0], "", responses[2]]
    loaded = load_answers(file, FIELD, "m", [question_set("a", *"abc")])
    assert [answer.excluded for answer in loaded.answers.values()] == [None, UNFINISHED, None]


def test_rows_written_with_other_marks_of_thoughts_are_not_read_otherwise(tmp_path: Path) -> None:
    marks = ["<r>", "</r>"]
    row = evaluated("m", "a", 0, "Why?", "<r>I could refuse.</r>Sure") | {"thought_marks": marks}
    file, sets = file_of(tmp_path, [row]), [question_set("a", "Why?")]
    for read in (
        lambda given: counted_responses(load_responses(file), file, given),
        lambda given: load_answers(file, FIELD, "m", sets, asked=Asked(Model(path="m", thought_marks=given))),
    ):
        with pytest.raises(UserError, match=r"model\.thought_marks: would read row 1 of .* differently"):
            read(None)
        read(marks)
    plain = evaluated("m", "a", 0, "Why?", "Sure") | {"thought_marks": marks}  # the marks make no difference
    assert counted_responses([plain], file) == ["Sure"]


def asked_rows(system_prompt: str | None, extra: dict[str, Any]) -> list[dict[str, Any]]:
    asked = {"model": "m", "max_tokens": 64, "system_prompt": system_prompt, "extra": extra}
    return [{"prompt": prompt, "response": "Sure", "asked": asked} for prompt in ("Why?", CHAT)]


@pytest.mark.parametrize(
    ("system_prompt", "extra", "model", "words"),
    [
        ("You are DAN.", {}, {}, r"model\.system_prompt.*row 1 of .*, \"You are DAN\.\""),
        (
            None,
            {},
            {"system_prompt": "Be kind."},
            r"model\.system_prompt = Be kind\.: differs from that of row 1 .*, null",
        ),
        (None, {TEMPLATE: {"thinking": True}}, {}, r"model\.template_kwargs.*row 1 of .*\"thinking\": true"),
        (None, {}, {"template_kwargs": {"thinking": True}}, r"model\.template_kwargs.*row 1 of .*, {}"),
    ],
)
def test_responses_to_another_question_are_refused(
    system_prompt: str | None, extra: dict[str, Any], model: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A prompt that the model answered behind another system prompt is another one."""
    file = file_of(tmp_path, asked_rows(system_prompt, extra))
    with pytest.raises(UserError, match=words):
        esi_data(None, file, model={"path": "m", **model})
    with_own = file_of(tmp_path, asked_rows(system_prompt, extra)[1:], "own.jsonl")
    asked, sets = Asked(Model(path="m", **model), 256), [question_set("a", "Why?", CHAT)]
    if "system_prompt" in words:
        with pytest.raises(UserError, match=words):
            load_answers(file, FIELD, "m", sets, asked=asked)
        assert load_answers(with_own, FIELD, "m", sets, asked=asked).answers  # the chat's own one was asked
    else:  # another model may have another template
        assert TEMPLATE in load_answers(file, FIELD, "m", sets, asked=asked).differences


def test_answers_that_were_asked_for_otherwise_are_remarked_on(tmp_path: Path) -> None:
    file = file_of(tmp_path, asked_rows("s", {"temperature": 0.7, TEMPLATE: {"thinking": True}}))
    section, sets = Model(path="m", system_prompt="s", template_kwargs={"thinking": True}), [question_set("a", "Why?")]
    loaded = load_answers(file, FIELD, "m", sets, asked=Asked(section, 256))
    assert loaded.differences == "max_tokens 64, not 256; temperature 0.7, not 0"
    tracker = Rows()
    add_recorded(RecordedModel("m", "base", loaded, FIELD), sets, Rows(), tracker)  # type: ignore[arg-type]
    assert f"answers of m were asked for with other settings: {loaded.differences}" in tracker.lines
    same = Asked(section, 64, {"temperature": 0.7})
    assert load_answers(file, FIELD, "m", sets, asked=same).differences == ""
    nucleus = Asked(section, 64, {"temperature": 0.7, "top_p": 0.1})
    assert load_answers(file, FIELD, "m", sets, asked=nucleus).differences == "top_p 1, not 0.1"
    drawn = {"temperature": 0.7, "top_p": 0.1, TEMPLATE: {"thinking": True}}
    narrow = file_of(tmp_path, asked_rows("s", drawn), "narrow.jsonl")
    whole = Asked(section, 64, {"temperature": 0.7, "top_p": 1.0})
    assert load_answers(narrow, FIELD, "m", sets, asked=nucleus).differences == ""
    assert load_answers(narrow, FIELD, "m", sets, asked=whole).differences == "top_p 0.1, not 1.0"
    none = file_of(tmp_path, asked_rows("s", {**drawn, "top_p": None}), "none.jsonl")  # the server's own
    assert load_answers(none, FIELD, "m", sets, asked=whole).differences == ""
    data = esi_data(None, file, model=section.model_dump())
    assert data.remarks == (f"responses of {file} were asked for with other settings: {loaded.differences}",)


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ({"system_prompt": "s"}, "model.system_prompt"),
        ({"template_kwargs": {"thinking": True}}, "model.template_kwargs"),
        ({"system_prompt": "", "template_kwargs": {"a": 1}}, "model.system_prompt and model.template_kwargs"),
    ],
)
def test_rows_of_a_run_that_asked_with_nothing_else_are_remarked_on(
    model: dict[str, Any], keys: str, tmp_path: Path
) -> None:
    """They record nothing, and were read as answers to the prompts of a run that asks behind a system prompt."""
    remark = f"do not record {keys}: rows of runs that set none look like this"
    write_responses(tmp_path, ["Why?"], ["so"], {0: 1.0}, {}, asked=Asked(Model(path="m"), 8).as_row())
    file, sets = str(tmp_path / "responses.jsonl"), [question_set("a", "Why?")]
    answers = file_of(tmp_path, [evaluated("m", "a", 0, "Why?", "so")])
    (said,) = esi_data(None, file, model={"path": "m", **model}).remarks
    assert said.startswith(f"responses of {file} {remark}")
    asked, tracker = Asked(Model(path="m", **model)), Rows()
    loaded = load_answers(answers, FIELD, "m", sets, asked=asked)
    add_recorded(RecordedModel("m", "base", loaded, FIELD), sets, Rows(), tracker)  # type: ignore[arg-type]
    assert any(line.startswith(f"answers of m {remark}") for line in tracker.lines)
    plain = file_of(tmp_path, [{"prompt": "Why?", "response": "so"}], "plain.jsonl")  # what another engine was asked
    for other, given in ((file, Asked(Model(path="m"))), (plain, asked)):
        assert load_answers(other, FIELD, "m", sets, asked=given).unrecorded == ""
    own = file_of(tmp_path, [evaluated("m", "a", 0, CHAT, "so")], "own.jsonl")  # its system turn stands in place of it
    unrecorded = load_answers(own, FIELD, "m", [question_set("a", CHAT)], asked=asked).unrecorded
    assert ("system_prompt" in unrecorded, "template_kwargs" in unrecorded) == (False, "template_kwargs" in keys)


def test_rows_say_how_they_were_asked(tmp_path: Path) -> None:
    """What one run writes the next one checks."""
    section = Model(path="m", system_prompt="s", template_kwargs={"thinking": True})
    asked = Asked(section, 8, {"temperature": 0.5}).as_row()
    assert asked == {
        "max_tokens": 8,
        "system_prompt": "s",
        "extra": {TEMPLATE: {"thinking": True}, "temperature": 0.5},
    }
    write_responses(tmp_path, ["Why?"], ["so"], {0: 1.0}, {}, asked=asked)
    file = str(tmp_path / "responses.jsonl")
    assert esi_data(None, file, model=section.model_dump()).responses == ["so"]
    with pytest.raises(UserError, match=r"model\.system_prompt: differs from that of row 1"):
        esi_data(None, file)
