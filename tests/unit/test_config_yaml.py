"""What a config says is what is read: no key lost, no value cut short, no number that YAML 1.1 makes of a text."""

from __future__ import annotations

from pathlib import Path

import pytest

from esi_ds.config import load_config, resolved_yaml, validate
from esi_ds.config.yaml import apply_override, dump_yaml, parse_value, parse_yaml
from esi_ds.errors import UserError

BASE = {"run": {"output_dir": "x"}, "model": {"path": "a"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nrest: 2\nseed: 3", "the key seed in line 3 is already in line 1"),
        ("run:\n  a: {seed: 1, seed: 1}", "the key seed in line 2 is already in line 2"),
        ("- {a: 1,\n  'a': 2}", "the key a in line 2 is already in line 1"),
        ("a: {<<: {b: 1}, <<: {c: 2}}", "the key << "),
        ("on: 1", "the key on in line 1 is not text"),
        ("1: 1", "the key 1 in line 1 is not text"),
        ("? [a]\n: 1", "a section or list in line 1 is not text"),
        ("!!set {a, b}", "tag"),
        ("a: !!python/object:os.system {}", "tag"),
        ("a: &a [*a]", "line 1 holds itself"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("[" * 5000, "recursion"),
        ("a: [\n b", "line 1"),
    ],
    ids=range(13),
)
def test_yaml_that_would_lose_something(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="--config") as raised:
        load_config(str(tmp_path / "a.yaml"), [])
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_aliases_of_aliases_are_bounded() -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    with pytest.raises(ValueError, match="more than 100,000"):
        parse_yaml("\n".join(lines))


def test_anchors_and_merges_keep_their_meaning() -> None:
    text = "a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\ne: {<<: *x}\nf: &y {<<: *x, b: 4}\ng: {<<: *y}"
    assert parse_yaml(text) == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 1, "c": 3},
        "e": {"b": 1, "c": 2},
        "f": {"b": 4, "c": 2},
        "g": {"b": 4, "c": 2},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("017", "017"),  # YAML 1.1: 15
        ("0o17", "0o17"),
        ("12:30", "12:30"),  # YAML 1.1: 750
        ("1:20.5", "1:20.5"),  # YAML 1.1: 80.5
        ("2024-01-01", "2024-01-01"),
        ("1e-5", 1e-5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("-3", -3),
        ("on", True),
        ("~", None),
    ],
)
def test_scalars(text: str, value: object) -> None:
    assert parse_yaml(f"a: {text}")["a"] == parse_value(text) == value


@pytest.mark.parametrize(
    "value", ["1e5", "017", "12:30", "on", "2024-01-01", "<<", " a", "a #b", "[", "null", 1e-5, 2**53, True, None, "é"]
)
def test_what_is_written_is_read_back(value: object) -> None:
    assert parse_yaml(dump_yaml({"a": [value]})) == {"a": [value]}


def test_a_resolved_config_is_read_back() -> None:
    config = validate({**BASE, "model": {"path": "1e5", "revision": "017"}})
    assert validate(parse_yaml(resolved_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/a #b", "runs/a #b"),
        ("#b", "#b"),
        ("runs/a: b, c", "runs/a: b, c"),
        ("- a", "- a"),
        ("*a", "*a"),
        ("&a b", "&a b"),
        ("!x", "!x"),
        ('"a: #b"', "a: #b"),
        ("'it''s #1'", "it's #1"),
        ('[{path: "a, b: c #d"}]', [{"path": "a, b: c #d"}]),
        ("[a, b]", ["a", "b"]),
        ("a=b", "a=b"),
        ("", None),
    ],
)
def test_an_override_keeps_everything(text: str, value: object) -> None:
    raw: dict = {}
    apply_override(raw, f"a.b={text}")
    assert raw == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["[a] #b", '"a" # b', "[a, #x\n b]", "{a: 1, a: 2}", "[a]]", '"a" b', "[" * 3000])
def test_an_override_that_would_lose_something(text: str) -> None:
    with pytest.raises(UserError, match=r"^a\.b = "):
        apply_override({}, f"a.b={text}")


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("esi", {"temperature": 1e300}, "esi.temperature = 1e\\+300"),
        ("tune", {"mask": "m", "data": {"path": "x"}, "eps": 1e-300}, "tune.eps = 1e-300"),
        ("esi", {"max_new_tokens": 10**4000}, "esi.max_new_tokens"),
        ("esi", {"batch_size": 2**60}, "esi.batch_size"),
        ("run", {"output_dir": "x", "collective_timeout_s": 10**12}, "run.collective_timeout_s"),
        ("deepspeed", {"zero_optimization": {"sub_group_size": 1e300}}, "deepspeed.zero_optimization.sub_group_size"),
        ("perturb", {"mask": "m", "noise": [0.1, float("nan")]}, "perturb.noise.1 = nan"),
        ("\u0455elect", {}, r"is an unknown key, spelt \\u0455elect; .* select"),
        ("esi", {"sample\u0455": 1}, r"spelt sample\\u0455; .* esi.samples"),
    ],
    ids=range(9),
)
def test_values_out_of_range_and_keys_that_look_right(section: str, value: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate({**BASE, section: value})


@pytest.mark.parametrize(
    ("extra", "accepted"),
    [
        ({"messages": []}, False),
        ({"model": "other"}, False),
        ({"stream": True}, False),
        ({"n": 2}, False),
        ({"max_tokens": 1}, False),
        ({"chat_template": "{{ messages }}"}, False),
        ({"continue_final_message": True}, False),
        ({"tools": []}, False),
        ({"tool_choice": "none"}, False),
        ({"best_of": 4}, False),
        ({"use_beam_search": True}, False),
        ({"echo": True}, False),
        ({"chat_template_kwargs": {"documents": []}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, True),
        ({"chat_template_kwargs": None}, True),
        ({"tools": None, "documents": None, "tool_choice": None}, True),
        ({"messages": None}, False),
        ({"max_tokens": None, "temperature": None, "max_completion_tokens": 9, "seed": 1}, True),
    ],
)
def test_extra_keys_of_a_request_replace_no_part_of_it(extra: dict, accepted: bool) -> None:
    raw = {**BASE, "eval": {"judges": [{"kind": "rubric", "model": "m", "extra": extra}]}}
    if accepted:
        assert validate(raw).eval.judges[0].extra == extra
        return
    with pytest.raises(UserError, match=rf"eval\.judges\.0\.extra\.{next(iter(extra))}"):
        validate(raw)
