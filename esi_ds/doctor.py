"""``esi-ds doctor``: whether this machine can run what the package does, and how to mend what is wrong.

One line a check, ``ok``, ``note`` or ``wrong``; exit code 1 if anything is wrong. No ranks start, no model is loaded.
Each check imports for itself what need not be there or may be broken: the others still run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from esi_ds.errors import UserError
from esi_ds.terminal import clean_output

DESCRIPTION = "Show what this machine has, what it lacks, and how to fix it. Exit code 1 if anything is wrong."
GB, GIB = 10**9, 2**30
WRITTEN = 256 * 2**20  # bytes of the write test: more than a disk's own cache hides, seconds on the slowest
EXTRAS = {  # extra → (a module of it, what it is for)
    "eval": ("lm_eval", "eval.tasks"),
    "mpi": ("mpi4py", "mpirun"),
    "real": ("gguf", "make real-models"),
    "study": ("peft", "the study's LoRA cells"),
    "trl": ("trl", "examples/trl_trainer.py"),
}
# What to do where a library that a check needs is missing or broken.
REINSTALL = "install the package that fails again: pip install --force-reinstall NAME"
REINSTALL_TORCH = "install PyTorch again, as pytorch.org says for this machine"
NO_KERNELS = "if another process holds it (nvidia-smi), end that; else install a PyTorch with kernels for it"


@dataclass(frozen=True)
class Finding:
    """What one check says. remedy: how to mend what is wrong, or what to know about a note."""

    state: Literal["ok", "note", "wrong"]
    subject: str
    fact: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:5}  {self.subject:12}  {self.fact}" + (f"; {self.remedy}" if self.remedy else "")


def packages() -> Iterator[Finding]:
    """Every requirement of the installed package against what is installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("esi_ds") or []]
    except metadata.PackageNotFoundError:
        remedy = "run `pip install .` in the checkout, so that what it needs is installed too"
        yield Finding("note", "packages", "esi_ds itself is not installed, only on Python's path", remedy)
        return
    sound = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("wrong", "packages", f"{requirement.name} is missing", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            sound.append(f"{requirement.name} {version}")
        else:
            problem = f"{requirement.name} {version} is not {requirement.specifier}"
            yield Finding("wrong", "packages", problem, f"pip install '{requirement}'")
    yield Finding("ok", "packages", f"Python {sys.version.split()[0]}, {', '.join(sound)}")


def extras() -> Iterator[Finding]:
    """Which optional parts are installed."""
    for extra, (module, user) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("note", f"extra {extra}", "not installed", f"for {user}: pip install 'esi_ds[{extra}]'")
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def accelerator() -> Iterator[Finding]:
    """GPUs as PyTorch sees them, their memory, and NCCL."""
    import torch

    if torch.cuda.is_available():
        yield from _gpus()
    else:
        yield _without_gpu()
    yield _nccl()


def _without_gpu() -> Finding:
    import torch

    from esi_ds.models.native import computes_bf16

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        remedy = "unset it, or name the GPUs that PyTorch may use"
        return Finding("note", "accelerator", f"CUDA_VISIBLE_DEVICES is {hidden or 'empty'}: no GPU is shown", remedy)
    if listing := _listed_gpus():
        if hidden and torch.version.cuda is not None and not _names_one(hidden, listing):
            remedy = "unset it, or name GPUs that nvidia-smi -L lists"
            return Finding("wrong", "accelerator", f"CUDA_VISIBLE_DEVICES is {hidden}: no GPU of this host", remedy)
        reason = "PyTorch is a build for CPUs" if torch.version.cuda is None else "its driver does not answer"
        remedy = f"PyTorch {torch.__version__} sees none; install a build for its CUDA (pytorch.org), or a GPU driver"
        return Finding("wrong", "accelerator", f"there is an NVIDIA GPU, but {reason}", remedy)
    fact = "no GPU" + (", though nvidia-smi is there" if shutil.which("nvidia-smi") else "")
    emulated = "" if computes_bf16() else "; it emulates bf16: model.dtype: auto takes fp32"
    return Finding("note", "accelerator", fact, f"stages run on the CPU with gloo: correct, but slow{emulated}")


def _listed_gpus() -> str:
    """What nvidia-smi lists, GPUs and their slices; empty without a GPU, without the program, or if its driver does not
    answer."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return listing if listing.startswith("GPU ") else ""


def _names_one(visible: str, listing: str) -> bool:
    """Whether the first GPU of CUDA_VISIBLE_DEVICES is among those listed: CUDA shows none behind one that is not."""
    first = visible.split(",")[0].strip()
    if first.isdecimal():
        return int(first) < sum(line.startswith("GPU ") for line in listing.splitlines())
    return first in listing


def _gpus() -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count()):
        try:
            finding = _gpu(number)
        except Exception as error:  # PyTorch has several for CUDA's errors; the other GPUs may be sound
            finding = Finding("wrong", "accelerator", f"GPU {number}: {_said(error)}", NO_KERNELS)
        yield finding


def _gpu(number: int) -> Finding:
    """Memory and kind of one GPU, which has to add two numbers."""
    import torch

    free, total = torch.cuda.mem_get_info(number)
    (torch.ones(1, device=f"cuda:{number}") + 1).item()
    name, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
    fact = f"GPU {number}: {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 0.9 * total:
        return Finding("note", "accelerator", fact, "another process uses it: see nvidia-smi")
    if capability < (8, 0):
        return Finding("note", "accelerator", fact, "it does not compute bf16: model.dtype: auto takes fp32")
    return Finding("ok", "accelerator", fact)


def _nccl() -> Finding:
    """What ranks on GPUs talk through."""
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # of PyTorch
    except AttributeError:
        if has_gpu:
            return Finding("wrong", "NCCL", "PyTorch was built without it", "install a build of PyTorch with NCCL")
        return Finding("note", "NCCL", "not in this build of PyTorch", "gloo is used")
    return Finding("ok", "NCCL", version) if has_gpu else Finding("note", "NCCL", version, "unused without a GPU")


def ranks() -> Iterator[Finding]:
    """What the launcher says about this process, and the host's cores and memory."""
    import psutil

    from esi_ds import launch_environment
    from esi_ds.host_memory import available_bytes

    try:
        launch = launch_environment.read()
    except UserError as error:
        yield Finding("wrong", "ranks", str(error))
    else:
        launched_as = f"rank {launch.rank} of {launch.world_size}, started by {launch.launcher}"
        alone = "start this command as you start a job, to see the job's ranks" if launch.world_size == 1 else ""
        yield Finding("ok", "ranks", launched_as, alone)
    free, total = available_bytes(), psutil.virtual_memory().total
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", "host", f"{cores} cores, {free / GIB:.1f} GiB free of {total / GIB:.1f} GiB")


def hub() -> Iterator[Finding]:
    """Whether models and data sets can be had from the hub, and where they are kept."""
    from huggingface_hub import constants

    from esi_ds.stages.plan.notes import hub_answers

    if constants.HF_HUB_OFFLINE:
        yield Finding("ok", "hub", f"HF_HUB_OFFLINE is set: only files already in {constants.HF_HOME} are used")
    elif hub_answers():
        yield Finding("ok", "hub", f"{constants.ENDPOINT} answers; files are kept in {constants.HF_HOME}")
    else:
        remedy = "give folders as paths, or download on a machine with a network and set HF_HUB_OFFLINE=1"
        yield Finding("note", "hub", f"{constants.ENDPOINT} cannot be reached", remedy)


def storage(folder: Path) -> Iterator[Finding]:
    """How fast, and how much, can be written where runs go."""
    block = os.urandom(2**22)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError as error:
        yield Finding("wrong", "storage", f"{folder}: {error.strerror}", "name a folder you may write to: --dir DIR")
        return
    free = shutil.disk_usage(folder).free
    fact = f"{folder.resolve()}: {WRITTEN / seconds / GB:.2f} GB/s written, {free / GIB:.0f} GiB free"
    yield Finding("ok", "storage", fact, "scores take 4 bytes a weight, an exported model 2")


def careful(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check says, up to where it fails: most likely a library that it needs is missing or broken."""
    try:
        yield from check()
    except Exception as error:  # a broken library raises anything
        remedy = REINSTALL_TORCH if subject == "accelerator" else REINSTALL
        yield Finding("wrong", subject, _said(error), remedy)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="esi-ds doctor", description=DESCRIPTION)
    parser.add_argument("--dir", type=Path, default=Path("."), help="where runs will be written (here)")
    return parser


@clean_output()
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code: 1 if anything is wrong."""
    folder = make_parser().parse_args(argv).dir
    checks = {check.__name__: check for check in (packages, accelerator, ranks, hub, extras)}
    findings: list[Finding] = []
    for subject, check in {**checks, "storage": lambda: storage(folder)}.items():
        for finding in careful(subject, check):
            print(finding, flush=True)
            findings.append(finding)
    wrong = sum(finding.state == "wrong" for finding in findings)
    print("nothing is wrong" if not wrong else f"{wrong} to fix")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
