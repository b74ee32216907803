"""One-line messages for failures from outside the program, and waiting for files that another host writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from esi_ds import artifacts, launch_environment
from esi_ds.config.checks import BATCH_SIZES
from esi_ds.errors import UserError, ends_with_message
from esi_ds.failures import explain
from esi_ds.reading import reading


def raised(error: BaseException, cause: BaseException) -> BaseException:
    error.__context__ = cause
    return error


def test_a_full_disk_is_told_with_the_file_and_the_folder(tmp_path: Path) -> None:
    said = explain(OSError(errno.ENOSPC, "No space left on device", "/x/scores/.tmp"), str(tmp_path))
    assert said.startswith(f"writing /x/scores/.tmp: no space left on device (run.output_dir = {tmp_path}: ")
    assert "Make room and start the same command again" in said and "\n" not in said
    (tmp_path / "cache").mkdir()
    for folder, disk in (("cache/a", f"{tmp_path}/cache"), ("run/mask", f"run.output_dir = {tmp_path}/run")):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        error = OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / folder))
        assert f"disk quota exceeded ({disk}: " in explain(error, str(tmp_path / "run"))
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert explain(rust, str(tmp_path)).startswith("no space left on device (run.output_dir")
    # Errors that follow from it are not reported.
    assert "no space left" in explain(raised(ValueError("writer is closed"), rust), str(tmp_path))


def test_writing_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, artifacts.writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")
    # As tokenizers raise it: no special class, the number in a text.
    with pytest.raises(OSError) as caught, artifacts.writing(tmp_path / "a"):
        raise Exception("No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(KeyError), artifacts.writing(tmp_path / "a"):
        raise KeyError("os error")


def test_a_rank_that_is_gone_or_does_not_come() -> None:
    gloo = "[/__w/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:1: Connection reset by peer"
    said = explain(RuntimeError(f"{gloo}. This is typically caused by a remote worker"), "x")
    assert said.startswith("lost another rank (Read error [10.0.0.1]:1: Connection reset by peer): ")
    assert explain(torch.distributed.DistNetworkError("failed to recv, connection was likely closed"), "x")
    late = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 8000ms for recv"
    assert "run.start_timeout_s at the start (Timed out waiting 8000ms for recv)" in explain(RuntimeError(late), "x")


def test_what_a_gpu_lacks_is_told_with_the_keys_that_need_less() -> None:
    message = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 5.20 GiB is "
        "free. Including non-PyTorch memory, this process has 73.88 GiB memory in use. If reserved memory is large ..."
    )
    said = explain(raised(RuntimeError("later"), torch.OutOfMemoryError(message)), "x")
    assert said.startswith(f"{message.partition(' Including')[0]} Lower the batch size")
    assert all(key in said for key in BATCH_SIZES) and "\n" not in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs"),
            "CUDA error: out of memory",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nFailed to CUDA calloc 6 bytes"
            ),
            "Failed to CUDA calloc 6 bytes",
        ),
        (
            torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:94\nCuda failure 2 'out of memory'"),
            "Cuda failure 2 'out of memory'",
        ),
    ],
)
def test_libraries_that_a_full_gpu_refuses_memory_are_understood(error: RuntimeError, line: str) -> None:
    assert explain(error, "x").startswith(f"{line}. Lower the batch size")
    with pytest.raises(type(error)), reading("model.path", "x", "give a folder that transformers reads"):
        raise error


def test_a_model_that_a_gpu_does_not_hold_is_not_blamed_on_its_folder() -> None:
    for error in (torch.OutOfMemoryError("full"), raised(RuntimeError("later"), torch.OutOfMemoryError("full"))):
        with pytest.raises(type(error)), reading("model.path", "x", "give a folder that transformers reads"):
            raise error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("timed out"), KeyError("timeout")])
def test_any_other_error_keeps_its_traceback(error: Exception) -> None:
    assert explain(error, "x") is None


def test_a_file_that_appears_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(artifacts, "MESSAGE_S", 0.1)
    late = tmp_path / "position-4" / "state.json"

    def appear() -> None:
        time.sleep(0.4)
        late.parent.mkdir()
        late.touch()

    thread = threading.Thread(target=appear)
    thread.start()
    assert artifacts.wait_until_visible(late) == late
    thread.join()
    assert f"is waiting for {late} to appear" in capsys.readouterr().err


def test_the_wait_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"does not see it after 0.2 s: is run.output_dir a folder that all hosts"):
        artifacts.wait_until_visible(tmp_path / "never", 0.2)


def test_the_launcher_is_known_by_its_command_line() -> None:
    """A shell that starts a rank by hand is no launcher: one may log out and leave the job running."""
    script = (
        "import os; from esi_ds import launch_environment as e; "
        "print(e.launcher_processes(e.read()) == ((os.getpid(), os.getppid()),))"
    )
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    for words, expected in ((["torchrun"], "True"), ([], "False")):
        # A python that starts another one, as launchers do; what it is shows in its arguments.
        parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
        command = [sys.executable, "-c", parent, script, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr
    assert launch_environment.launcher_processes(launch_environment.ALONE) == ()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Path("a/b"), "a/b"),
        (["one"], "one"),
        (("one", Path("two")), "one, two"),
        ([], "[]"),
        (["<t>", ""], "['<t>', '']"),  # joined, the empty one would not be seen
        ([1, 2], "[1, 2]"),
        ({"safe": 1}, "{'safe': 1}"),
        (0.5, "0.5"),
    ],
)
def test_a_message_shows_values_as_users_write_them(value: object, shown: str) -> None:
    assert str(UserError("--x", value, "is wrong", "give another")) == f"--x = {shown}: is wrong; give another"


def test_a_command_ends_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    @ends_with_message
    def command(words: list[str]) -> int:
        """The command; its exit code."""
        if words:
            raise UserError("FILE", words[0], "is not there", "give another")
        return 7

    assert command([]) == 7 and command(["a\x1b"]) == 2 and command.__name__ == "command"
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: FILE = a\\x1b: is not there; give another\n")
