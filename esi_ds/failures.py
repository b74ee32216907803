"""What a rank says when it fails for reasons outside of the program: one line instead of a traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil

# What gloo, NCCL and torch's store say when the other end of a connection is gone, and when nobody came in time.
GONE = ("connection closed", "connection reset", "connection was likely closed", "remote process exited", "broken pipe")
LATE = ("timed out", "timeout")
FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded", errno.EROFS: "read-only"}


def is_full(error: BaseException) -> bool:
    """Whether there was no room to write, which other ranks may find too."""
    return any(_number(cause) in FULL for cause in _causes(error))


def explain(error: BaseException, output_dir: str) -> str | None:
    """One line on a full disk, a rank that is gone, or one that did not come; None for any other error."""
    causes = _causes(error)
    # A file that cannot be written cannot be closed either: of two errors the later may be the one with the name.
    files = (getattr(cause, "filename", None) for cause in causes if _number(cause) in FULL)
    file = next(filter(None, files), None)
    for cause in causes:
        if (number := _number(cause)) in FULL:
            return _full(FULL[number], file, output_dir)
        if not _is_of_a_collective(cause):
            continue
        # Without the place in gloo's source before it and the good wishes behind it.
        said = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(cause).splitlines()[0]).partition(". This is typically")[0]
        if any(words in said.lower() for words in GONE):
            return (
                f"lost another rank ({said}): it failed, was killed, or its host is gone; where it could, it said why "
                "before this. Start the same command again to go on"
            )
        if any(words in said.lower() for words in LATE):
            return (
                "waited in vain for another rank for run.collective_timeout_s, or run.start_timeout_s at the start "
                f"({said}): it hangs, or its host is cut off. Start the same command again to go on; raise the time "
                "where ranks may be so far apart"
            )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """The first failure first: what was raised while it was handled follows from it."""
    chain, found = [], error
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    return chain[::-1]


def _number(error: BaseException) -> int | None:
    """The system's error number; safetensors leaves it in a text."""
    if isinstance(error, OSError):
        return error.errno
    return next((number for number in FULL if f"(os error {number})" in str(error)), None)


def _is_of_a_collective(error: BaseException) -> bool:
    kind = type(error)
    if kind is RuntimeError:  # gloo has no class of its own
        return "/gloo/" in str(error)
    return kind.__module__.startswith("torch") and kind.__name__.startswith("Dist")


def _full(problem: str, file: str | None, output_dir: str) -> str:
    where = f"writing {file}: " if file else ""
    free = "?"
    if os.path.isdir(output_dir):
        free = f"{shutil.disk_usage(output_dir).free:,}"
    return (
        f"{where}{problem} (run.output_dir = {output_dir}: {free} bytes free); what was saved before stands. Make room "
        "and start the same command again to go on"
    )
