"""The exact selection from scores on disk: to check a mask, and for masks of another ratio or order.

Scores are read in chunks, each by one rank, so that memory does not grow with the model. Only counts are shared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from esi_ds.artifacts import may_write, replace_folder, wait_until_visible, write_json_atomic, write_text_atomic
from esi_ds.core.mask import DIGESTS_NAME, INDEX_NAME, Mask, digest, num_bytes, pack_bits
from esi_ds.core.select import Cut, Order, ScoreRun, check_ratio, key_to_score, select
from esi_ds.core.units import Unit
from esi_ds.errors import UserError
from esi_ds.models.weights import checkpoint_tensors
from esi_ds.ranks import Ranks
from esi_ds.zero.files import save_tensors

UNITS_NAME = "units.json"
CHUNK = 1 << 22  # weights in memory at a time; a multiple of 8, so that a chunk's bits are whole bytes

Span = tuple[str, int, int]  # a parameter's name and its flat range [low, high)


def spans(mask: Mask) -> list[Span]:
    """All scored weights in the model's order, in chunks."""
    return [span for name in mask.names for span in _cut(name, 0, mask.numel(name))]


def _cut(name: str, first: int, last: int) -> list[Span]:
    return [(name, low, min(low + CHUNK, last)) for low in range(first, last, CHUNK)]


def read_units(mask: Mask) -> dict[str, list[Unit]]:
    """Logical matrices by parameter, from ``units.json``; a parameter without an entry is one matrix."""
    file = mask.path / UNITS_NAME
    units: dict[str, list[Unit]] = {name: [] for name in mask.names}
    try:
        for row in json.loads(file.read_text()) if file.is_file() else ():
            units[row.pop("parameter")].append(Unit(**row))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"does not hold the matrices of this mask ({type(error).__name__}: {error})"
        raise UserError("MASK", str(file), problem, "copy the mask's folder again") from error
    for name, units_of_parameter in units.items():
        if not units_of_parameter:
            units_of_parameter.append(Unit(name, "other", None, None, 0, mask.numel(name)))
    return units


class ScoreFolder:
    """``scores/`` of a run, read by byte ranges: no file stays in memory."""

    def __init__(self, folder: Path):
        """Raises UserError if the folder does not hold scores."""
        self.folder = folder
        try:
            if not (folder / INDEX_NAME).is_file():
                raise FileNotFoundError(f"no {INDEX_NAME}")
            self._tensors = {tensor.name: tensor for tensor in checkpoint_tensors(folder, "--scores")}
        except (OSError, ValueError) as error:
            raise UserError("--scores", str(folder), f"holds no scores ({error})", "give RUN/scores") from error

    @property
    def names(self) -> set[str]:
        """Names of the scored parameters."""
        return set(self._tensors)

    def check(self, mask: Mask) -> None:
        """Raises UserError unless every parameter's scores are float32 in the parameter's shape."""
        for name in mask.names:
            stored = self._tensors[name].description if name in self._tensors else "nothing"
            if stored != (expected := f"F32 {list(mask.shapes[name])}"):
                problem = f"holds {stored} for {name}, expected {expected}"
                raise UserError("--scores", str(self.folder), problem, "give RUN/scores of the same run")

    def read(self, name: str, low: int, high: int) -> Tensor:
        """The scores of the parameter's flat range [low, high): float32 [high − low]."""
        tensor = self._tensors[name]
        with tensor.file.open("rb") as opened:
            opened.seek(tensor.first + 4 * low)
            data = opened.read(4 * (high - low))
        if len(data) != 4 * (high - low):
            raise UserError("--scores", str(tensor.file), "is shorter than its header says", "copy it again")
        return torch.frombuffer(bytearray(data), dtype=torch.float32)


class Reselection:
    """The exact selection from ``scores`` (docs/method.md §2), as bits of any span.

    mask: any mask computed from these scores. settings: ``order``, ``seed``, ``scope``, ``k`` and ``ratio`` as in a
    mask's metadata. Collectives of the constructor: six sums of histograms of 16 KiB, with scope ``matrix`` for every
    matrix.
    """

    def __init__(self, mask: Mask, scores: ScoreFolder, settings: Mapping[str, str], ranks: Ranks):
        self._mask, self._scores, self._ranks = mask, scores, ranks
        self._order = Order(settings["order"], int(settings["seed"]))
        self._offsets: dict[str, int] = json.loads(mask.metadata["offsets"])
        self._cut_of_model: Cut | None = None
        self._cuts_of_units: dict[
            str, list[tuple[Unit, int, Cut]]
        ] = {}  # scope matrix: (unit, its first position, cut)
        if settings["scope"] == "model":
            self._cut_of_model = self._select(
                _ScoreRuns(self._run_of_span, spans(mask)[ranks.rank :: ranks.size]), int(settings["k"])
            )
        else:
            for name, units in read_units(mask).items():
                self._cuts_of_units[name] = list(self._select_units(name, units, float(settings["ratio"])))

    @property
    def threshold(self) -> str:
        """As in a mask's metadata; "null" with scope ``matrix``, or if no score is a limit (``key_to_score``)."""
        score = key_to_score(self._cut_of_model, self._order.name) if self._cut_of_model is not None else None
        return "null" if score is None else repr(score)

    def bits(self, name: str, low: int, high: int) -> Tensor:
        """Whether the weights of the parameter's flat range [low, high) are selected: bool [high − low]."""
        if self._cut_of_model is not None:
            return self._selected(self._cut_of_model, self._run_of_span((name, low, high)))
        bits = torch.zeros(high - low, dtype=torch.bool)
        for unit, position, cut in self._cuts_of_units[name]:
            if unit.meets(low, high):
                run = self._run_of_unit(unit, position, (name, low, high))
                bits[unit.within(low, high)] = self._selected(cut, run)
        return bits

    def _selected(self, cut: Cut, run: ScoreRun) -> Tensor:
        return cut.selects(self._order.keys(run.scores, run.position), run.position)

    def _select(self, runs: _ScoreRuns, k: int) -> Cut:
        (cut,) = select([runs], [k], self._order, self._mask.total_numel - 1, self._ranks.add)
        return cut

    def _select_units(self, name: str, units: list[Unit], ratio: float) -> Iterator[tuple[Unit, int, Cut]]:
        """Scope ``matrix``: ⌊ratio · n⌋ of each logical matrix."""
        position = self._offsets[name]
        for unit in units:
            local_spans = _cut(name, unit.start, unit.end)[self._ranks.rank :: self._ranks.size]
            runs = _ScoreRuns(partial(self._run_of_unit, unit, position), local_spans)
            yield unit, position, self._select(runs, int(ratio * unit.numel))
            position += unit.numel

    def _run_of_span(self, span: Span) -> ScoreRun:
        name, low, _ = span
        return ScoreRun(self._scores.read(*span), self._offsets[name] + low)

    def _run_of_unit(self, unit: Unit, position: int, span: Span) -> ScoreRun:
        """The unit's part of a span. The units of a parameter follow each other in the order of ties."""
        _, low, high = span
        return ScoreRun(self._scores.read(*span)[unit.within(low, high)], position + unit.num_before(low))


class _ScoreRuns:
    """Runs of scores, read from disk anew in every iteration."""

    def __init__(self, read: Callable[[Span], ScoreRun], local_spans: Sequence[Span]):
        self._read, self._local_spans = read, local_spans

    def __iter__(self) -> Iterator[ScoreRun]:
        return map(self._read, self._local_spans)


def write_selection(
    mask: Mask, folder: Path, output: Path, ratio: float, order: str, seed: int, ranks: Ranks | None = None
) -> Mask:
    """Write a mask of another ratio or order from the scores of ``mask``, whose ``of`` and ``scope`` it keeps.

    Tensors are split into files as in ``mask``; one file is in memory at a time. The folder is written completely or
    not at all. Raises UserError. Collectives: those of ``Reselection``, two of counts and digests and two barriers.
    """
    ranks = ranks or Ranks()
    if output.exists():
        raise UserError("OUTPUT", str(output), "exists already", "give a new folder")
    if not may_write(output):
        raise UserError("OUTPUT", str(output), "cannot be created", "give a writable folder")
    scores = ScoreFolder(folder)
    scores.check(mask)
    metadata = {**mask.metadata, "ratio": repr(ratio), "order": order, "seed": str(seed)}
    scored = sum(mask.numel(name) for name in mask.names)
    base = scored if mask.metadata.get("of") == "scored" else mask.total_numel
    sizes = [base]
    if metadata.get("scope") == "matrix":
        sizes = [unit.numel for units in read_units(mask).values() for unit in units]
    check_ratio(ratio, sizes, "--ratio")
    metadata["k"] = str(min(int(ratio * base), scored))
    selection = Reselection(mask, scores, metadata, ranks)
    local_counts = torch.zeros(len(mask.names), dtype=torch.int64)
    index_of = {name: index for index, name in enumerate(mask.names)}
    for name, low, high in spans(mask)[ranks.rank :: ranks.size]:
        local_counts[index_of[name]] += int(selection.bits(name, low, high).sum())
    counts = dict(zip(mask.names, ranks.add(local_counts).tolist(), strict=True))
    metadata |= {"counts": json.dumps(counts), "k": str(sum(counts.values())), "threshold": selection.threshold}
    _write(mask, selection, metadata, output, ranks)
    wait_until_visible(output / INDEX_NAME)
    return Mask.load(output)


def _write(mask: Mask, selection: Reselection, metadata: dict[str, str], output: Path, ranks: Ranks) -> None:
    """The ranks share the files; rank 0 gives the folder its name once all are written."""
    temporary = output.with_name(f".{output.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.gather(None)  # nobody writes before the folder exists
    local_digests: dict[str, str] = {}
    for file in mask.files[ranks.rank :: ranks.size]:
        data = {name: _packed(mask, selection, name) for name in mask.names if mask.file_of(name) == file}
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


def _packed(mask: Mask, selection: Reselection, name: str) -> Tensor:
    """The parameter's selection as mask bits: uint8 [⌈numel / 8⌉]."""
    data = torch.empty(num_bytes(mask.numel(name)), dtype=torch.uint8)
    for _, low, high in _cut(name, 0, mask.numel(name)):
        data[low // 8 : num_bytes(high)] = pack_bits(selection.bits(name, low, high))
    return data
