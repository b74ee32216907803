"""``docs/configuration.md`` and the table of defaults in ``docs/guide.md`` are what the config says."""

from __future__ import annotations

import re

from conftest import ROOT
from pydantic import BaseModel

from esi_ds.config import Config, Eval, Perturb, Tune
from esi_ds.config.describe import default_text, markdown
from esi_ds.config.judges import EvalYesNo
from esi_ds.config.scoring import Esi, Select
from esi_ds.config.section import sections_of
from esi_ds.config.yaml import parse_yaml


def test_the_page_is_up_to_date() -> None:
    remedy = "python -m esi_ds.config.describe docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == markdown(), remedy


def test_every_key_has_a_sentence() -> None:
    """Those within lists, unions and sections of sections too; nothing of Python's own names is on the page."""
    sections, keys = [Config], []
    for section in sections:
        for name, field in section.model_fields.items():
            sections += [below for below in sections_of(field.annotation) if below not in sections]
            assert field.description and field.description.endswith("."), f"{section.__name__}.{name}"
            assert "|" not in field.description
            keys.append(name)
    page = markdown()
    assert all(f"| `{key}` |" in page for key in keys) and len(sections) > 20
    assert not any(word in page for word in ("typing.", "<class", "Undefined", "annotation"))


def test_a_default_is_written_as_yaml_that_gives_it() -> None:
    """Lists of words too: yes_no's verdict words begin with a capital, and are looked up as they stand."""
    assert '| `unsafe` | list of text | `["Yes"]` |' in markdown()
    for section in (Tune, Perturb, Eval, EvalYesNo, Esi, Select):
        for name, field in section.model_fields.items():
            text = default_text(field)
            if text not in ("required", "") and not sections_of(field.annotation):
                assert parse_yaml(f"key: {text.strip('`')}")["key"] == field.default, name


def defaults(sections: list[type[BaseModel]], path: str) -> list[object]:
    """The defaults of a key, one of every kind of section that has it: a judge is a guard or a classifier."""
    name, _, rest = path.partition(".")
    fields = [section.model_fields[name] for section in sections if name in section.model_fields]
    if not rest:
        return [field.default for field in fields]
    return defaults([below for field in fields for below in sections_of(field.annotation)], rest)


def test_the_guide_s_defaults_are_the_config_s() -> None:
    table = (ROOT / "docs/guide.md").read_text().split("## The config's defaults\n\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) >= 14
    for keys, values, _ in rows:
        for key, value in zip(re.findall("`(.+?)`", keys), re.findall("`(.+?)`", values), strict=True):
            of_every_kind = defaults([Config], key)
            written = parse_yaml(f"key: {value}")["key"]
            assert of_every_kind and all(default == written for default in of_every_kind), key
