"""Files of a run: written whole or not at all, and refused where they belong to another run (docs/design.md §7)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from esi_ds.config import Config, differences, resolved_yaml, validate
from esi_ds.config_yaml import parse_yaml
from esi_ds.errors import UserError

UNBEGUN = re.compile(r"\.config\.yaml\.tmp|\.?lock\.json.*")
VISIBLE_S, TELL_S = 120.0, 5.0  # NFS clients remember for a minute by default that a file was not there
PACKAGES = ("esi_ds", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of writing is an OSError that names the file: a full disk's own names none, and safetensors and
    tokenizers leave the system's error in a text only."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def wait_until_visible(path: Path, seconds: float = VISIBLE_S) -> Path:
    """The path, once this host sees what another host has made; a network file system may show it late.

    Raises RuntimeError where it does not come.
    """
    started, told = time.monotonic(), False
    while not path.exists():
        waited = time.monotonic() - started
        if waited > seconds:
            raise RuntimeError(
                f"{path} was written by another rank, and {socket.gethostname()} does not see it after {seconds:g} s: "
                "is run.output_dir a folder that all hosts share?"
            )
        if waited > TELL_S and not told:
            told = True
            print(f"{socket.gethostname()} waits for {path} to appear", file=sys.stderr, flush=True)
        # Reading the folder has a client ask its server again instead of trusting what it remembers.
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.05)
    return path


def _sync(path: Path) -> None:
    """A file is on disk when this returns, or the names in a folder: a rename is on disk only when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """The file holds all of ``text`` or what it held before."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(temporary), temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def write_json_atomic(path: Path, content: Any) -> None:
    write_text_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def may_write(folder: Path) -> bool:
    """Whether this process may write into a folder, or make it where it is not there yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, when its files are on disk; one that had it goes away only then."""
    for file in temporary.rglob("*"):  # also those that a library has written
        if file.is_file():
            _sync(file)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Lines at the end of a file, on disk when this returns; a line before them that was torn is closed first."""
    with writing(path), path.open("a+b") as opened:
        torn = False
        if opened.tell() > 0:  # append mode begins at the end
            opened.seek(-1, os.SEEK_END)
            torn = opened.read(1) != b"\n"
        text = "\n" * torn + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        opened.write(text.encode())
        opened.flush()
        os.fsync(opened.fileno())


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a file that a kill may have torn: lines that are no JSON are left out.

    Lines end at a line feed only: ``splitlines`` would cut a row at a U+2028 or U+0085 inside its text.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class RunFolder:
    """One run's folder. ``check`` may be called by every rank, the writers by rank 0 only."""

    def __init__(self, path: str):
        self.path = Path(path)

    def check(self, config: Config) -> None:
        """Refuse a folder that is no folder, is not ours, or holds another run. Reads only."""
        key, given = "run.output_dir", str(self.path)
        try:
            self.path.stat()
        except FileNotFoundError as error:
            if self.path.is_symlink():
                raise UserError(key, given, "is a link that leads nowhere", "make what it leads to") from error
        except NotADirectoryError:
            pass  # said below
        except (OSError, ValueError) as error:
            raise UserError(key, given, f"is no name of a folder ({error})", "give a folder of your own") from error
        if self.path.exists() and not self.path.is_dir():
            raise UserError(key, given, "is a file", "give a folder")
        if not may_write(self.path):
            raise UserError(key, given, "cannot be written to", "give a folder of your own")
        # A kill before config.yaml is first written leaves the lock and temporary files: still an empty folder of ours.
        if not self.path.is_dir() or all(UNBEGUN.fullmatch(file.name) for file in self.path.iterdir()):
            return
        stored = self.path / "config.yaml"
        if not stored.is_file():
            raise UserError(key, given, "is not empty and holds no run", "give a new folder")
        if config.run.resume == "never":
            raise UserError(key, given, "holds a run already", "give a new folder, or set run.resume: auto")
        try:
            before = validate(parse_yaml(stored.read_text(encoding="utf-8")))
        except (UserError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                key, given, f"holds a config.yaml that this version cannot read ({error})", "give a new folder"
            ) from error
        other = differences(before, config)
        if other:
            raise UserError(
                key,
                given,
                f"holds a run of another config (other {', '.join(other)})",
                "give a new folder, or go on with the config stored there",
            )

    def check_same(self, key: str, now: Any, field: str) -> None:
        """Refuse to go on where a fact that the interrupted run recorded in its manifest is another one now."""
        manifest = self.path / "manifest.json"
        before = json.loads(manifest.read_text()).get(key) if manifest.is_file() else None
        if before and before != now:
            raise UserError(field, None, f"is not what the run in {self.path} began with", "give a new run.output_dir")

    def open(self, config: Config) -> None:
        """Create the folder and write the resolved config. Raises UserError where ``check`` does."""
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.path / "config.yaml", resolved_yaml(config))

    def is_finished(self) -> bool:
        manifest = self.path / "manifest.json"
        return manifest.is_file() and json.loads(manifest.read_text())["exit_state"] == "done"

    def write_manifest(
        self,
        *,
        exit_state: str,
        world_size: int,
        started: float,
        model_fingerprint: str | None,
        data: dict[str, Any],
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Versions, commit, world size, which model, how long, and how it ended: running, done, interrupted or
        failed; and what the stage notes besides."""
        now = time.time()
        write_json_atomic(
            self.path / "manifest.json",
            {
                "exit_state": exit_state,
                "world_size": world_size,
                "model_fingerprint": model_fingerprint,
                "data_hashes": data,
                "started": utc(started),
                "finished": None if exit_state == "running" else utc(now),
                "wall_time_s": round(now - started, 3),
                "versions": versions(),
                "commit": commit(),
                **(notes or {}),
            },
        )


def utc(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit; None outside one (an installed copy may lie inside somebody else's repository)."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
