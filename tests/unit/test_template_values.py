"""``model.template_kwargs`` reach the chat template of every reader, and no exported one."""

from __future__ import annotations

import json
from datetime import date, datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
from builders import CHAT, byte_bpe_tokenizer
from thinking import template, thinking_tokenizer
from transformers.utils import chat_template_utils

from esi_ds.artifacts import RunFolder
from esi_ds.config import Model, validate
from esi_ds.data.chat import encode_prompt, load_chat_tokenizer, with_template
from esi_ds.data.template_values import set_values, unread_values, without_values
from esi_ds.errors import Interrupted, UserError
from esi_ds.models.folder import ModelSource
from esi_ds.stages import begun
from esi_ds.stages.begun import check_same_on_all_ranks, with_date
from esi_ds.zero import runtime

CHATS = (
    [{"role": "user", "content": "Why?"}],
    [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"))],
)
VALUES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"enable_thinking": False}),
    ("qwen3", {"enable_thinking": True}),
    ("gptoss", {"reasoning_effort": "high"}),
    ("gptoss", {"model_identity": "You are \"é\\n\" '%}' {{ x }}\n🙂.", "builtin_tools": ["python"]}),
]


@pytest.mark.parametrize(("name", "values"), VALUES)
def test_the_template_reads_the_values_as_if_they_were_passed(name: str, values: dict[str, Any]) -> None:
    passed, given = thinking_tokenizer(name), thinking_tokenizer(name)
    set_values(given, values)
    for chat in CHATS:
        for prompted in (True, False):
            expected = passed.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted, **values)
            assert given.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted) == expected
    assert without_values(given, values).chat_template == template(name) != given.chat_template


@pytest.mark.parametrize("text", ["\n  {% if x %}yes{% endif %}", "  {{ x }}", "{%- if x is none %} a{% endif %}\n"])
@pytest.mark.parametrize("value", [None, True, 1.5, [1, {"a": None}], {"b": [False, "c"]}, ""])
def test_values_of_every_kind_and_white_space_at_the_templates_beginning(text: str, value: Any) -> None:
    given = byte_bpe_tokenizer()
    given.chat_template = text + "{{ x }}|{{ x is mapping }}{{ x is none }}{{ x is sameas true }}"
    expected = given.apply_chat_template(CHATS[0], tokenize=False, x=value)
    set_values(given, {"x": value})
    assert given.apply_chat_template(CHATS[0], tokenize=False) == expected


def test_a_value_that_the_template_does_not_read_is_refused() -> None:
    assert unread_values(template("qwen3"), {"enable_thinking": False, "thinking": False}) == ["thinking"]
    assert unread_values(template("gptoss"), {"reasoning_effort": "low", "model_identity": "x"}) == []
    assert unread_values("{% generation %}{{ x }}{% endgeneration %}{% break %}", {"x": 1, "y": 1}) == ["y"]
    assert unread_values("{# y #}{% set y = 1 %}{{ y }}", {"y": 1}) == ["y"]


def test_a_model_s_tokenizer_has_them(tmp_path: Path) -> None:
    """The base's must read them; a model beside it may have a template that does not."""
    thinking_tokenizer("qwen3").save_pretrained(tmp_path / "qwen")
    byte_bpe_tokenizer().save_pretrained(tmp_path / "plain")
    for folder in ("qwen", "plain"):
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    section = Model(path=str(tmp_path / "qwen"), template_kwargs={"enable_thinking": False})
    tokenizer = load_chat_tokenizer(ModelSource(str(tmp_path / "qwen")), section)
    assert tokenizer.decode(encode_prompt(tokenizer, "Why?", None)).endswith("<think>\n\n</think>\n\n")
    plain = ModelSource(str(tmp_path / "plain"))
    with pytest.raises(UserError, match=r"model.template_kwargs.enable_thinking.*is not read by the chat template"):
        load_chat_tokenizer(plain, section)
    beside = load_chat_tokenizer(plain, section, is_base=False)
    assert str(beside.chat_template).endswith(CHAT)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"template_kwargs": {"messages": []}}, "model.template_kwargs.messages.*cannot be set here"),
        ({"template_kwargs": {"enable thinking": True}}, "is not a name that a template can read"),
        ({"thought_marks": ["<reason>"]}, "is not a pair: one mark opens a thought, the other closes it"),
        ({"thought_marks": ["<reason>", " "]}, "is not a pair"),
        ({"thought_marks": ["<reason>", "<Reason>"]}, "is the same mark twice"),
    ],
)
def test_wrong_values_and_marks_are_refused_before_anything_is_read(section: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate({"run": {"output_dir": "x"}, "model": {"path": "a", **section}})


def test_values_reach_templates_that_a_tokenizer_holds_by_name() -> None:
    """Of several in ``additional_chat_templates`` transformers renders "default"."""
    values = {"enable_thinking": False}
    one, several = thinking_tokenizer("qwen3"), thinking_tokenizer("qwen3")
    plain = {"default": template("qwen3"), "tool_use": template("qwen3")}
    several.chat_template = dict(plain)
    for tokenizer in (one, several):
        set_values(tokenizer, values)
    shown = [
        tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True)
        for tokenizer in (one, several)
    ]
    assert shown[0] == shown[1] and "</think>" in shown[0]
    assert without_values(several, values).chat_template == plain
    assert unread_values(plain, {**values, "nowhere": 1}) == ["nowhere"]


LLAMA = (  # Llama 3.1's way, shortened
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
    "Today Date: {{ date_string }}{% for m in messages %}|{{ m.role }}: {{ m.content }}{% endfor %}"
)
FORMATS = ("%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %e %B %j %U %W %F %D %x", "%H:%M:%S %p %I", "no directive")


class Clock(datetime):
    """A clock that stands still; transformers asks ``datetime.now``."""

    day = datetime(2026, 11, 28)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return cls.day


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", datetime(2026, 11, 28))
    return Clock


@pytest.mark.parametrize("text", [LLAMA, template("gptoss"), *(f"  {{{{ strftime_now('{f}') }}}}" for f in FORMATS)])
def test_a_template_writes_the_day_that_it_is_given(text: str, clock: type[Clock]) -> None:
    """As it would have on that day, white space at its beginning included, whatever the clock says."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = text
    on_the_day = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    set_values(tokenizer, {}, date(2026, 11, 28))
    clock.day = datetime(2031, 2, 3, 4, 5, 6)
    assert tokenizer.apply_chat_template(CHATS[0], tokenize=False) == on_the_day
    assert without_values(tokenizer, {}, date(2026, 11, 28)).chat_template == text
    if "no directive" not in text:  # without a day it is the clock's
        tokenizer.chat_template = text
        assert tokenizer.apply_chat_template(CHATS[0], tokenize=False) != on_the_day


def test_a_template_without_a_date_is_left_as_it_is_and_values_stay_with_the_date() -> None:
    plain, dated, day = byte_bpe_tokenizer(), thinking_tokenizer("gptoss"), date(2026, 11, 28)
    before = plain.chat_template
    set_values(plain, {}, day)
    assert plain.chat_template == before
    values = {"reasoning_effort": "high"}
    set_values(dated, values, day)
    text = dated.apply_chat_template(CHATS[0], tokenize=False)
    assert "Reasoning: high" in text and "Current date: 2026-11-28" in text
    assert without_values(dated, values, day).chat_template == template("gptoss")
    assert unread_values(dated.chat_template, {"nowhere": 1}) == ["nowhere"]


def test_a_run_that_goes_on_on_another_day_asks_what_it_began_with(
    clock: type[Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt had another date on another day, so that half of a run's answers were to other prompts."""

    class Calendar(date):
        @classmethod
        def today(cls) -> date:
            return clock.day.date()

    monkeypatch.setattr(begun, "date", Calendar)
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = LLAMA
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
    config = validate({"run": {"output_dir": str(tmp_path / "run")}, "model": {"path": str(tmp_path / "model")}})

    def prompt() -> str:
        model = with_date(config).model
        loaded = load_chat_tokenizer(ModelSource.of(model), model)
        return loaded.decode(encode_prompt(loaded, "Why?", None))

    first = prompt()
    assert "28 Nov 2026" in first
    RunFolder(config.run.output_dir).create("private")
    RunFolder(config.run.output_dir).open(with_date(config))
    clock.day = datetime(2026, 12, 1)
    assert prompt() == first
    RunFolder(config.run.output_dir).check(with_date(config))  # the same config: the run goes on
    new = config.model_copy(update={"run": config.run.model_copy(update={"output_dir": str(tmp_path / "new")})})
    assert with_date(new).model.date == "2026-12-01"
    named = config.model_copy(update={"model": config.model.model_copy(update={"date": "2026-12-01"})})
    with pytest.raises(UserError, match=r"holds a run whose config differs in model.date"):
        RunFolder(config.run.output_dir).check(with_date(named))
    # A run of an earlier version named no day: it goes on with the clock, as it began.
    stored = tmp_path / "run/config.yaml"
    stored.write_text("".join(line for line in stored.read_text().splitlines(True) if "date:" not in line))
    assert with_date(config).model.date == "auto"
    RunFolder(config.run.output_dir).check(with_date(config))


@pytest.mark.parametrize("day", ["today", "2026-13-01", "28.11.2026", "20261128", ""])
def test_what_is_not_a_day_is_refused(day: str) -> None:
    with pytest.raises(UserError, match=r"model.date.*is not a date; write it as 2026-11-28, or auto"):
        validate({"run": {"output_dir": "x"}, "model": {"path": "a", "date": day}})


@pytest.mark.parametrize(
    ("zone", "error", "said"),
    [
        (0, Interrupted, "midnight passed while the ranks started"),  # a batch script starts the job again
        (3600, UserError, "model.date = auto: is 2026-11-28 on a and 2026-11-29 on b; name the day"),
    ],
)
def test_ranks_on_two_sides_of_midnight_do_not_run(
    monkeypatch: pytest.MonkeyPatch, zone: int, error: type[Exception], said: str
) -> None:
    config = validate({"run": {"output_dir": "x"}, "model": {"path": "a", "date": "2026-11-28"}})
    check_same_on_all_ranks(config)  # a group of one
    others = [({"dtype": config.model.dtype, "date": "2026-11-29"}, zone, "b")]
    monkeypatch.setattr(runtime, "gather_objects", lambda item: [(item[0], 0, "a"), *others])
    with pytest.raises(error, match=said):
        check_same_on_all_ranks(config)


def test_rows_with_a_template_of_their_own_get_the_day_too(clock: type[Clock]) -> None:
    model = Model(path="a", date="2020-02-29")
    text = "{{ strftime_now('%Y-%m-%d') }}" + CHAT
    writer = with_template(byte_bpe_tokenizer(), text, model, "tune.data.chat_template")
    assert writer.apply_chat_template(CHATS[0], tokenize=False).startswith("2020-02-29")
