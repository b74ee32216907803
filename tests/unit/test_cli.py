"""The command line: what it accepts, which exit code it gives, and what it does not import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT

from esi_ds import cli, stages
from esi_ds.cli import main
from esi_ds.errors import Interrupted, UserError
from esi_ds.options import Options


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "a.yaml"
    (tmp_path / "model").mkdir()
    # fp32: of bf16 the command line warns where the machine emulates it.
    file.write_text(f"run: {{output_dir: x}}\nmodel: {{path: {tmp_path / 'model'}, dtype: fp32}}\n")
    return str(file)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stage named ``fake`` that keeps what it was called with; ``error`` is raised if set."""
    module = types.ModuleType("esi_ds.stages.fake")
    module.calls, module.error = [], None

    def run(config, options, stage):
        module.calls.append((config, options))
        if module.error:
            raise module.error

    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(stages.ENTRIES, "fake", module.__name__)
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # other ranks replace it
    monkeypatch.setattr(cli, "end_at_signals", lambda code: None)  # this process goes on
    return module


def test_flags_and_overrides_in_any_order(stage: types.ModuleType, config: str) -> None:
    arguments = ["--local-rank=1", "select.ratio=1e-3", "--config", config, "--deepspeed", "esi.batch_size=2"]
    assert main("fake", [*arguments, "--verbose", "--dry-run", "--world-size", "64"]) == 0
    resolved, options = stage.calls[0]
    assert (resolved.select.ratio, resolved.esi.batch_size) == (0.001, 2)
    assert options == Options(dry_run=True, world_size=64, verbose=True)


@pytest.mark.parametrize(
    ("arguments", "planned"),
    [
        ([], (None, None)),
        (["--nodes", "4"], (32, 4)),
        (["--nodes", "4", "--gpus-per-node", "2"], (8, 4)),
        (["--gpus-per-node", "4"], (4, 1)),
        (["--gpus-per-node", "4", "--world-size", "16"], (16, 4)),
        (["--nodes", "2", "--world-size", "8", "--gpu-memory-gib", "141"], (8, 2)),
    ],
)
def test_what_a_dry_run_plans_for(stage, config: str, arguments: list[str], planned: tuple) -> None:
    assert main("fake", ["--config", config, "--dry-run", *arguments]) == 0
    options = stage.calls[0][1]
    assert (options.world_size, options.nodes) == planned
    assert options.gpu_memory_gib == (141 if "141" in arguments else 80)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--wrold-size", "2"],
        ["--world-size", "2"],
        ["--nodes", "2"],
        ["--gpu-memory-gib", "80"],
        ["--dry-run", "--world-size", "0"],
        ["--dry-run", "--nodes", "3", "--world-size", "8"],
        ["--dry-run", "--nodes", "2", "--gpus-per-node", "8", "--world-size", "8"],
        ["--dry-run", "--gpu-memory-gib", "nan"],
        ["--conf", "x"],
    ],
)
def test_wrong_flags_exit_2(stage: types.ModuleType, config: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main("fake", ["--config", config, *arguments])
    assert left.value.code == 2 and not stage.calls


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("a.b", 3, "must be less", "write 2"), 2, "error: a.b = 3: must be less; write 2\n"),
        (UserError("a.b", "3", "must be 3", "write 3"), 2, "error: a.b = '3': must be 3; write 3\n"),
        (UserError("a.b", ["true", "x y"], "is text", "w"), 2, "error: a.b = 'true', x y: is text; w\n"),
        (Interrupted("start again"), 75, "start again"),
        (RuntimeError("broken"), 1, "rank 0 failed"),
        (SystemExit(0), 1, "something ended the process with exit code 0"),  # DeepSpeed's autotuner does it
    ],
)
def test_exit_codes(stage: types.ModuleType, config: str, error, code: int, shown: str, capsys) -> None:
    stage.error = error
    assert main("fake", ["--config", config]) == code
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "words", "said"), [("0", [], "a line\n"), ("1", [], ""), ("1", ["--verbose"], "a line\n")]
)
def test_rank_0_alone_speaks_unless_told_otherwise(
    rank: str, words: list[str], said: str, stage, config: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(stage, "run", lambda *arguments: print("a line"))
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main("fake", ["--config", config, *words]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    "variables",
    [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")],
)
def test_a_mistake_is_told_by_rank_0_first(stage, config: str, variables, monkeypatch, capsys) -> None:
    """The others speak after some seconds, if the launcher has not ended them by then."""
    waited, codes = [], []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli, "end_at_signals", codes.append)
    for name, value in zip(("SLURM_STEP_ID", *variables), "012", strict=True):
        monkeypatch.setenv(name, value)
    assert main("fake", ["--config", config, "selct.ratio=1"]) == 2
    assert "(rank 1 on " in capsys.readouterr().err and waited == [cli.TURN_S]
    stage.error = RuntimeError("broken")  # but a rank's own failure is never silent
    assert main("fake", ["--config", config]) == 1
    assert "rank 1 failed" in capsys.readouterr().err
    stage.error = OSError(28, "No space left on device")
    assert main("fake", ["--config", config]) == 1
    assert codes == [75, 2, 75, 75, 1]  # what a signal would make of it, at the start and while it waits


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cofnig", "x"], ["--config", "x", "--nodes", "2"], ["--config", "x", "--nodes", "0"]]
)
def test_help_and_wrong_flags_are_told_by_rank_0_alone(arguments: list[str], stage, monkeypatch, capsys) -> None:
    waited, shown = [], []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            main("fake", arguments)
        assert left.value.code == (0 if arguments == ["--help"] else 2)
        shown.append("".join(capsys.readouterr()))
    assert shown[0].startswith("usage: ") and shown[1] == ""
    assert waited == ([] if arguments == ["--help"] else [cli.TURN_S])


# A stage that waits in C, as for other ranks: Python's own handlers do not run meanwhile.
WAITING = """
import ctypes, os, signal, sys, types
from esi_ds import cli, stages
def run(config, options, stage):
    signal.signal(signal.SIGUSR2, lambda *_: None)  # some other signal of somebody else's
    os.kill(os.getpid(), signal.SIGUSR2)
    print("waits", flush=True)
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
sys.modules["esi_ds.stages.fake"] = types.SimpleNamespace(run=run)
stages.ENTRIES["fake"] = "esi_ds.stages.fake"
signal.signal(signal.SIGINT, signal.default_int_handler)  # which the tests' own shell may have had ignored
cli.leave(cli.main("fake", sys.argv[1:]))
"""


def signalled(number: int, script: str, *arguments: str, rank: int = 0) -> tuple[int, str]:
    """(exit code, stderr) of a process that gets a signal once it has said something."""
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", script, *arguments, "--verbose"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout.readline() == "waits\n"
            process.send_signal(number)
            return process.wait(timeout=20), process.stderr.read()
        finally:
            process.kill()  # else leaving the block waits for it for ever


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_before_anything_is_done_is_an_interruption(config: str, number: int, rank: int) -> None:
    code, message = signalled(number, WAITING, "--config", config, rank=rank)
    assert code == 75
    assert message == ("interrupted: stopped by a signal before anything was done; start again\n" if rank == 0 else "")


@pytest.mark.parametrize(("error", "code"), [("UserError('a', 1, 'b', 'c')", 2), ("OSError(28, 'full')", 1)])
def test_a_rank_that_is_ended_while_it_lets_others_speak_keeps_its_code(config: str, error: str, code: int) -> None:
    """srun reports the greatest code: 143, of a death by its signal, would hide all others."""
    script = WAITING.replace(
        "def run(config",
        f"""
from esi_ds.errors import UserError
cli.TURN_S = 20
cli.time = types.SimpleNamespace(sleep=lambda s, sleep=cli.time.sleep: (print("waits", flush=True), sleep(s)))
def run(config, options, stage):
    raise {error}
def unused(config""",
    )
    assert signalled(signal.SIGTERM, script, "--config", config, rank=1) == (code, "")


def test_a_stage_that_listens_is_not_ended(config: str) -> None:
    script = WAITING.replace(
        "    signal.signal(signal.SIGUSR2",
        """
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    os.kill(os.getpid(), signal.SIGTERM)
    cli.time.sleep(0.3)
    if received:
        os._exit(9)
    signal.signal(signal.SIGUSR2""",
    )
    command = [sys.executable, "-c", script, "--config", config]
    assert subprocess.run(command, cwd=ROOT, timeout=20).returncode == 9


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--confg", "a.yaml"], "required: --config; --confg is not an option"),
        (["-config", "a.yaml"], "required: --config; -config is not an option"),
        (["a.yaml"], "required: --config; write --config a.yaml"),
        (["select.ratio=0.1"], "required: --config\n"),
    ],
)
def test_a_config_that_is_not_named(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main("esi", words)
    assert left.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["recipes", "show", "demo/esi"]])
def test_nobody_reads_on(words: list[str]) -> None:
    """`| head`: no traceback, and the code that a shell gives to a broken pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "esi_ds", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--config", "nowhere.yaml"], 2)])
def test_help_and_mistakes_come_before_heavy_imports(arguments: list[str], code: int) -> None:
    script = f"""
import sys
from esi_ds.cli import main
try:
    code = main("esi", {arguments!r})
except SystemExit as left:
    code = left.code
heavy = {{"torch", "deepspeed", "transformers", "datasets", "pandas"}} & set(sys.modules)
assert code == {code} and not heavy, (code, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_launcher_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """An isolated interpreter sees neither the working folder nor an editable install's path hooks."""
    script = (
        "import importlib.util, runpy, sys\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "assert importlib.util.find_spec('esi_ds') is None\n"
        f"sys.argv = ['esi.py', '--config', 'nowhere.yaml']\n"
        f"runpy.run_path({str(ROOT / 'launch/esi.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --config = nowhere.yaml"), done.stderr
    assert not done.stdout  # mistakes are on stderr alone
