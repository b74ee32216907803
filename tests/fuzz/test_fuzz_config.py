"""Every key of the config, with every kind of value: accepted and written back equal, or refused by its name."""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_bytes, fuzz, limited, outcome
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from esi_ds.config import Config, load_config, validate
from esi_ds.config.section import sections_of
from esi_ds.config.yaml import apply_override, dump_yaml, parse_yaml
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import UserError

GUARD = {"kind": "guard", "path": "g", "family": "custom", "template": "{prompt} {response}",
         "verdict": {"safe": " safe", "unsafe": " unsafe"}}  # fmt: skip
CLASSIFIER = {"kind": "classifier", "path": "c", "template": "{response}", "unsafe_labels": ["bad", 1]}
ROWS = {"path": "rows.jsonl"}
# Every section and every kind of judge; the config of a test differs from it in one key.
SOUND: dict[str, Any] = {  # copied below: sections are not shared
    "run": {"output_dir": "runs/x"},
    "model": {"path": "m", "roles": {"a.*": "mlp.up"}},
    "judge": GUARD,
    "data": {"prompts": ROWS, "responses": "r.jsonl", "tuning": ROWS, "benign": ROWS},
    "esi": {},
    "select": {},
    "tune": {"mask": "mask", "data": {**ROWS, "benign": ROWS}},
    "perturb": {"mask": "mask"},
    "eval": {
        "models": [{"path": "a"}, {"path": "b", "name": "n"}],
        "judges": [
            {**GUARD, "name": "guard"}, CLASSIFIER, {"kind": "yes_no", "path": "y", "template": "{response}?"},
            {"kind": "rubric", "model": "r", "extra": {"seed": 1}}, {"kind": "words"},
        ],
        "prompts": [ROWS], "benign": [ROWS], "tasks": [{"name": "gsm8k"}],
    },
    "deepspeed": {"zero_optimization": {"stage": 3}},
}  # fmt: skip
SOUND = json.loads(json.dumps(SOUND))
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2**32, 10**400, 0.0, -0.0, 0.5, 1e308, 1e-320, float("nan"), float("inf"), "", " ",
    "auto", "x", "~nouser/x", "x" * 5000, "a\0b", "\ud800", "a\x85b\u2028c", "é" * 300, "{}", "yes", "1e-4", "0x1f",
    "12:30", "- a", "a: b", "a #b", "!!python/none", [], [None], ["x", 1], [[]], {}, {"": 1}, {"x": None}, DEEP,
]  # fmt: skip


def keys(section: Any, model: type[BaseModel], path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every key below a section, whether ``SOUND`` has it or not."""
    for name, field in model.model_fields.items():
        yield (*path, name)
        value, models = section.get(name), sections_of(field.annotation)
        for index, part in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if models and isinstance(part, dict):
                kind = part.get("kind")
                fits = [
                    m for m in models if kind in typing.get_args(getattr(m.model_fields.get("kind"), "annotation", 0))
                ]
                yield from keys(part, (fits or models)[0], (*path, name) if index is None else (*path, name, index))


KEYS = list(keys(SOUND, Config))


def with_value(key: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(SOUND)
    section: Any = raw
    for part in key[:-1]:
        section = section[part]
    section[key[-1]] = value
    return raw


def check(raw: dict[str, Any], key: tuple[str | int, ...]) -> None:
    """Accepted, and then the same after writing and reading; or refused in the section of the key."""
    config = outcome(lambda: validate(raw))
    if isinstance(config, UserError):
        dotted = ".".join(map(str, key))
        near = dotted.rpartition(".")[0] if len(key) > 1 else dotted
        assert config.field.startswith(near) or dotted in str(config), (key, config)
        assert "see docs" not in config.remedy, (key, config)  # an installed package has no docs
        return
    section = config.model_dump()[key[0]]
    assert parse_yaml(dump_yaml(section)) == section, key


def test_every_key_takes_or_refuses_every_kind_of_value() -> None:
    assert len(KEYS) > 150 and isinstance(validate(SOUND), Config)
    for key in KEYS:
        for value in VALUES:
            check(with_value(key, value), key)


texts = st.text(st.characters(codec=None), max_size=20)  # half surrogate pairs too
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(scalars, lambda some: st.lists(some, max_size=3) | st.dictionaries(texts, some, max_size=3))


@fuzz(150)
@given(key=st.sampled_from(KEYS), value=values)
def test_random_values(key: tuple[str | int, ...], value: Any) -> None:
    check(with_value(key, value), key)


@fuzz(150)
@given(
    key=st.sampled_from([*map(".".join, (map(str, key) for key in KEYS)), "", ".", "run.", "eval.judges.9.x"]),
    text=texts,
)
def test_overrides(key: str, text: str) -> None:
    """A plain text is the value as it stands, or is refused."""
    raw = copy.deepcopy(SOUND)
    if not isinstance(outcome(lambda: apply_override(raw, f"{key}={text}")), UserError):
        outcome(lambda: validate(raw))


@fuzz(120)
@given(data=st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No key that was written is lost in silence: whatever is read back has a meaning of its own, or is refused."""
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_bytes(data.draw(damaged_bytes(dump_yaml(SOUND).encode())))
    outcome(lambda: load_config(str(file), []))


NESTED = [
    "[" * 5000,
    "{a: " * 5000,
    "- " * 5000,
    "&a [*a]",
    "a: &a {<<: *a}",
    "? [a]\n: b",
    "\0",
    "\ufeff" * 3,
    "a: 1\na: 2",
]
BOMB = "x0: &x0 [a]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize("text", [*NESTED, BOMB, "1" * 6000, "a: " + "1" * 6000, "a: !!python/object:os.system x"])
def test_texts_that_are_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert isinstance(outcome(lambda: load_config(str(tmp_path / "config.yaml"), [])), UserError)
    with pytest.raises(UserError), limited():
        load_config(str(tmp_path / "config.yaml"), [])


@pytest.mark.parametrize("path", ["~nouser/x.yaml", "x" * 5000, "a\0b", "", ".", "/dev/null", "\ud800"])
def test_paths_that_are_no_file(path: str) -> None:
    assert isinstance(outcome(lambda: load_config(path, [])), UserError)


DEEPSPEED_KEYS = [
    ("zero_optimization",), ("zero_optimization", "stage"), ("zero_optimization", "offload_param"),
    ("zero_optimization", "offload_param", "device"), ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "stage3_param_persistence_threshold"), ("zero_optimization", "reduce_bucket_size"),
    ("zero_optimization", "mics_shard_size"), ("train_batch_size",), ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",), ("gradient_clipping",), ("bf16",), ("bf16", "enabled"), ("fp16",), 
    ("fp16", "enabled"), ("optimizer",), ("scheduler",), ("amp",), ("elasticity",), ("csv_monitor",),
    ("csv_monitor", "enabled"),
    ("tensorboard",), ("wandb", "enabled"), ("expert_parallel",), ("expert_parallel", "enabled"), ("unknown",),
    ("activation_checkpointing",), ("steps_per_print",), ("wall_clock_breakdown",), ("communication_data_type",),
]  # fmt: skip


def test_every_key_of_the_deepspeed_section() -> None:
    for stage in ("esi", "set", "spa"):
        for key in DEEPSPEED_KEYS:
            for value in VALUES:
                raw = copy.deepcopy(SOUND)
                section = raw["deepspeed"]
                for part in key[:-1]:
                    section = section.setdefault(part, {})
                section[key[-1]] = value
                config = outcome(lambda raw=raw: validate(raw))
                if not isinstance(config, UserError):
                    refused = outcome(lambda config=config, stage=stage: resolve_deepspeed(config, 2, stage))
                    assert not isinstance(refused, UserError) or refused.field.startswith("deepspeed"), refused
