"""Reading what a user or an earlier run has left behind: bounded, typed, and every failure a ``UserError``.

Whatever a library raises over a damaged, foreign or hostile file is turned into one message here, in ``reading``; no
reader needs a list of exceptions of its own. The functions below it read the formats that artifacts are made of.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from esi_ds.errors import Interrupted, UserError
from esi_ds.failures import is_out_of_memory

Content = TypeVar("Content")

MAX_JSON_BYTES = 1 << 28  # 256 MiB: the index of a model with a million tensors takes less than half of it
MAX_NAME = 255  # bytes of a file's name on every file system in use
SHELLS = re.compile(r"^~|\$\{?[A-Za-z_]")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def reading(field: str, value: object, remedy: str, problem: str = "cannot be read") -> Iterator[None]:
    """Turn any exception of the block into ``UserError(field, value, problem, remedy)``.

    For blocks that only read what a user gave: a mistake of ours inside one would be blamed on the file. ``UserError``,
    ``Interrupted`` and a full GPU's error pass unchanged.
    """
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shown = str(value) if isinstance(value, Path) else value
        raise UserError(field, shown, f"{problem} ({first_line(error)})", remedy) from error


def is_text(value: Any) -> bool:
    """Whether this is a string that tokenizers accept: JSON can escape half of a surrogate pair, which they do not."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def check_written_out(field: str, path: str) -> None:
    """Raise UserError for ~ and variables, which only a shell expands: YAML has neither."""
    if shells := SHELLS.search(path):
        raise UserError(field, path, f"holds {shells[0]}, which only a shell expands", "write the path out")


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file. Raises OSError for a folder, a pipe, a device or a missing file: opening
    a pipe would wait for a writer for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path.name} is not a regular file")
    return status.st_size


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES, newline: str | None = None) -> str:
    """A UTF-8 file of at most ``max_bytes``. newline: as of ``open``.

    Raises OSError or ValueError; call it within ``reading``.
    """
    size = check_regular(path)
    if size > max_bytes:
        raise ValueError(f"{path.name} has {size:,} bytes, more than the {max_bytes:,} that are read")
    try:
        with path.open(encoding="utf-8", newline=newline) as opened:
            return opened.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error}") from error


def parse_json(text: str) -> Any:
    """JSON as its standard has it: no key twice in one object, no NaN or Infinity. Raises ValueError or
    RecursionError."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def check_type(content: Any, kind: type[Content]) -> Content:
    """``content`` as a value of ``kind`` (any type that pydantic knows; a TypedDict must be typing_extensions').

    Nothing is converted: "3" is not an integer. Raises ValueError naming the first wrong place.
    """
    adapter: TypeAdapter[Content] = _adapter(cast(Any, kind))
    try:
        return adapter.validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's validator of a type, which takes a thousand times as long to build as a row takes to check."""
    return TypeAdapter(kind)


def read_json(path: Path, kind: type[Content], field: str, remedy: str) -> Content:
    """A JSON file whose content is a ``kind``. Raises UserError naming ``field`` and the file."""
    with reading(field, path, remedy):
        return check_type(parse_json(read_text(path)), kind)


def read_configuration(path: Path, field: str, remedy: str) -> dict[str, Any]:
    """A model's configuration: as ``read_json``, but for Infinity and NaN. transformers reads them, and its version 4
    wrote them: Nemotron-H's and Mamba-2's hold one."""
    with reading(field, path, remedy):
        return check_type(json.loads(read_text(path), object_pairs_hook=_unique_keys), dict[str, Any])


def share_of(sizes: Mapping[str, int], part: int, num_parts: int) -> list[str]:
    """The names that process ``part`` of ``num_parts`` reads, in the mapping's order; each falls to one process.

    The largest is dealt out first, and each falls to the process with the fewest bytes so far. Dealt out in the model's
    order, the fused experts, which recur in every layer, would all fall to the same few processes. sizes: name → bytes,
    the same in every process.
    """
    names: set[str] = set()
    loads = [(0, number) for number in range(num_parts)]  # a heap
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        load, number = loads[0]
        if number == part:
            names.add(name)
        heapq.heapreplace(loads, (load + sizes[name], number))
    return [name for name in sizes if name in names]


def json_sha256(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON object, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_bare_name(name: str) -> bool:
    """Whether a name read from a file can only name an entry of the folder that the file lies in."""
    return (
        0 < len(os.fsencode(name)) <= MAX_NAME
        and name not in (".", "..")
        and not any(separator in name for separator in "/\\")
        and not CONTROL.search(name)
    )


def read_index(path: Path, field: str, remedy: str) -> dict[str, str]:
    """Tensor name → file name of a ``model.safetensors.index.json``; the files lie beside it.

    Raises UserError for anything else, a name that leads out of the folder included.
    """
    return read_index_content(path, field, remedy)[0]


def read_index_content(path: Path, field: str, remedy: str) -> tuple[dict[str, str], dict[str, Any]]:
    """``read_index``, and the index's ``metadata``, empty where it has none."""
    with reading(field, path, remedy):
        content = check_type(parse_json(read_text(path)), dict[str, Any])
        metadata = check_type(content.get("metadata", {}), dict[str, Any])
        weight_map = check_type(content.get("weight_map"), dict[str, str])
        for name in weight_map.values():
            if not is_bare_name(name):
                raise ValueError(f"weight_map names {name!r}, which is not the name of a file beside it")
    return weight_map, metadata
