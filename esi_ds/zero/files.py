"""Sharded tensors to and from disk: every rank writes its byte ranges of ordinary safetensors files.

A safetensors file is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and byte range,
and the bytes. The header follows from names and shapes alone, so rank 0 writes it and all ranks fill in their parts. No
tensor is ever whole in any rank's memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Buffer

from esi_ds.artifacts import (
    new_folder,
    replace_folder,
    temporary_name,
    wait_until_visible,
    write_json_atomic,
    write_text_atomic,
    writing,
)
from esi_ds.core.mask import UNITS_NAME, index_digests, num_bytes, pack_bits
from esi_ds.core.mask_metadata import ScoresMetadata
from esi_ds.core.score_folder import ScoreFolder
from esi_ds.core.stored import DTYPES
from esi_ds.core.units import Parameter, Shard
from esi_ds.reading import share_of
from esi_ds.tensor_files import DIGESTS_NAME, INDEX_NAME, StoredTensor, tensor_sha256
from esi_ds.zero import runtime

MAX_FILE_BYTES = 5 * 10**9  # as transformers splits its checkpoints
Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; dtype as named by safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors that are on the CPU to a safetensors file, and sync it to disk. Raises OSError naming the file."""
    with writing(file):
        file.touch()
        mode = file.stat().st_mode  # a new file's, by the user's umask; safetensors makes one that nobody else may read
        save_file(dict(tensors), file, metadata=metadata)
        file.chmod(mode)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def packed(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """The items of every file, in order: a new file begins where the sum of ``size_of`` would exceed ``limit``."""
    files: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        size = size_of(item)
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += size
    return files


def file_name(number: int, total: int) -> str:
    """The name of one of ``total`` files, counted from 1, as transformers names those of its checkpoints."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def file_header(
    entries: Iterable[Entry], metadata: dict[str, str], compact: bool = False
) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and the offset of each tensor's data in the file, by name.

    compact: byte for byte as safetensors writes it, for entries in its order.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset, starts = 0, {}
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        starts[entry.name] = offset
        offset = end
    layout: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False} if compact else {}
    text = json.dumps(header, **layout).encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data_start + start for name, start in starts.items()}


def raw_bytes(values: Tensor) -> memoryview:
    """A tensor's bytes as they lie in a file; those of a tensor on the CPU are not copied."""
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class FolderFiles:
    """The safetensors files of a folder that is being written, by all ranks at the same time.

    Rank 0 calls ``start``, which lays them out; after a barrier every rank fills in what it holds.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Sequence[Entry]], metadata: dict[str, str], compact: bool = False
    ):
        """folder: under its temporary name. files: file's name → its tensors, in order. metadata: of each file.

        compact: as for ``file_header``.
        """
        self.folder, self._files = folder, files
        self._headers = {file: file_header(entries, metadata, compact) for file, entries in files.items()}

    def start(self, index_metadata: Mapping[str, str] | None = None) -> None:
        """Make the folder with its index and every file at full size, with its header.

        index_metadata: what the index says besides the files.
        """
        new_folder(self.folder)
        weight_map: dict[str, str] = {}
        total = 0
        for file, entries in self._files.items():
            header = self._headers[file][0]
            size = sum(entry.num_bytes for entry in entries)
            with writing(self.folder / file), (self.folder / file).open("wb", buffering=0) as opened:
                opened.truncate(len(header) + size)  # first: an NFS client writes whole pages at a file's end
                _write_at(opened, 0, header)
            weight_map.update({entry.name: file for entry in entries})
            total += size
        metadata = {"total_size": total, **(index_metadata or {})}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomic(self.folder / INDEX_NAME, index)

    def write(self, local_bytes: Callable[[str], Iterable[tuple[int, Buffer]]]) -> None:
        """Write what this rank holds of every tensor, and sync every file to disk. Raises OSError naming the file.

        local_bytes(name): (first byte within the tensor, bytes) of every range that this rank holds.
        """
        files = list(self._files)
        # Not all ranks in one file at a time: a file system lets one of them write to it.
        first = len(files) * runtime.rank() // runtime.world_size()
        for file in files[first:] + files[:first]:
            starts = self._headers[file][1]
            with self._opened(file) as opened:
                for entry in self._files[file]:
                    for low, data in local_bytes(entry.name):
                        _write_at(opened, starts[entry.name] + low, data)
                os.fsync(opened.fileno())

    def write_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors of one file; ``write`` will sync it. Raises OSError naming the file."""
        starts = self._headers[file][1]
        with self._opened(file) as opened:
            for name, tensor in tensors.items():
                _write_at(opened, starts[name], raw_bytes(tensor))

    @contextmanager
    def _opened(self, file: str) -> Iterator[FileIO]:
        """The file, opened for writing only. If it could be read as well, an NFS client would read each page that it
        writes a part of, and later write the whole page back, over what another host has put there in the meantime."""
        path = wait_until_visible(self.folder / file)
        with writing(path), open(os.open(path, os.O_WRONLY), "wb", buffering=0) as opened:
            yield opened

    def read_digests(self) -> dict[str, str]:
        """sha256 of every tensor in this rank's share, read from disk."""
        tensors = {
            entry.name: StoredTensor(
                entry.name, self.folder / file, start, start + entry.num_bytes, f"{entry.dtype} {list(entry.shape)}"
            )
            for file, entries in self._files.items()
            for entry in entries
            for start in [self._headers[file][1][entry.name]]
        }
        sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
        names = share_of(sizes, runtime.rank(), runtime.world_size())
        return {name: tensor_sha256(tensors[name]) for name in names}


def _write_at(opened: FileIO, position: int, data: Buffer) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(opened.fileno(), left, position)
        position, left = position + count, left[count:]


def write_folder(
    folder: Path,
    files: dict[str, list[Entry]],
    metadata: dict[str, str],
    local_bytes: Callable[[str], Iterable[tuple[int, Buffer]]],
    extra: dict[str, str] | None = None,
    index_metadata: dict[str, str] | None = None,
) -> None:
    """A folder of safetensors files and their index, written by all ranks; it gets its name once it is complete.

    local_bytes: as for ``FolderFiles.write``. extra: text of further files, by name; ``digests.json`` has the sha256 of
    every tensor, as read back from disk. index_metadata: what the index says besides the files.
    Collectives: three barriers, and a gather of the digests.
    """
    written = FolderFiles(temporary_name(folder), files, metadata)
    if runtime.is_main():
        written.start(index_metadata)
        for name, text in (extra or {}).items():
            write_text_atomic(written.folder / name, text)
    runtime.barrier()
    written.write(local_bytes)
    runtime.barrier()
    digests = runtime.gather_dict(written.read_digests())
    if runtime.is_main():
        write_json_atomic(written.folder / DIGESTS_NAME, digests)
        replace_folder(written.folder, folder)
    runtime.barrier()


def write_scores(
    folder: Path,
    parameters: Sequence[Parameter],
    shards: Iterable[Shard],
    scores: dict[str, Tensor],
    metadata: dict[str, str],
) -> None:
    """Write ``scores/``: float32 in the parameters' shapes. Collectives: those of ``write_folder``.

    parameters: those that are scored. shards: this rank's. scores: [shard.numel] by shard's name.
    """
    local_runs = by_parameter(shards, scores)

    def local_bytes(name: str) -> Iterator[tuple[int, memoryview]]:
        for low, values in local_runs.get(name, ()):
            yield 4 * low, raw_bytes(values)

    write_folder(folder, _score_files(parameters), metadata, local_bytes)


def by_parameter(shards: Iterable[Shard], values: Mapping[str, Tensor]) -> dict[str, list[tuple[int, Tensor]]]:
    """Parameter's name → (first flat position, values) of every run in ``shards``. values: by shard's name."""
    runs_of: dict[str, list[tuple[int, Tensor]]] = {}
    for shard in shards:
        runs = [(low, values[shard.name][where]) for where, low, _ in shard.parts()]
        runs_of.setdefault(shard.parameter.name, []).extend(runs)
    return runs_of


def read_scores(folder: Path, shards: Iterable[Shard], field: str) -> tuple[dict[str, Tensor], ScoresMetadata | None]:
    """float32 scores [shard.numel] by shard's name, and what they say of themselves, if anything.

    Only these shards' bytes of the scores are kept. Digests are checked of whole parameters, which the ranks share out.
    Raises UserError naming ``field``, on every rank, where the folder does not hold scores of these parameters, or not
    those that were written. Collectives: one gather.
    """
    stored = ScoreFolder(folder, field)
    problems = runtime.gather_objects(stored.problems(runtime.rank(), runtime.world_size()))
    stored.refuse(problem for part in problems for problem in part)
    scores = {}
    for shard in shards:
        stored.check_shape(shard.parameter.name, shard.parameter.shape)
        runs = [stored.read(shard.parameter.name, low, high) for low, high in shard.runs]
        scores[shard.name] = runs[0] if len(runs) == 1 else torch.cat([torch.zeros(0), *runs])
    return scores, stored.metadata


def _score_files(parameters: Sequence[Parameter]) -> dict[str, list[Entry]]:
    entries = [Entry(p.name, "F32", p.shape) for p in parameters]
    files = packed(entries, lambda entry: entry.num_bytes, MAX_FILE_BYTES)
    return {file_name(number, len(files)): file for number, file in enumerate(files, 1)}


def write_mask(
    folder: Path,
    parameters: Sequence[Parameter],
    shards: Iterable[Shard],
    bits: dict[str, Tensor],
    metadata: dict[str, str],
    units: list[dict[str, Any]],
) -> None:
    """Write ``mask/``: one bit a weight, in files like those of the scores, and ``units.json``, the logical matrices.

    parameters: those that are scored. shards: this rank's. bits: bool [shard.numel] by shard's name. Collectives: those
    of ``write_folder``, and one gather of the bytes that are shared between ranks.
    """
    files = {
        file: [Entry(entry.name, "U8", (num_bytes(math.prod(entry.shape)),)) for entry in entries]
        for file, entries in _score_files(parameters).items()
    }
    local_runs = by_parameter(shards, bits)
    shared = _shared_bytes([parameter.name for parameter in parameters], local_runs)

    def local_bytes(name: str) -> Iterator[tuple[int, bytes]]:
        for low, run in local_runs.get(name, ()):
            first = -(-low // 8)
            if data := pack_bits(run[8 * first - low : 8 * ((low + len(run)) // 8) - low]).numpy().tobytes():
                yield first, data
        if runtime.is_main():
            yield from ((byte, bytes([value])) for byte, value in shared[name].items())

    text = json.dumps(units)  # on one line: there is a row for every matrix
    digests = index_digests(metadata, text)
    write_folder(folder, files, metadata, local_bytes, {UNITS_NAME: text}, digests)


def _shared_bytes(
    names: Sequence[str], local_runs: Mapping[str, list[tuple[int, Tensor]]]
) -> dict[str, dict[int, int]]:
    """Parameter's name → byte → value, of every byte in which a run of any rank begins or ends. One gather.

    Such a byte's bits may come from several ranks and runs. No two hold the same bit, so the byte is their sum.
    """
    rows = []  # (number of the parameter, byte, value of this run's bits)
    for number, name in enumerate(names):
        for low, run in local_runs.get(name, ()):
            high = low + len(run)
            for byte in sorted({low // 8, high // 8}) if high > low else ():
                first, last = max(low, 8 * byte), min(high, 8 * byte + 8)
                if 0 < last - first < 8:
                    rows.append((number, byte, int(pack_bits(run[first - low : last - low])[0]) << (first - 8 * byte)))
    shared: dict[str, dict[int, int]] = {name: {} for name in names}
    for part in runtime.gather_objects(torch.tensor(rows, dtype=torch.int64).view(-1, 3)):
        for number, byte, value in part.tolist():
            shared[names[number]][byte] = shared[names[number]].get(byte, 0) + value
    return shared
