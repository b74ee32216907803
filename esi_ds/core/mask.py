"""A mask on disk: one bit a weight, keyed by full parameter name and flat index (docs/design.md §7, ``esi-mask/1``).

Bit i of the flattened (row-major) parameter is bit i % 8, least significant first, of byte i // 8.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esi_ds.core.units import Shard
from esi_ds.errors import UserError

FORMAT = "esi-mask/1"
INDEX_NAME = "model.safetensors.index.json"
DIGESTS_NAME = "digests.json"  # sha256 of every parameter's bytes; optional in masks from other tools


def num_bytes(numel: int) -> int:
    """Bytes that hold one bit for each of ``numel`` weights."""
    return -(-numel // 8)


def pack_bits(bits: Tensor) -> Tensor:
    """uint8 [⌈n/8⌉] of a bool tensor of n elements; the padding bits are 0."""
    return torch.from_numpy(np.packbits(bits.flatten().cpu().numpy(), bitorder="little"))


def unpack_bits(data: Tensor, count: int, skip: int = 0) -> Tensor:
    """bool [count]: the bits of a uint8 tensor from bit ``skip`` on."""
    bits = np.unpackbits(data.cpu().numpy(), count=skip + count, bitorder="little")
    return torch.from_numpy(bits[skip:].astype(bool))


def digest(data: Tensor) -> str:
    """sha256 of a uint8 tensor's bytes."""
    return hashlib.sha256(data.contiguous().numpy().data).hexdigest()


class Mask:
    """A mask folder, read lazily: only the requested bytes are read.

    Attributes: path, metadata (as in the files), shapes {parameter: shape}, counts {parameter: number of selected
    weights}, k (their sum), fingerprint (of the scored model).
    """

    def __init__(self, path: Path, weight_map: dict[str, str], metadata: dict[str, str]):
        self.path = path
        self.metadata = metadata
        self.shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        self.counts: dict[str, int] = json.loads(metadata["counts"])
        self.k = int(metadata["k"])
        self.fingerprint = metadata["fingerprint"]
        self._weight_map = weight_map
        self._opened: tuple[str, safe_open] | None = None

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Open a mask folder and check its headers; ``problems`` checks the bits.

        Raises UserError where the folder is not a complete, consistent ``esi-mask/1``.
        """
        path = Path(path)
        index = path / INDEX_NAME
        if not index.is_file():
            raise UserError("mask", str(path), f"holds no {INDEX_NAME}", "give the mask/ folder of a finished run")
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("mask", str(index), f"cannot be read: {error}", "make the mask again") from error
        metadata: dict[str, str] | None = None
        for file_name in sorted(set(weight_map.values())):
            file_metadata = cls._file_metadata(path / file_name)
            if metadata is not None and file_metadata != metadata:
                raise UserError("mask", str(path), "its files have different metadata", "they are of different masks")
            metadata = file_metadata
        if metadata is None:
            raise UserError("mask", str(path), "names no parameter", "make the mask again")
        mask = cls(path, weight_map, metadata)
        if set(mask.shapes) != set(weight_map) or set(mask.counts) != set(weight_map):
            raise UserError(
                "mask", str(path), "its index, shapes and counts name different parameters", "make the mask again"
            )
        return mask

    @staticmethod
    def _file_metadata(file: Path) -> dict[str, str]:
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError("mask", str(file), f"is missing or damaged ({error})", "make the mask again") from error
        if metadata.get("format") != FORMAT:
            raise UserError(
                "mask",
                str(file),
                f"has format {metadata.get('format')!r}, not {FORMAT!r}",
                "give a folder made by esi_ds",
            )
        return metadata

    @property
    def names(self) -> list[str]:
        """The parameters' names in the model's order, which is that of the ``shapes`` metadata."""
        return list(self.shapes)

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted(set(self._weight_map.values()))

    def file_of(self, name: str) -> str:
        """Name of the file that holds a parameter's bits."""
        return self._weight_map[name]

    def numel(self, name: str) -> int:
        """Number of weights of a parameter."""
        return torch.Size(self.shapes[name]).numel()

    @cached_property
    def total_numel(self) -> int:
        """Number of all weights of the model, scored or not."""
        return int(self.metadata["total_numel"])

    def data(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """uint8: bytes [first, last) of one parameter's bits."""
        file_name = self._weight_map[name]
        # One file at a time: an open file is mapped, and pages that were read stay in memory until it is closed.
        if self._opened is None or self._opened[0] != file_name:
            self._opened = file_name, safe_open(self.path / file_name, "pt")
        return self._opened[1].get_slice(name)[first : num_bytes(self.numel(name)) if last is None else last]

    def bits(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """bool [high − low]: whether each weight of the flat range [low, high) is selected. Reads only their bytes."""
        high = self.numel(name) if high is None else high
        if high <= low:
            return torch.zeros(0, dtype=torch.bool)
        return unpack_bits(self.data(name, low // 8, num_bytes(high)), high - low, skip=low % 8)

    def bits_of(self, shard: Shard) -> Tensor:
        """bool [shard.numel]: whether each weight of the shard is selected. Reads only their bytes."""
        parts = [self.bits(shard.parameter.name, low, high) for low, high in shard.runs]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *parts])

    def tensor(self, name: str) -> Tensor:
        """bool: the whole parameter's bits, in its shape."""
        return self.bits(name).reshape(self.shapes[name])

    @cached_property
    def _digests(self) -> dict[str, str]:
        file = self.path / DIGESTS_NAME
        try:
            return json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as error:
            raise UserError("mask", str(file), f"cannot be read: {error}", "make the mask again") from error

    def problems(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """Every inconsistency between the bits and the metadata, one sentence each; empty if the mask is sound.

        Reads every ``num_parts``-th parameter from number ``part`` on, so that ranks can share the work.
        """
        problems: list[str] = []
        for name in self.names[part::num_parts]:
            try:
                data = self.data(name)
            except (SafetensorError, OSError) as error:
                problems.append(f"{name}: cannot be read ({error})")
                continue
            numel = self.numel(name)
            if data.dtype != torch.uint8 or data.ndim != 1 or len(data) != num_bytes(numel):
                problems.append(f"{name}: {data.dtype} {list(data.shape)}, expected uint8 [{num_bytes(numel)}]")
                continue
            selected = int(np.bitwise_count(data.numpy()).sum())
            if selected != self.counts[name]:
                problems.append(f"{name}: {selected} bits set, metadata says {self.counts[name]}")
            elif name in self._digests and digest(data) != self._digests[name]:
                problems.append(f"{name}: its bits are not those that were written ({DIGESTS_NAME})")
            if numel % 8 and int(data[-1]) >> (numel % 8):
                problems.append(f"{name}: padding bits are set")
        if sum(self.counts.values()) != self.k:
            problems.append(f"counts add up to {sum(self.counts.values())}, k is {self.k}")
        return problems


def load_mask(path: str, field: str = "tune.mask") -> Mask:
    """``Mask.load`` for a config key. Raises UserError naming ``field``."""
    try:
        return Mask.load(path)
    except UserError as error:
        raise UserError(field, error.value, error.problem, error.remedy) from error


def metadata_sha256(mask: Mask) -> str:
    """sha256 of the metadata, which differs between two masks of one model: criterion, threshold, k, counts."""
    return hashlib.sha256(json.dumps(mask.metadata, sort_keys=True).encode()).hexdigest()
