"""A mask on disk: one bit a weight, keyed by full parameter name and flat index (docs/design.md §7, ``esi-mask/1``).

Bit i of the flattened (row-major) parameter is bit i % 8, least significant first, of byte i // 8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from esi_ds.core.mask_metadata import FORMAT, MaskMetadata
from esi_ds.core.units import Parameter, Shard
from esi_ds.errors import UserError
from esi_ds.reading import json_sha256, reading, share_of
from esi_ds.tensor_files import DIGESTS_NAME, INDEX_NAME, TensorFolder, read_digests, read_tensor_folder

FIELD, REMEDY = "mask", "give the mask/ folder of a finished run, or make the mask again"
UNITS_NAME = "units.json"
NO_MASK = "none"  # as ``tune.mask``: SPA that freezes no scored weight
# Keys of the index's metadata: sha256 of what the shards' bytes do not cover; optional likewise.
METADATA_DIGEST, UNITS_DIGEST = "metadata_sha256", "units_sha256"
BITS_SHA256 = "mask_bits_sha256"  # in manifests


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

    Attributes:
        path: the folder.
        metadata, header: the metadata of the files, as text and typed.
        shapes: parameter → its shape.
        counts: parameter → its number of selected weights.
        k: the number of selected weights of all parameters.
        fingerprint: that of the scored model.
        index_metadata: the metadata of the index.
    """

    def __init__(self, path: Path, folder: TensorFolder, header: MaskMetadata):
        self.path = path
        self.metadata = folder.metadata
        self.header = header
        self.shapes = header.shapes
        self.counts = header.counts
        self.k = header.k
        self.fingerprint = header.fingerprint
        self.index_metadata = folder.index_metadata
        self._tensors = folder.tensors
        self._opened: tuple[Path, safe_open] | None = None
        self.known_digests: dict[str, str] = {}  # of a mask without digests, of the bits that any rank has read
        self.is_sound = False  # whether its bits have been checked

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Open a mask folder and check its headers; ``problems`` checks the bits.

        Raises UserError where the folder is not a complete ``esi-mask/1``, or where its headers contradict each other.
        """
        path = Path(path)
        folder = read_tensor_folder(path, FIELD, REMEDY)
        if folder.metadata.get("format") != FORMAT:
            problem = f"has format {folder.metadata.get('format')!r}, not {FORMAT!r}"
            raise UserError(FIELD, str(path), problem, "give a folder made by esi_ds")
        with reading(FIELD, path, REMEDY, "has damaged metadata"):
            header = MaskMetadata.parse(folder.metadata)
        mask = cls(path, folder, header)
        if problems := mask._header_problems():
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(FIELD, str(path), f"contradicts itself: {'; '.join(problems[:3])}{more}", REMEDY)
        return mask

    def _header_problems(self) -> list[str]:
        """Every contradiction among the index, the files' headers and the metadata."""
        named = {"shapes": set(self.shapes), "counts": set(self.counts)}
        if self.header.offsets is not None:
            named["offsets"] = set(self.header.offsets)
        for key, names in named.items():
            if others := names ^ set(self._tensors):
                return [f"its index and {key} name different parameters: {sorted(others)[:5]}"]
        problems = self.header.problems()
        for name, tensor in self._tensors.items():
            expected = f"U8 [{num_bytes(self.numel(name))}]"
            if tensor.description != expected:
                problems.append(f"{name}: holds {tensor.description}, expected {expected}")
        written = self.index_metadata.get(METADATA_DIGEST)
        if not problems and written is not None and written != json_sha256(self.metadata):
            problems.append(f"its metadata differ from those that were written ({METADATA_DIGEST} of {INDEX_NAME})")
        return problems

    @property
    def names(self) -> list[str]:
        """The parameters' names in the model's order, which is that of the ``shapes`` metadata."""
        return list(self.shapes)

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({tensor.file.name for tensor in self._tensors.values()})

    def file_of(self, name: str) -> str:
        """Name of the file that holds a parameter's bits."""
        return self._tensors[name].file.name

    def numel(self, name: str) -> int:
        """Number of weights of a parameter."""
        return math.prod(self.shapes[name])

    @property
    def total_numel(self) -> int:
        """Number of all weights of the model, scored or not."""
        return self.header.total_numel

    def data(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """uint8: bytes [first, last) of one parameter's bits. Raises UserError where the file can no longer be read."""
        file = self._tensors[name].file
        with reading(FIELD, file, REMEDY, "is missing or damaged"):
            # One file at a time: an open file is mapped, and pages that were read stay in memory until it is closed.
            opened = self._opened  # another thread may open another file meanwhile
            if opened is None or opened[0] != file:
                self._opened = opened = file, safe_open(file, "pt")
            return opened[1].get_slice(name)[first : num_bytes(self.numel(name)) if last is None else last]

    def bits(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """bool [high − low]: whether each weight of the flat range [low, high) is selected. Reads only their bytes.

        Raises ValueError unless 0 ≤ low ≤ high ≤ the parameter's number of weights.
        """
        numel = self.numel(name)
        high = numel if high is None else high
        if not 0 <= low <= high <= numel:
            raise ValueError(f"[{low}, {high}) is not a range within the {numel:,} weights of {name}")
        if high == low:
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
    def digests(self) -> dict[str, str]:
        """Parameter → sha256 of its bits; empty for a mask of an earlier version. Raises UserError."""
        return read_digests(self.path, self.shapes, FIELD, REMEDY)

    def digests_of_bits(self) -> dict[str, str]:
        """``digests``; those of a mask without them are made from its bits, once."""
        return self.digests or {name: self.digest_of_bits(name) for name in self.names}

    def digest_of_bits(self, name: str) -> str:
        """sha256 of a parameter's bits, which are read unless it is known already. Raises UserError where they cannot
        be read."""
        if name not in self.known_digests:
            self.known_digests[name] = digest(self.data(name))
        return self.known_digests[name]

    @property
    def bits_sha256(self) -> str | None:
        """sha256 of ``digests_of_bits`` as JSON with sorted keys: the same for masks that select the same weights of a
        model, in however many files. None for a mask without digests until all its bits have been read."""
        known = self.digests or self.known_digests
        return json_sha256(known) if known and len(known) == len(self.names) else None

    def problems(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """Every inconsistency between the bits and the metadata, one sentence each; empty if the mask is sound.

        Reads the share ``part`` of ``num_parts``, so that ranks can share the work. Where no digests are written, those
        of the bits read are in ``known_digests`` then. Raises UserError where the digests cannot be read.
        """
        problems: list[str] = []
        digests = self.digests
        for name in share_of({name: num_bytes(self.numel(name)) for name in self.names}, part, num_parts):
            try:
                data = self.data(name)
            except UserError as error:
                problems.append(f"{name}: cannot be read ({error.problem})")
                continue
            size = self.numel(name)
            selected = int(np.bitwise_count(data.numpy()).sum())
            if selected != self.counts[name]:
                problems.append(f"{name}: {selected} bits set, metadata says {self.counts[name]}")
            elif not digests:
                self.known_digests[name] = digest(data)
            elif digest(data) != digests[name]:
                problems.append(f"{name}: its bits differ from those that were written ({DIGESTS_NAME})")
            if size % 8 and int(data[-1]) >> (size % 8):
                problems.append(f"{name}: padding bits are set")
        return problems

    def check_bits(self) -> Mask:
        """The mask itself, once its bits have been checked; reads all of them, the first time. Raises UserError."""
        if not self.is_sound:
            refuse_problems(self, self.problems())
        return self

    def mark_sound(self) -> None:
        """Have ``check_bits`` read nothing: the ranks have shared the reading and met no problem."""
        self.is_sound = True


class EmptyMask(Mask):
    """A mask that selects no weight of a model, and lies in no file: nothing is frozen by it, whatever the weights are.

    parameters: of the model, in its order.
    """

    def __init__(self, parameters: Sequence[Parameter]):
        shapes = {parameter.name: parameter.shape for parameter in parameters if parameter.scored}
        total = sum(parameter.numel for parameter in parameters)
        header = MaskMetadata(
            k=0,
            ratio=0.0,
            total_numel=total,
            threshold=None,
            criterion=NO_MASK,
            contrastive=False,
            order="top",
            of="all",
            scope="model",
            seed=0,
            fingerprint=NO_MASK,
            shapes=shapes,
            counts=dict.fromkeys(shapes, 0),
            offsets=None,
        )
        metadata = {"format": FORMAT, "criterion": NO_MASK, "k": "0", "total_numel": str(total)}
        super().__init__(Path(NO_MASK), TensorFolder({}, metadata, {}), header)
        self.mark_sound()

    @property
    def digests(self) -> dict[str, str]:
        """None: it has no files."""
        return {}

    def data(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """uint8: zeros for bytes [first, last) of one parameter's bits."""
        end = num_bytes(self.numel(name)) if last is None else last
        return torch.zeros(max(0, end - first), dtype=torch.uint8)

    def problems(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """None: there is nothing that could be damaged."""
        return []


def refuse_problems(mask: Mask, problems: Sequence[str], field: str = FIELD) -> None:
    """Raise UserError naming ``field`` if the mask has any of ``problems``; else it is sound."""
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(field, str(mask.path), f"is damaged ({problems[0]}{more})", REMEDY)
    mask.mark_sound()


def load_mask(path: str, field: str = "tune.mask") -> Mask:
    """``Mask.load`` for a config key. Raises UserError naming ``field``."""
    try:
        return Mask.load(path)
    except UserError as error:
        raise UserError(field, error.value, error.problem, error.remedy) from error


def identity(mask: Mask) -> dict[str, str]:
    """What tells a mask from all others of its model, for manifests: sha256 of its metadata and of all its bits; for a
    mask without digests, the bits only once they have been read."""
    return {"mask_sha256": json_sha256(mask.metadata), **identity_of_bits(mask)}


def identity_of_bits(mask: Mask) -> dict[str, str]:
    """The part of ``identity`` that is about the bits; empty where they are not known."""
    return {} if mask.bits_sha256 is None else {BITS_SHA256: mask.bits_sha256}


def unread(mask: Mask) -> tuple[str, ...]:
    """The keys of ``identity`` that only the bits can tell, which have not been read."""
    return (BITS_SHA256,) if mask.k and mask.bits_sha256 is None else ()


def index_digests(metadata: Mapping[str, str], units: str | None) -> dict[str, str]:
    """What a mask's index says besides the files' names. units: the text of ``units.json``, None if there is none."""
    digests = {METADATA_DIGEST: json_sha256(metadata)}
    return digests if units is None else {**digests, UNITS_DIGEST: hashlib.sha256(units.encode()).hexdigest()}
