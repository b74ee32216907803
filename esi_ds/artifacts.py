"""Files of a run: written completely or not at all; a folder of another run is refused (docs/design.md §7)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from esi_ds.config import Config, differences, resolved_yaml, validate
from esi_ds.config.moved import PLACES, without_moved
from esi_ds.config.yaml import read_yaml
from esi_ds.errors import UserError
from esi_ds.failures import UNSUPPORTED
from esi_ds.reading import check_regular, check_type, check_written_out, json_sha256, read_json, reading, share_of
from esi_ds.versions import commit, versions

# Files of a folder whose run was killed before it wrote config.yaml.
UNBEGUN = re.compile(r"\.config\.yaml\.tmp|\.*lock\.json.*")
# NFS clients cache for a minute by default that a file does not exist: how long to wait, and when to print a message.
VISIBLE_S, MESSAGE_S = 120.0, 5.0
MANIFEST = "manifest.json"
STATUS = "status.json"
INPUTS = "inputs.json"  # what identifies the run's inputs, also where its manifest was deleted to have it done again
# Keys of the manifest.
IDENTIFYING = ("stage", "model_fingerprint", "model_fingerprints", "data_hashes", "source_digests", "hub_commits")
MAX_NAME = 255  # bytes of a file's name
IDENTITY = "run.json"  # while a run is not done: its id, which its checkpoints and records of rows name
MODES = {"private": 0o700, "group": 0o750, "all": 0o755}  # of the run folder, by ``run.share``
RESULT_REMEDY = f"copy it back, or delete it and {MANIFEST} to have the run done again"
RESULT_FOLDERS = ("mask", "scores", "model", "patch")
CHECKPOINTS = "checkpoint"  # the folder of what only a restart reads
REPORTS = ("report.json", "report.html")
READERS = 8  # files read at once: a sha256 keeps a core busy, and disks of clusters serve several readers


@contextmanager
def readable(share: str) -> Iterator[None]:
    """Make new files and folders readable for those whom ``run.share`` names, whatever this process's umask."""
    before = os.umask(0o077)  # there is no other way to read it
    os.umask(before & ~(MODES[share] & 0o077))
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every error of writing ``path`` into an OSError that names the file.

    The system's error for a full disk names none; safetensors and tokenizers only mention the error number in a text.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (match := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error


def wait_until_visible(path: Path, seconds: float = VISIBLE_S) -> Path:
    """The path, once this host sees what another host wrote; a network file system may show it late.

    Raises RuntimeError if it does not appear in time.
    """
    started, has_printed = time.monotonic(), False
    while not path.exists():
        waited = time.monotonic() - started
        if waited > seconds:
            raise RuntimeError(
                f"{path} was written by another rank, but {socket.gethostname()} does not see it after {seconds:g} s: "
                "is run.output_dir a folder that all hosts share?"
            )
        if waited > MESSAGE_S and not has_printed:
            has_printed = True
            print(f"{socket.gethostname()} is waiting for {path} to appear", file=sys.stderr, flush=True)
        # Listing the folder makes an NFS client ask the server again instead of trusting its cache.
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.05)
    return path


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk: a rename is on disk only once its folder is.

    Mounted object stores, which have no folders, refuse to flush one.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in {errno.EINVAL, *UNSUPPORTED}:
            raise
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """What a file or folder is called while it is written."""
    return path.with_name(f".{path.name}.tmp")


def new_folder(path: Path) -> None:
    """Make an empty folder, in place of one that an earlier start may have left."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write the file so that a crash leaves either all of ``text`` or the old content."""
    temporary = temporary_name(path)
    with writing(temporary), temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def write_json_atomic(path: Path, content: Any) -> None:
    """``write_text_atomic`` of ``content`` as JSON."""
    write_text_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def may_write(folder: Path) -> bool:
    """Whether this process may write into a folder, or create it if it does not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    is_name = len(os.fsencode(folder.name)) <= MAX_NAME
    return is_name and existing.is_dir() and os.access(existing, os.W_OK)


def check_new_folder(field: str, folder: Path) -> None:
    """Raise UserError naming ``field`` unless the folder is new and can be created."""
    if os.path.lexists(folder):
        raise UserError(field, str(folder), "exists already", "give a new folder")
    if not may_write(folder):
        raise UserError(field, str(folder), "cannot be created", "give a writable folder")


def without_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(the paths that are not files, the files that are not pages): RUNS/* holds logs and the page of several runs,
    too.

    All paths stay if they are files.
    """
    others = [path for path in paths if not os.path.isfile(path)]
    if not others:
        return list(paths), []
    return others, [path for path in paths if os.path.isfile(path) and path.suffix != ".html"]


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name once its files are on disk; only then is an older one removed."""
    for file in temporary.rglob("*"):  # including those that a library wrote
        if file.is_file():
            _sync(file)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that gets the name ``final`` at the end of the block, or is removed if the block fails."""
    temporary = temporary_name(final)
    new_folder(temporary)
    try:
        yield temporary
        replace_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines, on disk when this returns; an incomplete last line is closed first."""
    with writing(path), path.open("a+b") as opened:
        is_torn = False
        if opened.tell() > 0:  # append mode starts at the end
            opened.seek(-1, os.SEEK_END)
            is_torn = opened.read(1) != b"\n"
        opened.write(("\n" * is_torn + jsonl(rows)).encode())
        opened.flush()
        os.fsync(opened.fileno())


def read_jsonl(path: Path) -> list[Any]:
    """``parse_jsonl`` of a file."""
    return parse_jsonl(path.read_bytes())


def parse_jsonl(data: bytes) -> list[Any]:
    """Rows; lines that are not JSON are left out, as a kill may leave an incomplete one. Raises RecursionError.

    Only a line feed ends a line: ``splitlines`` would also split at a U+2028 or U+0085 inside a text.
    """
    rows = []
    for line in data.decode("utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``: "step", "time" and what was measured there. Raises UserError for others."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    with reading("run.output_dir", file, "delete it: the curves start over"):
        check_regular(file)
        rows = read_jsonl(file)
        for row in check_type(rows, list[dict[str, float | None]]):
            check_type(row.get("step"), float)
    return rows


class FileContent(TypedDict):
    """What a file holds."""

    bytes: int
    sha256: str


def content_of_file(path: Path) -> FileContent:
    """The content of the file as it is now: what is read, for a network file system may state an older size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def file_sha256(path: Path) -> str:
    """sha256 of the file's bytes, in hexadecimal."""
    return content_of_file(path)["sha256"]


class RunIdentity(TypedDict):
    """``run.json``."""

    id: str  # random: the same config may be run in several folders


class Manifest(TypedDict):
    """What every stage writes to ``manifest.json``; a stage may add keys."""

    exit_state: str  # running, done, interrupted or failed
    world_size: int  # number of ranks
    model_fingerprint: str | None  # of the model's structure and weights; None before it is known
    data_hashes: dict[str, Any]  # sha256 by input
    started: str  # of the last start; ISO 8601, UTC
    finished: str | None  # ISO 8601, UTC; None while running
    wall_time_s: float  # of all starts; of one that was killed, until it last wrote this file
    versions: dict[str, str]  # of Python and of packages, by name
    commit: str | None  # of the checkout; None for an installed package


class RunFolder:
    """One run's folder. Every rank may call ``check``; only rank 0 may write."""

    def __init__(self, path: str):
        self.path = Path(path)

    def check(self, config: Config) -> None:
        """Raise UserError for a path that is not a folder, cannot be written, or holds something other than this run.

        Reads only.
        """
        key, path = "run.output_dir", str(self.path)
        try:
            self.path.stat()
        except FileNotFoundError as error:
            if self.path.is_symlink():
                raise UserError(key, path, "is a dangling link", "create its target") from error
        except NotADirectoryError:
            pass  # reported by ``may_write`` below
        except (OSError, ValueError) as error:
            raise UserError(key, path, f"is not the name of a folder ({error})", "give another folder") from error
        check_written_out(key, path)
        if not path.isprintable():
            raise UserError(key, ascii(path), "holds an invisible character", "give another name")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(key, path, "is a file", "give a folder")
        if not may_write(self.path):
            raise UserError(key, path, "cannot be written to", "give a writable folder")
        # A run killed before it wrote config.yaml leaves its lock and temporary files: as good as an empty folder.
        if not self.path.is_dir() or all(UNBEGUN.fullmatch(file.name) for file in self.path.iterdir()):
            return
        stored = self.path / "config.yaml"
        if not stored.is_file():
            raise UserError(key, path, "is not empty and does not hold a run", "give a new folder")
        if config.run.resume == "never":
            raise UserError(key, path, "already holds a run", "give a new folder, or set run.resume: auto")
        try:
            before = validate(read_yaml(stored, key, "give a new folder"))
        except UserError as error:
            raise UserError(
                key, path, f"holds a config.yaml that this version cannot read ({error})", "give a new folder"
            ) from error
        other = differences(before, config) and differences(before, config, self.commits())
        if other and not self._was_refused() and (other := without_moved(other, before, config, self._inputs())):
            raise UserError(
                key,
                path,
                f"holds a run whose config differs in {', '.join(other)}",
                "give a new folder, or continue with the config stored there",
            )

    def check_stage(self, stage: str) -> None:
        """Raise UserError where the folder holds a run of another stage: one config may serve several.

        Manifests of earlier versions do not say which; the status does. A run that died before it had a manifest has
        left nothing that another could take for its own.
        """
        inputs = self._inputs()
        before = inputs.get("stage")
        if inputs and before is None:
            with suppress(UserError):
                before = read_json(self.path / STATUS, dict[str, Any], "run.output_dir", "-").get("stage")
        if before is not None and before != stage:
            problem, remedy = f"holds a run of {before}, not of {stage}", "give a new folder"
            raise UserError("run.output_dir", str(self.path), problem, remedy)

    def check_same(
        self, key: str, now: Any, field: str | Mapping[str, str] | None = None, unread: Collection[str] = ()
    ) -> None:
        """Raise UserError if ``now`` differs from the value of ``key`` among the inputs of the run in this folder.

        Keys of a mapping that these inputs lack are taken as they are, because an earlier version wrote the inputs, and
        ``PLACES`` of data are not compared. field: the field that the error names, or a mapping's fields by key; None:
        the keys are fields themselves. unread: keys of the mapping that are not known yet.
        """
        before = self._inputs().get(key)
        difference = ""
        if isinstance(before, dict) and isinstance(now, dict):
            unread = {*unread, *(PLACES if key == "data_hashes" else ())}
            before = {name: value for name, value in before.items() if name not in unread}
            now = {name: value for name, value in now.items() if name in before}
            others = [name for name in before if before[name] != now.get(name)]
            difference = f" (other {', '.join(others)})" if field else ""
            first = next(iter(others), None)
            field = field.get(str(first)) if isinstance(field, Mapping) else field or first
        if before and before != now:
            problem = f"is not what the run in {self.path} started with{difference}"
            raise UserError(str(field or key), None, problem, "give a new run.output_dir")

    def commits(self) -> dict[str, str]:
        """Hub id, with its revision, → the commit that the run in the folder has read; empty if it starts over.

        Raises UserError.
        """
        with reading("run.output_dir", self.path / MANIFEST, "delete it to go on without it"):
            return check_type(self._inputs().get("hub_commits", {}), dict[str, str])

    def _inputs(self) -> dict[str, Any]:
        """What identifies the inputs of the run in the folder; empty if it starts over."""
        return {} if self._was_refused() else read_inputs(self.path)

    def _was_refused(self) -> bool:
        """Whether the run in the folder failed before it had anything that a restart could use, for instance because of
        another model's mask. With the corrected input it starts over."""
        return read_manifest(self.path).get("exit_state") == "failed" and not self.kept()

    def kept(self) -> dict[str, int]:
        """The size of each file that the starts so far have left as a result or for a restart. Other files, such as
        those of DeepSpeed's monitors, are neither."""
        return result_sizes(self.path, (*RESULT_FOLDERS, CHECKPOINTS))

    def open(self, config: Config) -> None:
        """Create the folder, and write the resolved config of a run that begins. Raises UserError as ``check`` does."""
        self.check(config)
        self.create(config.run.share)
        if self._was_refused():
            for name in (INPUTS, MANIFEST, IDENTITY, STATUS):
                (self.path / name).unlink(missing_ok=True)
        if not self._inputs():
            self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Write the resolved config. A run that goes on writes it only once it is known to read what it began with: a
        path may lead elsewhere by now."""
        write_text_atomic(self.path / "config.yaml", resolved_yaml(config))

    def identify(self) -> None:
        """Give the run an id, unless an earlier start has; what it keeps for a restart names the id."""
        if not (self.path / IDENTITY).exists():
            write_json_atomic(self.path / IDENTITY, {"id": uuid.uuid4().hex})

    def create(self, share: str) -> None:
        """Create the folder, if it is not there, for the readers of ``run.share``; prompts and answers lie in it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=MODES[share], exist_ok=True)
        with suppress(PermissionError):  # somebody else's folder: its owner says who may read it
            # What its parent gives it stays: with set-group-ID, files get the group of a cluster's project.
            inherited = self.path.stat().st_mode & (stat.S_ISGID | stat.S_ISVTX)
            self.path.chmod(MODES[share] | inherited)

    def is_finished(self) -> bool:
        """Whether the run was completed, and its results are whole. Raises UserError where they no longer are."""
        results = self.finished_results()
        if results is not None:
            self.check_results(results)
        return results is not None

    def finished_results(self) -> dict[str, FileContent] | None:
        """What a completed run's manifest says of its results, by their path in the folder; None if it was not
        completed. Raises UserError where one of them is missing."""
        manifest = read_manifest(self.path)
        if manifest.get("exit_state") != "done":
            return None
        stored = _results_in(manifest, self.path, "run.output_dir", RESULT_REMEDY)
        for name in stored:  # all of them before any is read to its end
            problem = "belongs to this finished run and is missing"
            with reading("run.output_dir", self.path / name, RESULT_REMEDY, problem):
                check_regular(self.path / name)
        return stored

    def check_results(self, stored: Mapping[str, FileContent], part: int = 0, num_parts: int = 1) -> None:
        """Raise UserError where a result in the share ``part`` of ``num_parts`` is not what ``stored`` says."""
        sizes = {name: result["bytes"] for name, result in stored.items()}
        with reading("run.output_dir", self.path, RESULT_REMEDY):
            now = contents_of(self.path, share_of(sizes, part, num_parts))
        for name, content in now.items():
            if content != stored[name]:
                problem = "is not what this finished run wrote"
                raise UserError("run.output_dir", str(self.path / name), problem, RESULT_REMEDY)

    def write_manifest(
        self,
        *,
        exit_state: str,
        world_size: int,
        started: float,
        earlier_s: float = 0.0,
        model_fingerprint: str | None,
        data: dict[str, Any],
        notes: dict[str, Any] | None = None,
        results: Mapping[str, FileContent] | None = None,
    ) -> None:
        """Write ``manifest.json``. started: seconds since the epoch. earlier_s: seconds that earlier starts took.
        notes: what else the stage records. results: the files that a finished run must hold; None: they are read
        here."""
        now = time.time()
        manifest: Manifest = {
            "exit_state": exit_state,
            "world_size": world_size,
            "model_fingerprint": model_fingerprint,
            "data_hashes": data,
            "started": utc(started),
            "finished": None if exit_state == "running" else utc(now),
            "wall_time_s": round(earlier_s + now - started, 3),
            "versions": versions(),
            "commit": commit(),
        }
        content = {**manifest, **(notes or {})}
        write_json_atomic(self.path / INPUTS, _inputs_in(content))
        if exit_state == "done":
            content["results"] = contents_of(self.path, result_sizes(self.path)) if results is None else results
        _write_manifest(self.path, content)


def read_inputs(run: Path) -> dict[str, Any]:
    """What identifies a run's inputs: what its manifest says, and what that does not, as far as ``inputs.json`` does.

    Raises UserError for either that cannot be read.
    """
    file, kept = run / INPUTS, dict[str, Any]()
    if file.is_file():
        kept = read_json(file, dict[str, Any], "run.output_dir", "delete it to go on without it")
    return {**kept, **_inputs_in(read_manifest(run))}


def _inputs_in(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in IDENTIFYING if manifest.get(key) is not None}


def read_manifest(run: Path, field: str = "run.output_dir") -> dict[str, Any]:
    """What a run's ``manifest.json`` holds; nothing where there is none.

    Raises UserError naming ``field``, also for one that is not what the run wrote; those of earlier versions, without a
    digest of themselves, are taken as they are.
    """
    file = run / MANIFEST
    if not file.exists():
        return {}
    remedy = "delete it to go on without it"
    if field == "run.output_dir":
        remedy += ", or give a new run.output_dir"
    manifest = read_json(file, dict[str, Any], field, remedy)
    written = manifest.pop("sha256", None)
    if written is not None and written != json_sha256(manifest):
        raise UserError(field, str(file), "was altered since the run wrote it (its sha256 differs)", remedy)
    return manifest


def _write_manifest(run: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json`` with its own digest."""
    write_json_atomic(run / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})


def run_id(path: Path) -> str | None:
    """The id of the run whose folder holds ``path``, at most three folders down; None in folders of earlier versions,
    and where nothing runs.

    Raises UserError for a damaged ``run.json``.
    """
    for folder in (path, *path.parents)[:4]:
        if (folder / IDENTITY).exists():
            remedy = "delete it and checkpoint/ to start over, or give a new run.output_dir"
            return read_json(folder / IDENTITY, RunIdentity, "run.output_dir", remedy)["id"]
    return None


def check_same_run(path: Path, stated: Any, remedy: str) -> None:
    """Raise UserError if ``path`` names another run, ``stated``, than its folder's. A path that names none was written
    by an earlier version and is taken as it is.
    """
    if stated is not None and run_id(path) not in (None, stated):
        raise UserError("run.output_dir", str(path), "belongs to another run", remedy)


def _results_in(manifest: Mapping[str, Any], run: Path, field: str, remedy: str) -> dict[str, FileContent]:
    """The results that a manifest names; none in those of earlier versions. Raises UserError naming ``field``."""
    with reading(field, run / MANIFEST, remedy):
        return check_type(manifest.get("results", {}), dict[str, FileContent])


def check_result(run: Path, name: str, field: str, remedy: str) -> None:
    """Raise UserError naming ``field`` unless a run's file ``name`` is what its manifest, if any, says."""
    stored = _results_in(read_manifest(run, field), run, field, remedy).get(name)
    if stored is None:
        return
    with reading(field, run / name, remedy):
        check_regular(run / name)
        now = content_of_file(run / name)
    if now != stored:
        raise UserError(field, str(run / name), "is not what this finished run wrote", remedy)


def renew_result(run: Path, name: str, field: str, remedy: str) -> None:
    """Have a finished run's manifest describe the file ``name`` as it is now. Raises UserError naming ``field``."""
    manifest = read_manifest(run, field)
    results = _results_in(manifest, run, field, remedy)
    if name in results:
        _write_manifest(run, {**manifest, "results": {**results, name: content_of_file(run / name)}})


def result_sizes(run: Path, folders: Iterable[str] = RESULT_FOLDERS) -> dict[str, int]:
    """The files that a finished run must hold, by their path in its folder, with their bytes."""
    top = [run / name for name in REPORTS] + [file for file in run.glob("*.jsonl") if file.name != "metrics.jsonl"]
    below = [file for name in folders for file in (run / name).rglob("*")]
    return {file.relative_to(run).as_posix(): file.stat().st_size for file in sorted(filter(Path.is_file, top + below))}


def contents_of(run: Path, names: Collection[str]) -> dict[str, FileContent]:
    """Content of files in a run folder, which another host may have written, by their path in it."""
    with ThreadPoolExecutor(READERS) as pool:
        contents = pool.map(lambda name: content_of_file(wait_until_visible(run / name)), names)
        return dict(zip(names, contents, strict=True))


def utc(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
