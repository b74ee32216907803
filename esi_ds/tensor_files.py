"""Headers of safetensors files, and folders of such files with an index: bounded, typed, checked before a byte is used.

A safetensors file is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and byte range, and
the bytes (https://github.com/huggingface/safetensors, "Format"). Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from typing_extensions import TypedDict

from esi_ds.errors import UserError
from esi_ds.reading import check_regular, check_type, parse_json, read_index_content, read_json, reading

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"  # of a folder with one file, which may lack an index
SUFFIX = ".safetensors"
DIGESTS_NAME = "digests.json"  # sha256 of every parameter's bytes; optional in folders from other tools
MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
BLOCK_BYTES = 1 << 20  # read and hashed at a time


class StoredTensor(NamedTuple):
    """Where a file holds a tensor: bytes [first, last) of the file. description: "dtype shape", e.g. ``F32 [3, 4]``."""

    name: str
    file: Path
    first: int
    last: int
    description: str

    @property
    def num_bytes(self) -> int:
        return self.last - self.first

    @property
    def dtype(self) -> str:
        """The dtype of its elements, as safetensors names it."""
        return self.description.partition(" ")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(json.loads(self.description.partition(" ")[2]))


@dataclass(frozen=True)
class TensorFolder:
    """What a folder's index and headers say.

    tensors: by name, in the index's order. metadata: that of every file. index_metadata: that of the index.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    index_metadata: dict[str, Any]


class _HeaderEntry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


def read_header(file: Path, field: str, remedy: str) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata. Raises UserError naming ``field`` where the file is torn, is
    not a regular file or is not safetensors."""
    with reading(field, file, remedy, "is missing or damaged: it is not a complete safetensors file"):
        size = check_regular(file)
        with file.open("rb") as opened:
            header_size = int.from_bytes(opened.read(8), "little")
            if header_size > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {header_size:,} bytes does not fit into it")
            header = check_type(parse_json(opened.read(header_size).decode()), dict[str, Any])
        metadata = check_type(header.pop("__metadata__", None) or {}, dict[str, str])
        data_start = 8 + header_size
        entries = check_type(header, dict[str, _HeaderEntry])
        if size < data_start + max((max(entry["data_offsets"], default=0) for entry in entries.values()), default=0):
            raise ValueError("it is shorter than its header says")
        with safe_open(file, "np"):
            pass  # checks dtypes, shapes and offsets against each other and against the size of the file
        tensors = [
            StoredTensor(name, file, data_start + first, data_start + last, f"{entry['dtype']} {entry['shape']}")
            for name, entry in entries.items()
            for first, last in [entry["data_offsets"]]
        ]
    return tensors, metadata


def read_tensor_folder(folder: Path, field: str, remedy: str) -> TensorFolder:
    """The headers of all files that a folder's index names, or of its ``model.safetensors`` where there is no index.

    Raises UserError naming ``field`` unless every file is a whole safetensors file beside the index and holds the
    tensors that the index says, and all files have the same metadata.
    """
    index = folder / INDEX_NAME
    with reading(field, folder, remedy):
        if not folder.is_dir():
            raise UserError(field, str(folder), "is not a folder", remedy)
        if not index.exists() and not (folder / SINGLE_NAME).exists():
            if several := tensor_folders(folder):
                problem = f"holds a folder for each of {', '.join(several)}"
                likely = min(several, key=lambda name: name != field.strip("-"))
                raise UserError(field, str(folder), problem, f"name one of them, such as {folder / likely}")
            raise UserError(field, str(folder), f"holds no {INDEX_NAME}", remedy)
    if not index.exists():
        tensors_of_file, metadata_of_file = read_header(folder / SINGLE_NAME, field, remedy)
        return TensorFolder({tensor.name: tensor for tensor in tensors_of_file}, metadata_of_file, {})
    file_of, index_metadata = read_index_content(index, field, remedy)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] | None = None
    for file_name in sorted(set(file_of.values())):
        if not file_name.endswith(SUFFIX):
            raise UserError(field, str(index), f"names {file_name!r}, which is not a {SUFFIX} file", remedy)
        entries, file_metadata = read_header(folder / file_name, field, remedy)
        if metadata is not None and file_metadata != metadata:
            raise UserError(
                field, str(folder), "its files have different metadata: they come from different runs", remedy
            )
        metadata = file_metadata
        for entry in entries:
            if file_of.get(entry.name) != file_name:
                problem = f"holds {entry.name}, which {INDEX_NAME} does not say"
                raise UserError(field, str(folder / file_name), problem, remedy)
            tensors[entry.name] = entry
    if metadata is None:
        raise UserError(field, str(folder), "names no parameter", remedy)
    for name, file_name in file_of.items():
        if name not in tensors:
            raise UserError(field, str(folder / file_name), f"does not hold {name}, as {INDEX_NAME} says", remedy)
    return TensorFolder({name: tensors[name] for name in file_of}, metadata, index_metadata)


def tensor_folders(folder: Path) -> list[str]:
    """Names of the folders of tensors in a folder, sorted; a run with several criteria has one for each."""
    return sorted(index.parent.name for index in folder.glob(f"[!.]*/{INDEX_NAME}"))


def tensor_sha256(tensor: StoredTensor) -> str:
    """sha256 of a tensor's bytes, as they lie in its file. Raises OSError or ValueError."""
    digest = hashlib.sha256()
    left = tensor.num_bytes
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.first)
        while left > 0:
            if not (block := opened.read(min(left, BLOCK_BYTES))):
                raise ValueError(f"{tensor.file.name} is shorter than its header says")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def read_digests(folder: Path, names: Collection[str], field: str, remedy: str) -> dict[str, str]:
    """Parameter → sha256 of its bytes, from ``digests.json``; empty where the folder has none.

    Raises UserError naming ``field`` where the file is damaged or names other parameters than ``names``, the folder's.
    """
    file = folder / DIGESTS_NAME
    if not os.path.lexists(file):
        return {}
    digests = read_json(file, dict[str, str], field, remedy)
    if others := sorted(set(digests) ^ set(names)):
        problem = f"names other parameters than the folder holds ({', '.join(others[:5])})"
        raise UserError(field, str(file), problem, remedy)
    return digests
