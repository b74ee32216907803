"""Sharded tensors to and from disk: every rank writes its own byte ranges of ordinary safetensors files.

A safetensors file is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and byte range,
and the bytes. The header follows from names and shapes alone, so rank 0 writes it and all ranks fill in their parts;
no tensor is ever whole in anybody's memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esi_ds.artifacts import replace_folder, wait_until_visible, write_json_atomic, writing
from esi_ds.core.mask import DIGESTS_NAME, INDEX_NAME, digest, num_bytes, pack_bits
from esi_ds.core.units import Parameter, Shard
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import checkpoint_tensors
from esi_ds.zero import runtime

MAX_FILE_BYTES = 5 * 10**9  # as transformers cuts its checkpoints
ITEM_SIZE = {"F32": 4, "U8": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as safetensors names it, shape, and its number of bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * ITEM_SIZE[self.dtype]


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of tensors on the CPU, on disk when this returns. Raises OSError naming the file."""
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # the system's error is left in the text only
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error
    with writing(file), file.open("rb") as opened:
        os.fsync(opened.fileno())


def plan_files(entries: Sequence[Entry], size_of: Callable[[Entry], int]) -> dict[str, list[Entry]]:
    """File name → its entries, in order; a new file begins where ``size_of`` would pass MAX_FILE_BYTES."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + size_of(entry) > MAX_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size_of(entry)
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def file_header(entries: Iterable[Entry], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor's data begins in the file."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset, starts = 0, {}
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        starts[entry.name] = offset
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data_start + start for name, start in starts.items()}


def write_folder(
    folder: Path,
    files: dict[str, list[Entry]],
    metadata: dict[str, str],
    local_bytes: Callable[[str], tuple[int, bytes]],
    extra: dict[str, Any] | None = None,
    digests_name: str | None = None,
) -> None:
    """A folder of safetensors and its index, written by all ranks; moved to its name when it is whole.

    local_bytes(name): (first byte within the tensor, this rank's bytes). extra: further JSON files, by name.
    digests_name: a JSON file of the sha256 of every uint8 tensor, read back from the disk. Three barriers, and a gather
    of the digests.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    headers = {file: file_header(entries, metadata) for file, entries in files.items()}
    if runtime.is_main():
        _start_folder(temporary, files, headers)
        for name, content in (extra or {}).items():
            (temporary / name).write_text(json.dumps(content))
    runtime.barrier()
    for file, entries in files.items():
        path = wait_until_visible(temporary / file)
        with writing(path), path.open("r+b") as opened:
            for entry in entries:
                first, data = local_bytes(entry.name)
                opened.seek(headers[file][1][entry.name] + first)
                opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
    runtime.barrier()
    if digests_name is not None:
        parts = runtime.gather_objects(_read_digests(temporary, files))
        if runtime.is_main():
            write_json_atomic(temporary / digests_name, {name: found for part in parts for name, found in part.items()})
    if runtime.is_main():
        replace_folder(temporary, folder)
    runtime.barrier()


def _read_digests(folder: Path, files: dict[str, list[Entry]]) -> dict[str, str]:
    """sha256 of this rank's share of the tensors, whoever wrote them."""
    places = [(file, entry.name) for file, entries in files.items() for entry in entries]
    digests = {}
    for file, name in places[runtime.rank() :: runtime.world_size()]:
        with safe_open(folder / file, "pt") as opened:
            digests[name] = digest(opened.get_tensor(name))
    return digests


def _start_folder(temporary: Path, files: dict[str, list[Entry]], headers: dict[str, tuple[bytes, dict[str, int]]]):
    """Rank 0: an empty folder with the index and every file at its full size, headers written."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weight_map, total = {}, 0
    for file, entries in files.items():
        header = headers[file][0]
        with writing(temporary / file), (temporary / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + sum(entry.num_bytes for entry in entries))
        weight_map.update({entry.name: file for entry in entries})
        total += sum(entry.num_bytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (temporary / INDEX_NAME).write_text(json.dumps(index, indent=1))


def write_scores(
    folder: Path,
    parameters: Sequence[Parameter],
    low: Callable[[Parameter], int],
    scores: dict[str, Tensor],
    metadata: dict[str, str],
) -> None:
    """``scores/``: float32 in the parameters' own shapes. ``low(p)``: first flat element of this rank's shard."""
    by_name = {parameter.name: parameter for parameter in parameters}

    def local_bytes(name: str) -> tuple[int, bytes]:
        return 4 * low(by_name[name]), scores[name].cpu().numpy().tobytes()

    write_folder(folder, _score_files(parameters), metadata, local_bytes)


def read_scores(folder: Path, shards: Iterable[Shard], field: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """float32 scores [shard.numel] of these shards, and the folder's metadata. Reads only these shards' bytes.

    Raises UserError naming ``field`` where the folder does not hold such scores.
    """
    try:
        tensors = {name: (file, first, about) for name, file, first, _, about in checkpoint_tensors(folder)}
        with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, ValueError, IndexError, SafetensorError) as error:
        raise UserError(field, str(folder), f"holds no scores ({error})", "give RUN/scores") from error
    found = {}
    for shard in shards:
        name, shape = shard.parameter.name, list(shard.parameter.shape)
        file, first, about = tensors.get(name, (None, 0, "nothing"))
        if about != f"F32 {shape}":
            problem = f"holds {about} for {name}, expected F32 {shape}"
            raise UserError(field, str(folder), problem, "give the scores of this model")
        with file.open("rb") as opened:
            opened.seek(first + 4 * shard.low)
            data = opened.read(4 * shard.numel)
        # A writable copy; frombuffer takes no empty buffer, which a rank without a part of this parameter has.
        found[name] = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.zeros(0)
    return found, metadata


def _score_files(parameters: Sequence[Parameter]) -> dict[str, list[Entry]]:
    return plan_files([Entry(p.name, "F32", p.shape) for p in parameters], lambda entry: entry.num_bytes)


def write_mask(
    folder: Path,
    parameters: Sequence[Parameter],
    low: Callable[[Parameter], int],
    bits: dict[str, Tensor],
    metadata: dict[str, str],
    units: list[dict],
) -> None:
    """``mask/``: one bit a weight, cut into files as the scores are; ``units.json`` names the logical matrices.

    Collectives: two all-reduces of a few numbers per parameter and rank, for the bytes that two ranks' shards share.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    files = {
        file: [Entry(entry.name, "U8", (num_bytes(torch.Size(entry.shape).numel()),)) for entry in entries]
        for file, entries in _score_files(parameters).items()
    }
    starts = torch.tensor([low(parameter) for parameter in parameters])
    last_bytes = _shared_bytes(parameters, starts, bits)

    def local_bytes(name: str) -> tuple[int, bytes]:
        first_bit, own = low(by_name[name]), bits[name]
        skip = min(-first_bit % 8, len(own))  # these lie in a byte that began on an earlier rank
        data = pack_bits(own[skip:])
        if len(data):
            data[-1] = last_bytes[name]
        return (first_bit + skip) // 8, data.numpy().tobytes()

    write_folder(folder, files, metadata, local_bytes, extra={"units.json": units}, digests_name=DIGESTS_NAME)


def _shared_bytes(parameters: Sequence[Parameter], starts: Tensor, bits: dict[str, Tensor]) -> dict[str, int]:
    """For every parameter the whole value of the last byte that begins in this rank's shard.

    Such a byte may hold bits of later ranks. Every rank adds the bits it has in every rank's last byte; no two ranks
    hold the same bit, so the sum is the byte.
    """
    rank, ranks = runtime.rank(), runtime.world_size()
    bounds = torch.zeros(ranks, len(parameters), 2, dtype=torch.int64)
    lengths = torch.tensor([len(bits[parameter.name]) for parameter in parameters])
    bounds[rank] = torch.stack([starts, starts + lengths], dim=1)
    runtime.all_reduce_sum(bounds)
    values = torch.zeros(ranks, len(parameters), dtype=torch.int64)
    for index, parameter in enumerate(parameters):
        low, high = bounds[rank, index].tolist()
        own = bits[parameter.name]
        for owner in range(rank + 1):
            owner_low, owner_high = bounds[owner, index].tolist()
            byte = (owner_high - 1) // 8
            if owner_high == owner_low or 8 * byte < owner_low or 8 * byte + 8 <= low:
                continue  # no byte begins there, or it ends before this shard
            first, last = max(low, 8 * byte), min(high, 8 * byte + 8)
            if first < last:
                value = pack_bits(own[first - low : last - low])
                values[owner, index] += int(value[0]) << (first - 8 * byte)
    runtime.all_reduce_sum(values)
    return {parameter.name: int(values[rank, index]) for index, parameter in enumerate(parameters)}
