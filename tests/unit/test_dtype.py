"""``model.dtype: auto``: what the machine computes natively, one type for all ranks, kept for restarts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from esi_ds.cli import main
from esi_ds.config import EsiGuard, resolved_yaml, validate
from esi_ds.errors import UserError
from esi_ds.models.native import computes_bf16
from esi_ds.stages import begun
from esi_ds.stages.begun import check_same_on_all_ranks, with_dtype
from esi_ds.zero import placement, runtime


def config(folder: Path, dtype: str = "auto"):
    return validate({"run": {"output_dir": str(folder)}, "model": {"path": "m", "dtype": dtype}})


def on_machine(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(begun, "computes_bf16", lambda: native)


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
    ],
)
def test_what_a_cpu_computes(monkeypatch: pytest.MonkeyPatch, flags: dict, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert computes_bf16() is native


@pytest.mark.parametrize("major", [7, 8, 9])
def test_what_a_gpu_computes(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """torch's own answer, without the types that it would emulate."""
    properties = type("Properties", (), {"major": major})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert computes_bf16() is (major >= 8)


def test_a_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not computes_bf16()


@pytest.mark.parametrize(("native", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_is_native(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], native: bool, dtype: str
) -> None:
    on_machine(monkeypatch, native)
    resolved = with_dtype(config(tmp_path))
    assert resolved.model.dtype == dtype and resolved == config(tmp_path, dtype)
    assert capsys.readouterr().out.startswith(f"model.dtype: auto is {dtype} (this machine ")


@pytest.mark.parametrize("began", ["bf16", "fp32"])
def test_a_restart_on_another_machine_keeps_the_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], began: str
) -> None:
    on_machine(monkeypatch, began != "bf16")
    (tmp_path / "config.yaml").write_text(resolved_yaml(config(tmp_path, began)))
    assert with_dtype(config(tmp_path)).model.dtype == began
    assert f"auto is {began} (as the run in {tmp_path} began)" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("model: [")  # whoever opens the folder refuses it
    assert with_dtype(config(tmp_path)).model.dtype == ("fp32" if began == "bf16" else "bf16")


@pytest.mark.parametrize(
    ("dtype", "native", "warns"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_emulated_bf16_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype, native, warns
) -> None:
    on_machine(monkeypatch, native)
    assert with_dtype(config(tmp_path, dtype)) == config(tmp_path, dtype)
    assert ("emulates bf16" in capsys.readouterr().out) is warns


def test_ranks_of_unlike_hosts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_on_all_ranks(config(tmp_path, "bf16"))  # a group of one
    chosen = [("bf16", "new"), ("bf16", "new"), ("fp32", "old")]
    gathered = [({"dtype": dtype, "date": "2026-11-28"}, 0, host) for dtype, host in chosen]
    monkeypatch.setattr(runtime, "gather_objects", lambda mine: gathered)
    with pytest.raises(UserError, match=r"model.dtype.*is bf16 on new and fp32 on old; name the type"):
        check_same_on_all_ranks(config(tmp_path, "bf16"))


@pytest.mark.parametrize("native", [True, False])
def test_plan_and_config_have_the_type_that_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], native: bool
) -> None:
    on_machine(monkeypatch, native)
    monkeypatch.chdir(ROOT)
    overrides = ["model.dtype=auto", f"run.output_dir={tmp_path / 'run'}"]
    assert main("esi", ["--config", "demo/esi", "--dry-run", *overrides]) == 0
    output = capsys.readouterr().out
    assert f"dtype: {'bf16' if native else 'fp32'}\n" in output and "for other machines, name the type" in output


@pytest.mark.parametrize(("own", "expected"), [("auto", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_a_judge_that_is_cut_over_the_ranks_has_its_own_dtype(
    own: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load_sharded(source: object, dtype: str, settings: dict, **options: object) -> SimpleNamespace:
        loaded.append((dtype, settings["bf16"]["enabled"]))
        return SimpleNamespace(module=torch.nn.Linear(1, 1))

    for name, replaced in (
        ("load_sharded", load_sharded),
        ("model_class", lambda *arguments: None),
        ("model_bytes", lambda *arguments: 1),
        ("_choose_placement", lambda *arguments: ("sharded", "so many bytes")),
        ("complete_chunks", lambda module: None),
    ):
        monkeypatch.setattr(placement, name, replaced)
    section = EsiGuard(kind="guard", path="j", family="llama-guard-3", dtype=own)  # type: ignore[arg-type]
    placement.load_judge(section, "judge", None, "bf16", {"bf16": {"enabled": True}})  # type: ignore[arg-type]
    assert loaded == [(expected, expected == "bf16")]
