"""``docs/configuration.md`` is what the config says."""

from __future__ import annotations

from conftest import ROOT

from esi_ds.config import Config
from esi_ds.config.describe import markdown, sections_of


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
