"""``model.template_kwargs`` reach the chat template of every reader, and no exported one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import CHAT, byte_bpe_tokenizer
from thinking import template, thinking_tokenizer

from esi_ds.config import Model, validate
from esi_ds.data.chat import encode_prompt, load_chat_tokenizer
from esi_ds.data.template_values import set_values, unread_values, without_values
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource

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
        ({"template_kwargs": {"messages": []}}, "model.template_kwargs.messages.*another owner"),
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
