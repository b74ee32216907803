"""Files of models on the Hugging Face hub: asked for once on each host of a job, and of one commit.

A branch may move while a job starts. The first rank of a host to need a model asks the hub which commit the revision is
and downloads it; the others of the host wait at a file lock and read the hub's cache. Every later use, config,
tokenizer, weights and fingerprint, is of the same folder, which the cache names by its commit.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from esi_ds import launch_environment
from esi_ds.config import model_name
from esi_ds.errors import UserError
from esi_ds.failures import UNSUPPORTED, why_full
from esi_ds.models.weights import names_to_fetch
from esi_ds.reading import first_line

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt"]  # all that is not weights
# flock(2): Lustre as mounted by default, NFS without its daemon.
WITHOUT_LOCKS = {errno.ENOLCK, *UNSUPPORTED}
FAILED = "failed: "  # begins a record of what went wrong
KEPT_S = 7 * 24 * 3600.0  # records of earlier jobs
REQUEST_S = 10.0  # of the one request that asks whether a repository exists
Kind = Literal["model", "dataset"]
LOCAL_KIND = {"model": "folder", "dataset": "file"}
# Errors of a request that did not reach the hub, by name: huggingface_hub has changed the library that raises them.
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError", "ConnectionError"}

# (hub id, revision) → the folder of its small files, and whether its weights are there too; of this process.
_resolved: dict[tuple[str, str | None], Path] = {}
_complete: set[Path] = set()
_kept: dict[str, str] = {}  # as ``commits``: of the run that goes on


def is_hub_id(path: str) -> bool:
    """Whether the hub could have a model or data set of this name."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not path.startswith(("~", ".", os.sep))


def no_model(field: str, path: str) -> UserError:
    """The error for a path that is not a folder and cannot be a hub id."""
    problem = "there is no such folder, and it is not a hub id"
    return UserError(field, path, problem, "give a folder of a model, or namespace/name of the hub")


def files(name: str, revision: str | None, only_local: bool = False) -> Path:
    """The folder of a model's configuration, tokenizer and code, in the hub's cache.

    only_local: do not contact the hub. Raises OSError or ValueError.
    """
    key = (name, revision)
    if key in _resolved:
        return _resolved[key]
    revision = _kept.get(model_name(name, revision), revision)
    if only_local:
        return Path(_snapshot(name, revision, SMALL_FILES, only_local=True))
    download = partial(_snapshot, name, revision, SMALL_FILES)
    _resolved[key] = Path(once_on_host(f"files {name} {revision}", download))
    return _resolved[key]


def _snapshot(name: str, revision: str | None, patterns: list[str], only_local: bool = False) -> str:
    """A model's folder in the hub's cache, with the files of these names or patterns.

    When offline, huggingface_hub is told to stay local as well: without that, 1.31 asks for a commit's list of files,
    unless it filled the cache itself.
    """
    stays_local = only_local or constants.HF_HUB_OFFLINE
    return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=stays_local)


def weights(name: str, revision: str | None, field: str = "model.path") -> Path:
    """``files``, with the weights beside them that transformers would load: the hub may hold them in other formats too.

    Raises OSError or ValueError, and UserError naming ``field`` for a damaged index of the weights.
    """
    folder = files(name, revision)
    if folder not in _complete:
        download = partial(_snapshot, name, folder.name, names_to_fetch(folder, field))
        once_on_host(f"weights {name} {folder.name}", download)
        _complete.add(folder)
    return folder


def check_exists(name: str, kind: Kind, field: str) -> None:
    """Raise UserError for a name that is neither a file nor a folder here, if the hub has no such repository or cannot
    be reached.

    name: in the form of a hub id. A repository in the hub's cache costs no request, another one costs a small one, once
    on each host of the job. Whatever else the hub may answer (busy, gated, slow) is left to the download.
    """
    if _is_cached(name, kind):
        return

    def ask() -> str:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=REQUEST_S)
        except Exception as error:  # whatever the HTTP library raises
            if reason := why_not_found(error):
                raise OSError(reason) from error
        return "nothing against it"

    try:
        once_on_host(f"{kind} {name}", ask, share_failure=True)
    except OSError as error:
        raise not_found(field, name, kind, str(error)) from error


def not_found(field: str, name: str, kind: Kind, reason: str) -> UserError:
    """The error of a path that leads nowhere but could be a hub id. reason: why the hub does not give it."""
    local = LOCAL_KIND[kind]
    remedy = f"give the path of a {local} that exists, or the id of a {kind.replace('dataset', 'data set')} on the hub"
    return UserError(field, name, f"there is no such {local} here, and {reason}", remedy)


def why_not_found(error: BaseException) -> str | None:
    """Why the hub does not give a repository, in words; None where the error says nothing of the kind."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub's cache does not hold all of it (HF_HUB_OFFLINE is set, so the hub is not asked)"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return "the hub has no such id (or it is private, and this login may not read it)"
    if any(kind.__name__ in UNREACHABLE for kind in type(error).__mro__):
        return f"the hub cannot be reached ({first_line(error)})"
    return why_not_found(error.__cause__) if error.__cause__ is not None else None


def _is_cached(name: str, kind: Kind) -> bool:
    """Whether the hub's cache, or for a data set that of ``datasets``, holds some version of a repository."""
    folders = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"]
    if kind == "dataset":
        prepared = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
        folders.append(Path(prepared) / prepared_name(name))
    return any(folder.is_dir() for folder in folders)


def prepared_name(name: str) -> str:
    """A data set's folder in the cache of ``datasets``, by its rule: importing it would take a second."""
    namespace, slash, last = name.rpartition("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)).lower()
    return f"{namespace}{'___' if slash else ''}{snake}"


def keep(recorded: Mapping[str, str]) -> None:
    """Pin models not yet resolved to these commits. recorded: as ``commits``."""
    _kept.clear()
    _kept.update(recorded)


def commits() -> dict[str, str]:
    """Hub id, with its revision, → the commit that this process uses, or that its run has used."""
    return _kept | {model_name(*key): path.name for key, path in _resolved.items()}


def kept_commits() -> list[str]:
    """A sentence on each model whose commit is the one that the run began with, instead of the revision in the
    config."""
    names = {model_name(*key): key[1] for key in _resolved}
    return [
        f"{name}: commit {_kept[name]}, with which this run began"
        for name, revision in names.items()
        if _kept.get(name, revision) != revision
    ]


def once_on_host(what: str, work: Callable[[], str], share_failure: bool = False) -> str:
    """What ``work`` returns, called by the first of the job's ranks on this host; the others wait, and are told.

    Where the ranks of a job do not know of one another, where they have no folder of their own for records, where the
    file system of temporary files has no locks, or where ``work`` returns nothing, each calls it. share_failure:
    whether ranks that wait while ``work`` fails raise OSError with the same message at once; else, and if they come
    later, they try themselves. Raises UserError where the cache's disk is full, and whatever ``work`` raises.
    """
    started = time.time()
    job = launch_environment.job_on_host()
    folder = Path(tempfile.gettempdir()) / f"esi_ds-{os.getuid()}"
    if job is None or not _is_own(folder):
        return _in_cache(work)
    for old in folder.iterdir():
        with suppress(FileNotFoundError):  # another rank has just removed it
            if time.time() - old.stat().st_mtime > KEPT_S:
                old.unlink()
    record = folder / hashlib.sha256(f"{socket.gethostname()} {job} {what}".encode()).hexdigest()
    with record.open("a+", encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)  # until the file is closed, also by the end of the process
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            return _in_cache(work)
        opened.seek(0)
        result = opened.read()
        if result.startswith(FAILED) and started < record.stat().st_mtime:
            raise OSError(result.removeprefix(FAILED))
        if result and not result.startswith(FAILED):
            return result
        opened.truncate(0)  # nobody has called it yet, or it has failed
        try:
            result = _in_cache(work)
        except Exception as error:
            if share_failure:
                opened.write(FAILED + first_line(error))
            raise
        opened.write(result)
        return result


def _is_own(folder: Path) -> bool:
    """Whether a folder among the temporary files, created if nothing has its name, is this user's: anybody may have
    left a file, a link or a folder there."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()


def _in_cache(work: Callable[[], str]) -> str:
    """What ``work``, which fills the hub's cache, returns. Raises UserError where the cache's disk is full."""
    try:
        return work()
    except Exception as error:  # libraries wrap the system's error in their own
        if (reason := why_full(error)) is None:
            raise
        problem = f"cannot store what is downloaded ({reason})"
        remedy = "make room there, or set HF_HOME to another folder"
        raise UserError("HF_HOME", constants.HF_HOME, problem, remedy) from error
