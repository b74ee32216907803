"""Files of models on the Hugging Face hub: asked for once on each host of a job, and of one commit.

A branch may move while a job starts. The first rank of a host to need a model asks the hub which commit the revision is
and downloads it; the others of the host wait at a file lock and read the hub's cache. Every later use, config,
tokenizer, weights and fingerprint, is of the same folder, which the cache names by its commit.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from esi_ds import launch_environment
from esi_ds.reading import first_line

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt"]  # all that is not weights
WEIGHTS = ["*.safetensors"]
FAILED = "failed: "  # begins a record of what went wrong
KEPT_S = 7 * 24 * 3600.0  # records of earlier jobs

# (hub id, revision) → the folder of its small files, and whether its weights are there too; of this process.
_resolved: dict[tuple[str, str | None], Path] = {}
_complete: set[Path] = set()


def files(name: str, revision: str | None, only_local: bool = False) -> Path:
    """The folder of a model's configuration, tokenizer and code, in the hub's cache.

    only_local: do not contact the hub. Raises OSError or ValueError.
    """
    key = (name, revision)
    if key in _resolved:
        return _resolved[key]
    if only_local:
        return Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, local_files_only=True))

    def download() -> str:
        return snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES)

    _resolved[key] = Path(once_on_host(f"files {name} {revision}", download))
    return _resolved[key]


def weights(name: str, revision: str | None) -> Path:
    """``files``, with the weights beside them. Raises OSError or ValueError."""
    folder = files(name, revision)
    if folder not in _complete:

        def download() -> str:
            return snapshot_download(name, revision=folder.name, allow_patterns=WEIGHTS)

        once_on_host(f"weights {name} {folder.name}", download)
        _complete.add(folder)
    return folder


def commits() -> dict[str, str]:
    """Hub id, with its revision, → the commit that this process uses."""
    return {
        name if revision is None else f"{name} ({revision})": path.name for (name, revision), path in _resolved.items()
    }


def once_on_host(what: str, work: Callable[[], str], share_failure: bool = False) -> str:
    """What ``work`` returns, called by the first of the job's ranks on this host; the others wait, and are told.

    Where the ranks of a job do not know of one another, or ``work`` returns nothing, each calls it. share_failure:
    whether ranks that wait while ``work`` fails raise OSError with the same message at once; else, and if they come
    later, they try themselves.
    """
    started = time.time()
    job = launch_environment.job_on_host()
    folder = Path(tempfile.gettempdir()) / f"esi_ds-{os.getuid()}"
    if job is not None:
        folder.mkdir(mode=0o700, exist_ok=True)
    if job is None or folder.is_symlink() or folder.stat().st_uid != os.getuid():  # somebody else's
        return work()
    for old in folder.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)
    record = folder / hashlib.sha256(f"{socket.gethostname()} {job} {what}".encode()).hexdigest()
    with record.open("a+", encoding="utf-8") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)  # until the file is closed, also by the end of the process
        opened.seek(0)
        result = opened.read()
        if result.startswith(FAILED) and started < record.stat().st_mtime:
            raise OSError(result.removeprefix(FAILED))
        if result and not result.startswith(FAILED):
            return result
        opened.truncate(0)  # nobody has called it yet, or it has failed
        try:
            result = work()
        except Exception as error:
            if share_failure:
                opened.write(FAILED + first_line(error))
            raise
        opened.write(result)
        return result
