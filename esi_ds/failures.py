"""One line instead of a traceback for failures from outside the program: full disks and memory, and lost ranks."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

# Words in the errors of gloo, NCCL and torch's store for a lost connection and for a timeout.
GONE = ("connection closed", "connection reset", "connection was likely closed", "remote process exited", "broken pipe")
LATE = ("timed out", "timeout")
FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded", errno.EROFS: "read-only"}
# What the CUDA runtime, cuBLAS and NCCL say where a GPU's memory is full; also ROCm's.
NO_MEMORY = re.compile(r"(CUDA|HIP) error: out of memory|_STATUS_ALLOC_FAILED|Cuda failure.*out of memory|CUDA calloc")

# Of what a file system cannot do at all: hard links, locks, or flushing a folder.
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def is_full(error: BaseException) -> bool:
    """Whether writing failed for lack of space, as it may on other ranks too."""
    return why_full(error) is not None


def why_full(error: BaseException) -> str | None:
    """What keeps a disk from taking more, in words; None for any other error."""
    return next((FULL[number] for cause in _causes(error) if (number := _number(cause)) in FULL), None)


def explain(error: BaseException, output_dir: str) -> str | None:
    """One line about a full disk, a GPU whose memory is full, a lost rank or one that never arrived; None for any other
    error."""
    causes = _causes(error)
    # A file that cannot be written cannot be closed either, and only the later of the two errors may name it.
    files = (getattr(cause, "filename", None) for cause in causes if _number(cause) in FULL)
    file = next(filter(None, files), None)
    for cause in causes:
        if (number := _number(cause)) in FULL:
            return _full(FULL[number], file, output_dir)
        if (line := _lack_of_memory(cause)) is not None:
            return _out_of_memory(line)
        if not _is_of_a_collective(cause):
            continue
        # Drop the line of gloo's source in front and the advice at the end.
        message = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(cause).splitlines()[0]).partition(". This is typically")[0]
        if any(words in message.lower() for words in GONE):
            return (
                f"lost another rank ({message}): it failed, was killed, or its host is down; if it could, it printed "
                "why before this line. Start the same command again to continue"
            )
        if any(words in message.lower() for words in LATE):
            return (
                "gave up waiting for another rank after run.collective_timeout_s, or run.start_timeout_s at the start "
                f"({message}): it hangs, or its host cannot be reached. Start the same command again to continue; "
                "raise the timeout if ranks may really be that far apart, as with long responses"
            )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full."""
    return any(_lack_of_memory(cause) is not None for cause in _causes(error))


def _lack_of_memory(error: BaseException) -> str | None:
    """The line that says that a GPU's memory is full; None for any other error. Libraries beside torch allocate too."""
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return str(error)
    lines = str(error).splitlines() if isinstance(error, RuntimeError) else []
    return next(filter(NO_MEMORY.search, lines), None)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it followed from, the original failure first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain[::-1]


def _number(error: BaseException) -> int | None:
    """The system's error number; safetensors has it in the message only."""
    if isinstance(error, OSError):
        return error.errno
    return next((number for number in FULL if f"(os error {number})" in str(error)), None)


def _is_of_a_collective(error: BaseException) -> bool:
    kind = type(error)
    if kind is RuntimeError:  # gloo has no exception class
        return "/gloo/" in str(error)
    return kind.__module__.startswith("torch") and kind.__name__.startswith("Dist")


def _out_of_memory(message: str) -> str:
    """message: torch's, whose first three sentences say how much was asked for, and how much the GPU has."""
    return (
        f"{'. '.join(message.split('. ')[:3])}. Lower the batch size of what was running and start again: "
        "esi.batch_size, esi.generation_batch_size, eval.batch_size and eval.generation_batch_size may be other "
        "numbers than before, also in place of auto; tune.batch_size, tune.max_length and model.gradient_checkpointing "
        "need a new run.output_dir"
    )


def _full(problem: str, file: str | None, output_dir: str) -> str:
    where = f"writing {file}: " if file else ""
    disk, folder = f"run.output_dir = {output_dir}", output_dir
    beside = os.path.dirname(file or "")
    if os.path.isdir(beside) and not Path(beside).resolve().is_relative_to(Path(output_dir).resolve()):
        disk = folder = beside  # which may be of another disk
    free = f"{shutil.disk_usage(folder).free:,}" if os.path.isdir(folder) else "?"
    return (
        f"{where}{problem} ({disk}: {free} bytes free); everything saved before is intact. Make room and start the "
        "same command again to continue"
    )
