"""All checks of one architecture, in a process (per rank) of its own: one that hangs or dies stops nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in ("", "dist", "sweep"))]

import checks  # noqa: E402
import score_worker  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from builders import PAIRS, build_guard, byte_bpe_tokenizer  # noqa: E402
from conftest import free_port  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from esi_ds.config import validate  # noqa: E402
from esi_ds.deepspeed_config import resolve_deepspeed  # noqa: E402
from esi_ds.errors import UserError  # noqa: E402
from esi_ds.models.folder import ModelSource  # noqa: E402
from esi_ds.zero import runtime  # noqa: E402
from esi_ds.zero.engine import load_sharded  # noqa: E402

NUM_PAIRS = 4
TIMEOUT_S = 300
Verdicts = dict[str, str]  # by the check's name; "class" names the model's class


def guarded(check: Callable[[], str]) -> str:
    """A check's verdict; what it raises is one too."""
    try:
        return check()
    except (UserError, AssertionError) as error:
        # The scoring worker asserts that no UserError ends its case.
        cause = error.args[0] if isinstance(error, AssertionError) and error.args else error
        if isinstance(cause, UserError):
            return f"refused: {' '.join(str(cause).split())}"
        return failure(error)
    except Exception as error:  # any architecture may fail in any way
        return failure(error)


def failure(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"fails: {checks.first_line(error)} ({Path(last.filename).name}:{last.lineno})"


def stage_settings(folder: Path) -> dict[str, dict]:
    """The config of a scoring run on the model, guard and pairs in ``folder``."""
    return {
        "run": {"output_dir": str(folder / "run"), "tensorboard": False},
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "judge": {"path": str(folder / "guard"), "placement": "replicated"},
        "data": {"responses": str(folder / "pairs.jsonl")},
        "esi": {"batch_size": 2},
        "select": {"ratio": 0.03},
    }


def prepare(model_type: str, folder: Path) -> str | None:
    """Save the tiny model, a guard and pairs. Returns why there is no model, or None."""
    try:
        tiny.build(model_type, folder / "model", byte_bpe_tokenizer())
        model = plain_model(folder)
    except Exception as error:  # any architecture may fail in any way
        return f"unknown: no tiny model ({checks.first_line(error)})"
    build_guard(folder / "guard", byte_bpe_tokenizer())
    pairs = ({"prompt": prompt, "response": response} for prompt, response in PAIRS[:NUM_PAIRS])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return checks.cannot_run(model)


def plain_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def check_under_zero(model: PreTrainedModel, folder: Path) -> Verdicts:
    """The checks that every rank takes part in."""
    settings = stage_settings(folder)
    verdicts: Verdicts = {}

    def load() -> str:
        config = validate(settings)
        deepspeed = resolve_deepspeed(config, runtime.world_size())
        sharded = load_sharded(ModelSource.of(config.model), config.model.dtype, deepspeed)
        verdicts["loading"] = checks.loading(model, sharded)
        return checks.answers(model, sharded, byte_bpe_tokenizer())

    def score() -> str:
        score_worker.leave_out_pages()
        score_worker.run_case({"config": settings})
        return checks.scores(model, folder, PAIRS[:NUM_PAIRS]) if runtime.is_main() else "right"

    verdicts["answers"] = guarded(load)
    verdicts.setdefault("loading", verdicts["answers"])
    verdicts["scores"] = guarded(score)
    return verdicts


def examine(model_type: str, folder: Path, rank: int) -> Verdicts:
    """Every check's verdict. Rank 0 makes the folder; the others wait for its ``reason.json``."""
    reason_file = folder / "reason.json"
    if rank == 0:
        written = reason_file.with_suffix(".tmp")
        written.write_text(json.dumps(prepare(model_type, folder)))
        written.rename(reason_file)
    while not reason_file.is_file():
        time.sleep(0.05)
    if (reason := json.loads(reason_file.read_text())) is not None:
        return dict.fromkeys(checks.CHECKS, reason)
    model = plain_model(folder)
    verdicts: Verdicts = {"class": type(model).__name__}
    if rank == 0:
        verdicts["units"] = guarded(lambda: checks.units(model))
        verdicts["rows"] = guarded(lambda: checks.rows(model))
    runtime.start()
    return without_unreachable(verdicts | check_under_zero(model, folder))


def without_unreachable(verdicts: Verdicts) -> Verdicts:
    """Where the stage refuses the model, nobody meets what would be wrong."""
    refusal = verdicts["scores"]
    if not refusal.startswith("refused"):
        return verdicts
    return {check: refusal if verdict.startswith("wrong") else verdict for check, verdict in verdicts.items()}


def start_rank(model_type: str, folder: Path, rank: int, ranks: int, port: int) -> int:
    """Fork the process of one rank; its process id. Rank 0 leaves ``verdicts.json``, each rank its errors."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder / f"errors-{rank}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in sizes.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "sweep"}
        torch.set_num_threads(1)
        verdicts = examine(model_type, folder, rank)
        if rank == 0:
            (folder / "verdicts.json").write_text(json.dumps(verdicts))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # no clean-up: exit handlers and locks are the parent's


def wait_for(processes: list[int], deadline: float) -> bool:
    """Whether all have ended before the deadline (of ``time.monotonic``); those that have not are killed."""
    left = set(processes)
    while left and time.monotonic() < deadline:
        left -= {process for process in left if os.waitpid(process, os.WNOHANG)[0]}
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return not left


def run(model_type: str, ranks: int = 1, timeout_s: float = TIMEOUT_S) -> Verdicts:
    """Verdicts on one architecture, whatever happens to its processes. To be called before this process computes
    anything: what is forked has one thread."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    port = free_port()
    processes = [start_rank(model_type, folder, rank, ranks, port) for rank in range(ranks)]
    ended = wait_for(processes, time.monotonic() + timeout_s)
    file = folder / "verdicts.json"
    if file.is_file():
        verdicts = json.loads(file.read_text())
    else:
        lines = (folder / "errors-0.txt").read_text(errors="replace").strip().splitlines()
        reason = (
            f"the process dies ({lines[-1][:200] if lines else 'silently'})" if ended else f"over {timeout_s:.0f} s"
        )
        verdicts = dict.fromkeys(checks.CHECKS, f"fails: {reason}")
    shutil.rmtree(folder)
    return {check: verdict.replace(f"{folder}/", "") for check, verdict in verdicts.items()}
