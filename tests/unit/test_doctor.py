"""``esi-ds doctor``: what is wrong is said with its remedy, and exits with 1."""

from __future__ import annotations

import builtins
import configparser
import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from esi_ds import doctor


def test_a_sound_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "hub", lambda: iter(()))  # no network in the tests
    assert doctor.main(["--dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "GB/s written" in output and output.endswith("nothing is wrong\n")
    assert "ninja" not in output and "c++" not in output  # no stage compiles anything
    assert not list(tmp_path.iterdir())


def test_extras_are_those_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(doctor.EXTRAS) == set(setup["options.extras_require"]) - {"test"}


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["nowhere>=1", "torch>=99", "numpy>=2; extra == 'x'"])
    missing, old, rest = doctor.packages()
    assert missing.state == old.state == "wrong" and rest.state == "ok" and "numpy" not in rest.fact
    assert "nowhere is missing" in missing.fact and missing.remedy == "pip install 'nowhere>=1'"
    assert "is not >=99" in old.fact


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int, *lines: str) -> None:
    """A program of that name that ends with ``code``, and a PyTorch that sees no GPU."""
    said = "\n".join(f"echo '{line}'" for line in lines)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{said}\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_build_of_pytorch_for_cpus_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(monkeypatch, tmp_path, 0, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)")
    monkeypatch.setattr(torch.version, "cuda", None)
    problem, _ = doctor.accelerator()
    assert problem.state == "wrong" and "build for CPUs" in problem.fact and "CUDA" in problem.remedy


@pytest.mark.parametrize(("code", "line"), [(0, "No devices found."), (9, "NVIDIA-SMI has failed")])
def test_nvidias_tool_without_a_gpu(code: int, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A login node, or an image with the driver's tools."""
    nvidia_smi(monkeypatch, tmp_path, code, line)
    note, _ = doctor.accelerator()
    assert note.state == "note" and note.fact == "no GPU, though nvidia-smi is there" and "gloo" in note.remedy


@pytest.mark.parametrize(("value", "words"), [("", "is empty"), ("-1", "is -1")])
def test_a_variable_that_hides_every_gpu(
    value: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi(monkeypatch, tmp_path, 0, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    note, _ = doctor.accelerator()
    assert note.state == "note" and words in note.fact and note.remedy.startswith("unset it")


@pytest.mark.parametrize("visible", ["7", "1,0", "GPU-8bb3", "MIG-7"])
def test_a_variable_that_names_no_gpu_of_this_host(
    visible: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch and the driver are sound; where the first one is there, they are not."""
    nvidia_smi(monkeypatch, tmp_path, 0, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)", "  MIG 1g.10gb (UUID: MIG-2)")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problem, _ = doctor.accelerator()
    assert problem.state == "wrong" and f"CUDA_VISIBLE_DEVICES is {visible}" in problem.fact
    assert problem.remedy.startswith("unset it")
    for sound in ("0", "0,7", "GPU-1", "MIG-2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", sound)
        problem, _ = doctor.accelerator()
        assert problem.state == "wrong" and "driver does not answer" in problem.fact


def sound_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is free, one that something else uses, one that knows no bf16."""
    free, capabilities = [79 << 30, 20 << 30, 15 << 30], [(9, 0), (9, 0), (7, 0)]
    totals, ones = [80 << 30, 80 << 30, 16 << 30], torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], totals[number]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capabilities[number])
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        (torch.cuda, "mem_get_info", "CUDA error: out of memory\nCUDA kernel errors might be"),
        (torch, "ones", "CUDA error: no kernel image is available for execution on the device"),
    ],
)
def test_a_gpu_that_cannot_compute(module, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds it, or PyTorch is built for others. The rest is shown all the same."""
    sound_gpus(monkeypatch)
    sound = getattr(module, name)

    def call(argument: int, device: str = ""):
        if f"{device}{argument}" in ("1", "cuda:11"):
            raise RuntimeError(text)
        return sound(argument, **({"device": device} if device else {}))

    monkeypatch.setattr(module, name, call)
    first, wrong, third, _ = doctor.accelerator()
    assert [first.state, wrong.state, third.state] == ["ok", "wrong", "note"]
    assert wrong.fact == f"GPU 1: RuntimeError: {text.splitlines()[0]}"
    assert "nvidia-smi" in wrong.remedy and "PyTorch again" not in wrong.remedy


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """And PyTorch without NCCL."""
    sound_gpus(monkeypatch)

    def no_nccl() -> None:
        raise AttributeError("_nccl_version")

    monkeypatch.setattr(torch.cuda.nccl, "version", no_nccl)
    findings = list(doctor.accelerator())
    assert [finding.state for finding in findings] == ["ok", "note", "note", "wrong"]
    assert "nvidia-smi" in findings[1].remedy and "fp32" in findings[2].remedy


@pytest.mark.parametrize(("version", "words"), [((2, 28, 9), "2.28.9; unused"), (None, "not in this build")])
def test_nccl_without_a_gpu(version: tuple[int, ...] | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    monkeypatch.delattr(torch._C, "_nccl_version", raising=False)
    if version is not None:
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    gpu, nccl = map(str, doctor.accelerator())
    assert "no GPU" in gpu and nccl.startswith("note   NCCL") and words in nccl


def test_a_broken_pytorch_stops_no_other_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that fails halfway may raise anything. Nor does the command itself need what it checks."""
    plain = builtins.__import__

    def broken(name: str, *arguments, **keywords):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file\nand more")
        if name in ("psutil", "packaging.requirements"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return plain(name, *arguments, **keywords)

    for module in [module for module in sys.modules if module.startswith("esi_ds")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", broken)
    command = importlib.import_module("esi_ds.doctor")
    monkeypatch.setattr(command, "hub", lambda: iter(()))  # no network in the tests
    assert command.main(["--dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line.split()[1:3] for line in lines if line.startswith("wrong")]
    assert wrong == [
        ["packages", "ModuleNotFoundError:"],
        ["accelerator", "OSError:"],
        ["ranks", "ModuleNotFoundError:"],
    ]
    assert "libcudart.so.12: cannot open shared object file; install PyTorch again" in lines[1]
    assert "GB/s written" in lines[-2] and lines[-1] == "3 to fix"


def test_variables_of_a_launcher_that_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    problem, host = doctor.ranks()
    assert problem.state == "wrong" and host.state == "ok"


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = doctor.storage(tmp_path / "missing")
    assert problem.state == "wrong" and "--dir" in problem.remedy
