"""What tells a study's models and judges from others at the same path."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from esi_ds.artifacts import file_sha256
from esi_ds.reading import json_sha256

CARD = "README.md"  # of a model: written anew with its figures


@lru_cache
def _file_sha256(file: Path, size: int, modified_ns: int) -> str:
    """A file is read again only where its size or time has changed: a start asks before and after every cell."""
    return file_sha256(file)


def model_sha256(folder: Path) -> str:
    """sha256 of the names and contents of a model's files, but for its card."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CARD)
    return json_sha256({file.name: _file_sha256(file, *_version(file)) for file in files})


def _version(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
