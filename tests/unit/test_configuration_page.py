"""``docs/configuration.md`` is what the config says."""

from __future__ import annotations

from conftest import ROOT

from esi_ds.config import Config, Eval, Perturb, Tune
from esi_ds.config.describe import default_text, markdown, sections_of
from esi_ds.config.judges import EvalYesNo
from esi_ds.config.scoring import Esi, Select
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
