"""The exact selection from scores on disk: to check a mask, and for masks of another ratio or order.

Scores are read in chunks, each by one rank, so that memory does not grow with the model. Only counts are shared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import TypedDict

from esi_ds.artifacts import (
    check_new_folder,
    new_folder,
    replace_folder,
    temporary_name,
    wait_until_visible,
    write_json_atomic,
    write_text_atomic,
)
from esi_ds.core.mask import UNITS_DIGEST, UNITS_NAME, Mask, digest, index_digests, num_bytes, pack_bits
from esi_ds.core.mask_metadata import MaskMetadata, mask_texts
from esi_ds.core.score_folder import UNNAMED, ScoreFolder
from esi_ds.core.select import (
    Cut,
    Order,
    ScoreRun,
    check_ratio,
    first_invalid,
    key_to_score,
    may_lack_scores,
    select,
    without_score,
)
from esi_ds.core.units import Unit, assign
from esi_ds.errors import UserError
from esi_ds.models.roles import SCORED, expert_by_name, layer_of, role_by_name
from esi_ds.ranks import Ranks
from esi_ds.reading import check_type, parse_json, read_text, reading
from esi_ds.tensor_files import DIGESTS_NAME, INDEX_NAME
from esi_ds.zero.files import save_tensors

CHUNK = 1 << 22  # weights in memory at a time; a multiple of 8, so that a chunk's bits are whole bytes

WeightSpan = tuple[str, int, int]  # a parameter's name and its flat range [low, high)


def spans(mask: Mask) -> list[WeightSpan]:
    """All scored weights in the model's order, in chunks."""
    return [span for name in mask.names for span in _cut(name, 0, mask.numel(name))]


def _cut(name: str, first: int, last: int) -> list[WeightSpan]:
    return [(name, low, min(low + CHUNK, last)) for low in range(first, last, CHUNK)]


class StoredUnit(TypedDict):
    """A row of ``units.json``: a ``core.units.Unit`` and the parameter that it lies in."""

    parameter: str
    name: str
    role: str
    layer: int | None
    expert: int | None
    start: int
    length: int
    count: int
    stride: int


def states_units(mask: Mask) -> bool:
    """Whether a mask says what its logical matrices are, or should; masks from other tools may not."""
    return os.path.lexists(mask.path / UNITS_NAME) or mask.index_metadata.get(UNITS_DIGEST) is not None


def read_units(mask: Mask) -> dict[str, list[Unit]]:
    """Logical matrices by parameter, from ``units.json``; without that file every parameter is one matrix, whose role,
    layer and expert its name tells.

    Raises UserError where the rows are not matrices of this mask's parameters, as many weights as each has; whether
    they cover every weight once is checked by ``check_cover``.
    """
    file = mask.path / UNITS_NAME
    written = mask.index_metadata.get(UNITS_DIGEST)
    if not states_units(mask):
        return {
            name: [Unit(name, role_by_name(name, shape), layer_of(name), expert_by_name(name), 0, mask.numel(name))]
            for name, shape in mask.shapes.items()
        }
    units: dict[str, list[Unit]] = {name: [] for name in mask.names}
    with reading("MASK", file, "copy the mask's folder again", "does not hold the matrices of this mask"):
        text = read_text(file)
        for row in check_type(parse_json(text), list[StoredUnit]):
            parameter = row["parameter"]
            if parameter not in units:
                raise ValueError(f"the mask has no parameter {parameter}")
            unit = Unit(
                row["name"],
                row["role"],
                row["layer"],
                row["expert"],
                row["start"],
                row["length"],
                row["count"],
                row["stride"],
            )
            if problem := _unit_problem(unit, parameter, mask.numel(parameter)):
                raise ValueError(f"{unit.name}: {problem}")
            units[parameter].append(unit)
        for name, units_of_parameter in units.items():
            if (size := sum(unit.numel for unit in units_of_parameter)) != mask.numel(name):
                raise ValueError(f"the matrices of {name} have {size:,} weights, it has {mask.numel(name):,}")
        if written is not None and written != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"it is not the file that was written ({UNITS_DIGEST} of {INDEX_NAME})")
    return units


def _unit_problem(unit: Unit, parameter: str, numel: int) -> str | None:
    """Why a row cannot be a matrix of the parameter; None if it can."""
    if unit.role not in SCORED:
        return f"{unit.role!r} is not the role of a scored matrix"
    if not unit.name.startswith(parameter):
        return f"its name is not that of a part of {parameter}"
    if unit.layer != layer_of(parameter):
        return f"layer {unit.layer} is not that of {parameter}"
    if unit.expert is not None and unit.expert < 0:
        return f"expert {unit.expert} is negative"
    if unit.start < 0 or unit.length < 0 or unit.count < 1 or (unit.count > 1 and unit.stride < unit.length):
        return "its positions are not runs of weights"
    if unit.end > numel:
        return f"it ends at {unit.end:,}, the parameter has {numel:,} weights"
    return None


def check_cover(mask: Mask, units: Mapping[str, Sequence[Unit]], ranks: Ranks) -> None:
    """Raise UserError on every rank unless the matrices cover every weight exactly once. Collectives: one gather."""
    problem: str | None = None
    for name, low, high in spans(mask)[ranks.rank :: ranks.size]:
        if len(units[name]) > 1 or units[name][0].length != mask.numel(name):
            covered = torch.zeros(high - low, dtype=torch.int32)
            for unit in units[name]:
                if unit.meets(low, high):
                    for view in unit.views(covered, low):
                        view.add_(1)
            if len(wrong := (covered != 1).nonzero()):
                problem = f"flat index {low + int(wrong[0])} of {name} is in {int(covered[wrong[0]])} matrices"
                break
    problem = next(filter(None, ranks.gather(problem)), None)
    if problem is not None:
        problem = f"does not hold the matrices of this mask ({problem})"
        raise UserError("MASK", str(mask.path / UNITS_NAME), problem, "copy the mask's folder again")


class Reselection:
    """The exact selection from ``scores`` (docs/method.md §2), as bits of any span.

    mask: any mask computed from these scores. settings: of which order, seed, scope, k and ratio are used. Raises
    UserError where a score is not finite and ≥ 0, on every rank. Collectives of the constructor: a gather, and six sums
    of histograms of 16 KiB, with scope ``matrix`` for every matrix.
    """

    def __init__(self, mask: Mask, scores: ScoreFolder, settings: MaskMetadata, ranks: Ranks):
        self._mask, self._scores, self._ranks = mask, scores, ranks
        self._order = Order(settings.order, settings.seed)
        self._offsets = _offsets(mask, settings.order)
        check_scores(mask, scores, ranks)
        self._cut_of_model: Cut | None = None
        # Scope matrix: (unit, its first position, cut) by the parameter's name.
        self._cuts_of_units: dict[str, list[tuple[Unit, int, Cut]]] = {}
        if settings.scope == "model":
            self._cut_of_model = self._select(
                _ScoreRuns(self._run_of_span, spans(mask)[ranks.rank :: ranks.size]), settings.k
            )
        else:
            units_by_name = read_units(mask)
            check_cover(mask, units_by_name, ranks)
            for name, units in units_by_name.items():
                self._cuts_of_units[name] = list(self._select_units(name, units, settings.ratio))

    @property
    def threshold(self) -> float | None:
        """As in a mask's metadata; None with scope ``matrix``, or if no score is a limit (``key_to_score``)."""
        return key_to_score(self._cut_of_model, self._order.name) if self._cut_of_model is not None else None

    def bits(self, name: str, low: int, high: int) -> Tensor:
        """Whether the weights of the parameter's flat range [low, high) are selected: bool [high − low]."""
        if self._cut_of_model is not None:
            return self._selected(self._cut_of_model, self._run_of_span((name, low, high)))
        bits = torch.zeros(high - low, dtype=torch.bool)
        for unit, position, cut in self._cuts_of_units[name]:
            if unit.meets(low, high):
                run = self._run_of_unit(unit, position, (name, low, high))
                assign(unit.views(bits, low), self._selected(cut, run))
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

    def _run_of_span(self, span: WeightSpan) -> ScoreRun:
        name, low, _ = span
        return ScoreRun(self._scores.read(*span), self._offsets[name] + low)

    def _run_of_unit(self, unit: Unit, position: int, span: WeightSpan) -> ScoreRun:
        """The unit's part of a span. The units of a parameter follow each other in the order of ties."""
        _, low, _ = span
        return ScoreRun(unit.elements(self._scores.read(*span), low), position + unit.num_before(low))


def _offsets(mask: Mask, order: str) -> dict[str, int]:
    """Number of the model's weights before each parameter: their global positions break ties.

    Ties need no more than the order of the parameters, which the shapes have too; a random order hashes the positions.
    """
    if mask.header.offsets is not None:
        return mask.header.offsets
    if order == "random":
        problem, remedy = "does not state the offsets that a random order follows from", "give a mask made by esi_ds"
        raise UserError("MASK", str(mask.path), problem, remedy)
    return dict(zip(mask.names, accumulate(map(mask.numel, mask.names), initial=0), strict=False))


def check_scores(mask: Mask, scores: ScoreFolder, ranks: Ranks) -> None:
    """Raise UserError on every rank unless all scores are finite, ≥ 0 and those that were written.

    The ranks share the reading: chunks for the values, whole parameters for the digests. Collectives: one gather.
    """
    problems: list[str] = []
    for name, low, high in spans(mask)[ranks.rank :: ranks.size]:
        values = scores.read(name, low, high)
        if (index := first_invalid(values)) is not None:
            problems.append(f"the score of {name}, flat index {low + index}, is {float(values[index])}")
            break
    problems += scores.problems(ranks.rank, ranks.size)
    scores.refuse(problem for part in ranks.gather(problems) for problem in part)


class _ScoreRuns:
    """Runs of scores, read from disk again in every iteration."""

    def __init__(self, read: Callable[[WeightSpan], ScoreRun], local_spans: Sequence[WeightSpan]):
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
    check_new_folder("OUTPUT", output)
    scores = ScoreFolder(folder, "--scores")
    scores.check(mask.header)
    units = read_units(mask)
    check_cover(mask, units, ranks)
    # With another order the seed is that of the run, whose noise and random scores it made; a random mask has its own.
    if order != "random":
        metadata = scores.metadata
        seed = mask.header.seed if metadata is None or metadata.seed is None else metadata.seed
    settings = replace(mask.header, ratio=ratio, order=order, seed=seed)
    by_matrix = [unit.numel for units_of_parameter in units.values() for unit in units_of_parameter]
    check_ratio(ratio, [settings.base] if settings.scope == "model" else by_matrix, "--ratio")
    settings = replace(settings, k=mask.header.k_of(ratio))
    selection = Reselection(mask, scores, settings, ranks)
    local_counts = torch.zeros(len(mask.names), dtype=torch.int64)
    index_of = {name: index for index, name in enumerate(mask.names)}
    for name, low, high in spans(mask)[ranks.rank :: ranks.size]:
        local_counts[index_of[name]] += int(selection.bits(name, low, high).sum())
    counts = dict(zip(mask.names, ranks.add(local_counts).tolist(), strict=True))
    texts = mask_texts(replace(settings, counts=counts, k=sum(counts.values()), threshold=selection.threshold))
    _write(mask, selection, texts, output, ranks)
    wait_until_visible(output / INDEX_NAME)
    return Mask.load(output)


def remarks_on(mask: Mask, folder: Path, ranks: Ranks) -> list[str]:
    """What must be said of a mask that was selected from the scores in ``folder``: that they name no model, and what
    ``without_score`` says. Collectives: at most one sum."""
    header, scores = mask.header, ScoreFolder(folder, "--scores")
    remarks = [] if scores.metadata is not None else [f"{folder} {UNNAMED}"]
    if not may_lack_scores(header.order, header.scope, header.threshold):
        return remarks
    local_spans = spans(mask)[ranks.rank :: ranks.size]
    num_zero = sum(int((mask.bits(*span) & (scores.read(*span) == 0)).sum()) for span in local_spans)
    remark = without_score(header.criterion, int(ranks.add(torch.tensor([num_zero]))), mask.k, header.scope)
    return remarks if remark is None else [*remarks, remark]


def _write(mask: Mask, selection: Reselection, metadata: dict[str, str], output: Path, ranks: Ranks) -> None:
    """The ranks share the files; rank 0 gives the folder its name once all are written."""
    temporary = temporary_name(output)
    if ranks.rank == 0:
        new_folder(temporary)
    ranks.gather(None)  # nobody writes before the folder exists
    local_digests: dict[str, str] = {}
    for file in mask.files[ranks.rank :: ranks.size]:
        data = {name: _packed(mask, selection, name) for name in mask.names if mask.file_of(name) == file}
        save_tensors(data, wait_until_visible(temporary) / file, metadata=metadata)
        local_digests |= {name: digest(values) for name, values in data.items()}
    gathered = ranks.gather(local_digests)
    if ranks.rank == 0:
        digests = {name: value for part in gathered for name, value in part.items()}
        units = read_text(mask.path / UNITS_NAME) if (mask.path / UNITS_NAME).is_file() else None
        weight_map = {name: mask.file_of(name) for name in mask.names}
        index = {"metadata": index_digests(metadata, units), "weight_map": weight_map}
        write_json_atomic(temporary / INDEX_NAME, index)
        write_json_atomic(temporary / DIGESTS_NAME, digests)
        if units is not None:
            write_text_atomic(temporary / UNITS_NAME, units)
        replace_folder(temporary, output)
    ranks.gather(None)  # nobody reads before the folder has its name


def _packed(mask: Mask, selection: Reselection, name: str) -> Tensor:
    """The parameter's selection as mask bits: uint8 [⌈numel / 8⌉]."""
    data = torch.empty(num_bytes(mask.numel(name)), dtype=torch.uint8)
    for _, low, high in _cut(name, 0, mask.numel(name)):
        data[low // 8 : num_bytes(high)] = pack_bits(selection.bits(name, low, high))
    return data
