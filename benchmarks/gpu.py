"""Checks and figures of this project on one GPU, in under eight minutes and without a download.

    python -m benchmarks.gpu [--output runs/gpu.jsonl] [--steps attention,throughput] [--seconds 460]
    python -m benchmarks.gpu --tiny --device cpu

The weights are random, in the shapes of Llama-3.2-1B, Llama-3.1-8B and Qwen3-MoE; with --tiny everything is small, to
try it on a CPU. Every step is a process of its own with a limit of seconds, and every part of it that is done is one
JSON line of the output at once, so that neither a failure nor a time limit loses what was measured. The steps come in
the order of their worth. Exit code 0: every step is done and every check has passed. docs/gpus.md says what is measured
and how.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT


@dataclass(frozen=True)
class Step:
    """A generator of parts, ``module:function``, and the seconds after which it is stopped."""

    name: str
    function: str
    limit: float


STEPS = (
    Step("versions", "benchmarks.gpu_checks:versions", 60),
    Step("attention", "benchmarks.gpu_checks:attention", 60),
    Step("experts", "benchmarks.gpu_checks:experts", 60),
    Step("neighbours", "benchmarks.gpu_checks:neighbours", 60),
    Step("throughput", "benchmarks.gpu_speed:throughput", 120),
    Step("end_to_end", "benchmarks.gpu_end_to_end:end_to_end", 180),
    Step("bits", "benchmarks.gpu_checks:bits", 110),
    Step("decode", "benchmarks.gpu_speed:decode", 60),
    Step("storage", "benchmarks.gpu_storage:storage", 80),
)
LEAST_SECONDS = 15  # a process needs as much to import what it uses


def append(file: Path, line: dict[str, Any]) -> None:
    """Add one line of JSON, which is on disk when this returns. A torn line, of a step that was stopped, ends first."""
    with file.open("a+b") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - 1))
        torn = opened.read(1) not in (b"", b"\n")
        opened.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def read(file: Path, first: int = 0) -> list[dict[str, Any]]:
    """The whole lines of JSON after the first ``first`` bytes; a torn one is left out."""
    lines = []
    for text in file.read_bytes()[first:].splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def work(functions: Sequence[str], output: Path, tiny: bool) -> int:
    """Run steps in this process, one after the other; 1 if one of them has raised an exception."""
    from benchmarks.measure import machine
    from esi_ds.zero import runtime

    runtime.start()
    about, code = machine(), 0
    for path in functions:
        module, _, name = path.partition(":")
        started = time.perf_counter()
        try:
            step: Callable[[bool], Iterator[dict[str, Any]]] = getattr(importlib.import_module(module), name)
            for part in step(tiny):
                append(output, {"step": name, **part, "seconds_of_part": time.perf_counter() - started, **about})
                started = time.perf_counter()
        except Exception:
            error = {"part": "error", "passed": False, "traceback": traceback.format_exc()}
            append(output, {"step": name, **error, "seconds_of_part": time.perf_counter() - started, **about})
            code = 1
    runtime.stop()
    return code


def run_step(step: Step, seconds: float, output: Path, tiny: bool, device: str) -> str:
    """Run one step in a process of its own and add a line on how it ended; returns that: done, failed, timed out."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", step.function, "--output", str(output)]
    started = time.monotonic()
    # Files of a step that is stopped are removed here; they may take 20 GB.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".gpu-", ignore_cleanup_errors=True) as scratch:
        environment = {**os.environ, "TMPDIR": scratch, **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}
        log = Path(scratch) / "log"
        with log.open("w") as opened:
            # A group of its own, for a stage that the step has launched must end with it.
            process = subprocess.Popen(
                [*command, "--tiny"] if tiny else command,
                cwd=ROOT,
                env=environment,
                stdout=opened,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
            end = wait(process, seconds)
        text = log.read_text(errors="replace")
    line = {"step": step.name, "status": end, "seconds": time.monotonic() - started, "exit_code": process.returncode}
    append(output, line if end == "done" else line | {"output": text[-4000:]})
    return end


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How a process has ended: done, failed or timed out. Whatever happens, its group has ended afterwards."""
    try:
        return "done" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def describe(line: dict[str, Any]) -> str:
    """A line of the output for a person."""
    if "status" in line:
        return f"{line['step']}: {line['status']} ({line.get('seconds', 0):.0f} s)"
    hidden = {"step", "part", "passed", "date", "device", "python", "torch", "transformers", "deepspeed", "traceback"}
    figures = {key: value for key, value in line.items() if key not in hidden}
    verdict = {True: "passed", False: "FAILED", None: "-"}[line.get("passed")]
    error = line.get("traceback", "").strip().rpartition("\n")[2]
    return f"  {verdict:6} {line['part']}: {error or json.dumps(figures)}"


def run(steps: Sequence[Step], seconds: float, output: Path, tiny: bool, device: str) -> int:
    """All steps, within ``seconds`` together; the exit code."""
    output.parent.mkdir(parents=True, exist_ok=True)
    deadline, sound = time.monotonic() + seconds, True
    for step in steps:
        before = output.stat().st_size if output.exists() else 0
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            append(output, {"step": step.name, "status": "left out", "seconds": 0.0})
        else:
            run_step(step, min(step.limit, left), output, tiny, device)
        lines = read(output, before)
        sound &= lines[-1]["status"] == "done" and all(line.get("passed") is not False for line in lines)
        for line in [lines[-1], *lines[:-1]]:
            print(describe(line), flush=True)
    print(f"{'everything has passed' if sound else 'NOT everything has passed'}: {output}")
    return 0 if sound else 1


def refusal(tiny: bool, device: str) -> str | None:
    """Why this cannot run here, or None."""
    if device == "cpu":
        return None if tiny else "--device cpu needs --tiny: models of 8 B weights are not for a CPU"
    import torch

    remedy = "use --tiny --device cpu to try everything without one"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU here; {remedy}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu.jsonl", help="JSON lines are added to it")
    parser.add_argument("--steps", default=",".join(step.name for step in STEPS), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=460, help="for all steps together; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small models and few numbers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.worker is not None:
        return work(options.worker.split(","), options.output, options.tiny)
    names, asked = [step.name for step in STEPS], options.steps.split(",")
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"--steps = {unknown[0]}: is not a step; the steps are {', '.join(names)}")
    if problem := refusal(options.tiny, options.device):
        parser.error(problem)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's processes end too
    steps = [step for step in STEPS if step.name in asked]
    return run(steps, options.seconds, options.output.absolute(), options.tiny, options.device)


if __name__ == "__main__":
    sys.exit(main())
