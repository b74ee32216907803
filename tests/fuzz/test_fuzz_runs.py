"""Readers of a run's folder: a damaged config.yaml is refused, or the run is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damage import damaged_bytes, fuzz, outcome
from hypothesis import given
from hypothesis import strategies as st

from esi_ds.artifacts import RunFolder, content_of_file, write_text_atomic
from esi_ds.config import resolved_yaml, validate
from esi_ds.errors import UserError
from esi_ds.report.experts_picture import experts_png

CONFIG = validate({"run": {"output_dir": "x"}, "model": {"path": "m"}})


@fuzz(120)
@given(data=st.data())
def test_stored_configs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """``check`` accepts the folder only for the config that it stores, keys of a start aside."""
    folder = tmp_path_factory.getbasetemp() / "run"
    folder.mkdir(exist_ok=True)
    content = data.draw(damaged_bytes(resolved_yaml(CONFIG).encode()))
    (folder / "config.yaml").write_bytes(content)
    result = outcome(lambda: RunFolder(str(folder)).check(CONFIG))
    assert result is None or isinstance(result, UserError)


def test_a_sound_config_is_accepted(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "config.yaml", resolved_yaml(CONFIG))
    assert RunFolder(str(tmp_path)).check(CONFIG) is None


def test_an_altered_report_is_not_drawn(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"units": [], "title": "a"}')
    results = {report.name: content_of_file(report)}
    (tmp_path / "manifest.json").write_text(json.dumps({"exit_state": "done", "results": results}))
    refusal = outcome(lambda: experts_png(tmp_path))
    assert isinstance(refusal, UserError) and "without experts" in refusal.problem
    report.write_text('{"units": [], "title": "b"}')
    refusal = outcome(lambda: experts_png(tmp_path))
    assert isinstance(refusal, UserError) and refusal.problem == "is not what this finished run wrote"


TEXTS = ["{", "[]", "{}", '{"units": 1}', '{"units": [1]}', '{"units": [], "routing": {}}', "[" * 100_000, "\0", "NaN"]


@pytest.mark.parametrize("text", TEXTS)
def test_reports_of_the_experts_picture(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert isinstance(outcome(lambda: experts_png(tmp_path)), UserError)
