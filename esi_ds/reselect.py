"""The exact selection again, from scores on disk: what a mask must be, and masks of another ratio or order.

Scores are read in chunks, each by one rank, so that memory does not grow with the model. Only counts
are shared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from esi_ds.artifacts import may_write, replace_folder, wait_until_visible, write_json_atomic, write_text_atomic
from esi_ds.core.mask import DIGESTS_NAME, INDEX_NAME, Mask, digest, num_bytes, pack_bits
from esi_ds.core.select import Cut, Order, ScoreRun, key_to_score, select
from esi_ds.core.units import Unit
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import checkpoint_tensors
from esi_ds.ranks import Ranks
from esi_ds.zero.files import save_tensors

UNITS_NAME = "units.json"
CHUNK = 1 << 22  # weights in memory together; a multiple of 8, so that a chunk's bits are whole bytes

Span = tuple[str, int, int]  # parameter, and flat elements [low, high) of it


def spans(mask: Mask) -> list[Span]:
    """All scored weights in the model's order, in chunks."""
    return [span for name in mask.names for span in _cut(name, 0, mask.numel(name))]


def _cut(name: str, first: int, last: int) -> list[Span]:
    return [(name, low, min(low + CHUNK, last)) for low in range(first, last, CHUNK)]


def read_units(mask: Mask) -> dict[str, list[Unit]]:
    """Logical matrices by parameter, from ``units.json``; a parameter without any is one matrix of its own."""
    file = mask.path / UNITS_NAME
    units: dict[str, list[Unit]] = {name: [] for name in mask.names}
    try:
        for row in json.loads(file.read_text()) if file.is_file() else ():
            units[row.pop("parameter")].append(Unit(**row))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"does not hold the matrices of this mask ({type(error).__name__}: {error})"
        raise UserError("MASK", str(file), problem, "copy the mask's folder again") from error
    for name, found in units.items():
        if not found:
            found.append(Unit(name, "other", None, None, 0, mask.numel(name)))
    return units


class ScoreFolder:
    """``scores/`` of a run, read by byte ranges: nothing of a file stays in memory."""

    def __init__(self, folder: Path):
        """Raises UserError where the folder holds none."""
        self.folder = folder
        try:
            if not (folder / INDEX_NAME).is_file():
                raise FileNotFoundError(f"no {INDEX_NAME}")
            self._places = {name: (file, first, about) for name, file, first, _, about in checkpoint_tensors(folder)}
        except (OSError, ValueError) as error:
            raise UserError("--scores", str(folder), f"holds no scores ({error})", "give RUN/scores") from error

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def check(self, mask: Mask) -> None:
        """Raises UserError where a parameter's scores are not float32 in its own shape."""
        for name in mask.names:
            about = self._places[name][2] if name in self._places else "nothing"
            if about != (wanted := f"F32 {list(mask.shapes[name])}"):
                problem = f"holds {about} for {name}, expected {wanted}"
                raise UserError("--scores", str(self.folder), problem, "give RUN/scores of the same run")

    def read(self, name: str, low: int, high: int) -> Tensor:
        """float32 [high − low]."""
        file, first, _ = self._places[name]
        with file.open("rb") as opened:
            opened.seek(first + 4 * low)
            data = opened.read(4 * (high - low))
        if len(data) != 4 * (high - low):
            raise UserError("--scores", str(file), "is shorter than its header says", "copy it again")
        return torch.frombuffer(bytearray(data), dtype=torch.float32)


class Reselection:
    """The exact selection from ``scores``, as bits of any span.

    mask: any mask made from these scores. wanted: ``order``, ``seed``, ``scope``, ``k``, ``ratio``, as in metadata.
    Its constructor performs collectives: six histograms of 16 KiB, with scope ``matrix`` for every matrix.
    """

    def __init__(self, mask: Mask, scores: ScoreFolder, wanted: Mapping[str, str], ranks: Ranks):
        self._mask, self._scores, self._ranks = mask, scores, ranks
        self._order = Order(wanted["order"], int(wanted["seed"]))
        self._offsets: dict[str, int] = json.loads(mask.metadata["offsets"])
        self._whole: Cut | None = None
        self._cuts: dict[str, list[tuple[Unit, int, Cut]]] = {}  # scope matrix: unit, its first position, its cut
        if wanted["scope"] == "model":
            self._whole = self._select(
                _Pieces(self._whole_piece, spans(mask)[ranks.rank :: ranks.size]), int(wanted["k"])
            )
        else:
            for name, units in read_units(mask).items():
                self._cuts[name] = list(self._select_units(name, units, float(wanted["ratio"])))

    @property
    def threshold(self) -> str:
        """As in a mask's metadata: "null" with scope ``matrix``, and where no score is a limit (``key_to_score``)."""
        found = key_to_score(self._whole, self._order.name) if self._whole is not None else None
        return "null" if found is None else repr(found)

    def bits(self, name: str, low: int, high: int) -> Tensor:
        """bool [high − low]."""
        if self._whole is not None:
            return self._selected(self._whole, self._whole_piece((name, low, high)))
        bits = torch.zeros(high - low, dtype=torch.bool)
        for unit, position, cut in self._cuts[name]:
            if unit.meets(low, high):
                piece = self._unit_piece(unit, position, (name, low, high))
                bits[unit.within(low, high)] = self._selected(cut, piece)
        return bits

    def _selected(self, cut: Cut, piece: ScoreRun) -> Tensor:
        return cut.selects(self._order.keys(piece.scores, piece.position), piece.position)

    def _select(self, pieces: _Pieces, k: int) -> Cut:
        (cut,) = select([pieces], [k], self._order, self._mask.total_numel - 1, self._ranks.add)
        return cut

    def _select_units(self, name: str, units: list[Unit], ratio: float) -> Iterator[tuple[Unit, int, Cut]]:
        """Scope ``matrix``: ⌊ratio · n⌋ of each logical matrix."""
        position = self._offsets[name]
        for unit in units:
            own = _cut(name, unit.start, unit.end)[self._ranks.rank :: self._ranks.size]
            pieces = _Pieces(lambda span, unit=unit, at=position: self._unit_piece(unit, at, span), own)
            yield unit, position, self._select(pieces, int(ratio * unit.numel))
            position += unit.numel

    def _whole_piece(self, span: Span) -> ScoreRun:
        name, low, _ = span
        return ScoreRun(self._scores.read(*span), self._offsets[name] + low)

    def _unit_piece(self, unit: Unit, position: int, span: Span) -> ScoreRun:
        """The unit's part of a span. Units of a parameter lie one behind another in the order of ties."""
        _, low, high = span
        return ScoreRun(self._scores.read(*span)[unit.within(low, high)], position + unit.num_before(low))


class _Pieces:
    """Pieces read from the disk each time somebody goes through them."""

    def __init__(self, read, wanted: list[Span]):
        self._read, self._wanted = read, wanted

    def __iter__(self) -> Iterator[ScoreRun]:
        return map(self._read, self._wanted)


def write_selection(
    mask: Mask, folder: Path, output: Path, ratio: float, order: str, seed: int, ranks: Ranks | None = None
) -> Mask:
    """A mask of another ratio or order from the scores that ``mask`` was made from; its ``of`` and ``scope``.

    Files are cut as ``mask``'s; one of them is in memory at a time. The folder is written whole or not at all.
    """
    ranks = ranks or Ranks()
    if output.exists():
        raise UserError("OUTPUT", str(output), "exists already", "give a new folder")
    if not may_write(output):
        raise UserError("OUTPUT", str(output), "cannot be made there", "give a folder of your own")
    scores = ScoreFolder(folder)
    scores.check(mask)
    metadata = {**mask.metadata, "ratio": repr(ratio), "order": order, "seed": str(seed)}
    scored = sum(mask.numel(name) for name in mask.names)
    base = scored if mask.metadata.get("of") == "scored" else mask.total_numel
    metadata["k"] = str(min(int(ratio * base), scored))
    found = Reselection(mask, scores, metadata, ranks)
    numbers = torch.zeros(len(mask.names), dtype=torch.int64)
    places = {name: index for index, name in enumerate(mask.names)}
    for name, low, high in spans(mask)[ranks.rank :: ranks.size]:
        numbers[places[name]] += int(found.bits(name, low, high).sum())
    counts = dict(zip(mask.names, ranks.add(numbers).tolist(), strict=True))
    metadata |= {"counts": json.dumps(counts), "k": str(sum(counts.values())), "threshold": found.threshold}
    _write(mask, found, metadata, output, ranks)
    wait_until_visible(output / INDEX_NAME)
    return Mask.load(output)


def _write(mask: Mask, found: Reselection, metadata: dict[str, str], output: Path, ranks: Ranks) -> None:
    """The ranks share the files; rank 0 gives the folder its name once all are written."""
    temporary = output.with_name(f".{output.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.gather(None)  # nobody writes before the folder exists
    local_digests: dict[str, str] = {}
    for file in mask.files[ranks.rank :: ranks.size]:
        data = {name: _packed(mask, found, name) for name in mask.names if mask.file_of(name) == file}
        save_tensors(data, wait_until_visible(temporary) / file, metadata=metadata)
        local_digests |= {name: digest(values) for name, values in data.items()}
    gathered = ranks.gather(local_digests)
    if ranks.rank == 0:
        digests = {name: value for part in gathered for name, value in part.items()}
        index = {"metadata": {}, "weight_map": {name: mask.file_of(name) for name in mask.names}}
        write_json_atomic(temporary / INDEX_NAME, index)
        write_json_atomic(temporary / DIGESTS_NAME, digests)
        if (mask.path / UNITS_NAME).is_file():
            write_text_atomic(temporary / UNITS_NAME, (mask.path / UNITS_NAME).read_text())
        replace_folder(temporary, output)
    ranks.gather(None)  # nobody reads before the folder has its name


def _packed(mask: Mask, found: Reselection, name: str) -> Tensor:
    """uint8 [⌈numel / 8⌉]."""
    data = torch.empty(num_bytes(mask.numel(name)), dtype=torch.uint8)
    for _, low, high in _cut(name, 0, mask.numel(name)):
        data[low // 8 : num_bytes(high)] = pack_bits(found.bits(name, low, high))
    return data
