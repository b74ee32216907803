"""Local files of lm-eval's tasks, read as they are now.

``datasets`` answers from its cache for a file whose path, size and time have not changed, whatever is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow

from esi_ds.data.hub_sets import load_once

LOCAL = ("file://", "local://")


@contextlib.contextmanager
def read_afresh() -> Iterator[list[str]]:
    """Inside the block, ``datasets.load_dataset`` reads local files into memory, past its cache; one rank of each host
    asks the hub (``data.hub_sets``).

    Every process reads local files itself, through a folder of its own that is deleted at once. Gives a list that grows
    by the sha256 of the rows of each such reading.
    """
    usual = datasets.load_dataset
    digests: list[str] = []

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        if options.get("streaming"):
            return usual(path, *arguments, **options)
        if not _is_local(path, options.get("data_files"), options.get("data_dir")):
            is_plain = len(arguments) <= 1 and isinstance(options.get("split"), str | None)
            return load_once(usual, path, *arguments, **options) if is_plain else usual(path, *arguments, **options)
        path = os.path.abspath(path) if os.path.exists(path) else path  # ".." would be a name within the cache
        with tempfile.TemporaryDirectory() as folder:
            # In memory: what a task makes of its rows is kept beside their file otherwise.
            loaded = usual(path, *arguments, **{**options, "cache_dir": folder, "keep_in_memory": True})
        if isinstance(loaded, datasets.Dataset | datasets.DatasetDict):
            digests.append(_sha256(loaded))
        return loaded

    datasets.load_dataset = load
    try:
        yield digests
    finally:
        datasets.load_dataset = usual


def _is_local(path: str, *data: Any) -> bool:
    """Whether any of the files is on this machine.

    path: a folder, a file, a format's name or a hub id. data: paths or URLs, in lists and mappings, or None; beside a
    hub id they are files of its repository.
    """
    of_a_format = "/" not in path and any(_is_path(text) for content in data for text in _texts(content))
    return os.path.exists(path) or of_a_format


def _is_path(text: str) -> bool:
    """Whether this names a local file. A chain (``zip://inside::outside``) is where its last link is."""
    outside = text.split("::")[-1]
    return "://" not in outside or outside.startswith(LOCAL)


def _texts(content: Any) -> Iterator[str]:
    """Every path in a value of ``data_files``."""
    if isinstance(content, (list, tuple, dict)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _texts(part)
    elif content is not None:
        yield str(content)


class _Hash(io.RawIOBase):
    """A file that keeps nothing of what is written but its sha256."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _sha256(loaded: datasets.Dataset | datasets.DatasetDict) -> str:
    """Digest of the rows of a data set, or of its splits by name."""
    splits = {"": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    hashed = _Hash()
    for name in sorted(splits):
        hashed.write(f"{name}\n".encode())
        table = splits[name].data.table
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(hashed, mode="w"), table.schema) as stream:
            stream.write_table(table)
    return hashed.digest.hexdigest()
