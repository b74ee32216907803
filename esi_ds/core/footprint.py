"""Bytes that a rank holds, the largest thing it holds for a moment, and what travels: from names and shapes alone.

docs/scaling.md derives the formulas and compares them with measured bytes. b is the bytes of a weight, P weights, S
scored ones, T trained ones, W ranks, e ``autoep_size``. Nothing here allocates a tensor or talks to another rank.
Activations, the judge, the CUDA context and what an allocator keeps are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esi_ds.core.mask import num_bytes
from esi_ds.core.units import Parameter

WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32 = 4
COMPACT_LIMIT = 2 << 30  # bytes of unsharded index and sums that a rank of SET may hold where `tune.reduction` is auto


@dataclass(frozen=True)
class Piece:
    """A tensor as one rank gathers it: a parameter, or with expert parallelism one of w1, w2, w3 of its experts.

    numel: elements when gathered. ranks: over how many it is partitioned. copies: how many such tensors, with other
    experts in them, the whole job has (e, else 1).
    """

    parameter: Parameter
    numel: int
    ranks: int
    copies: int = 1
    label: str = ""

    @property
    def name(self) -> str:
        return self.parameter.name + self.label

    @property
    def shard(self) -> int:
        """Elements of a rank's slice, padding included."""
        return -(-self.numel // self.ranks)


def pieces(parameters: Iterable[Parameter], world_size: int, autoep_size: int | None = None) -> list[Piece]:
    """Every parameter, cut as ZeRO-3 cuts it. ``autoep_size`` must divide the ranks and every layer's experts."""
    found = []
    for parameter in parameters:
        if autoep_size is None or not num_experts(parameter):
            found.append(Piece(parameter, parameter.numel, world_size))
            continue
        first = [unit for unit in parameter.units[:2] if unit.expert == parameter.units[0].expert]  # all are alike
        found += [
            Piece(
                parameter,
                unit.numel * num_experts(parameter) // autoep_size,
                world_size // autoep_size,
                autoep_size,
                f"[{unit.role.partition('.')[2]}]",
            )
            for unit in first
        ]
    return found


def num_experts(parameter: Parameter) -> int:
    """Routed experts that one tensor holds; 0 where it holds none."""
    is_fused = len(parameter.shape) == 3 and parameter.scored and parameter.role.startswith("expert")
    return parameter.shape[0] if is_fused else 0


@dataclass(frozen=True)
class Resident:
    """Bytes of one rank between two micro-batches."""

    weights: float
    gradients: float  # sharded fp32 sums
    optimizer: float  # fp32 masters and moments
    index: float  # positions of trained weights and unsharded sums of SET; mask bits of SPA
    buffers: float = 0.0  # DeepSpeed's bucket of gradients

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.index + self.buffers


def esi_resident(cut: Sequence[Piece], weight: int, num_sums: int = 1) -> Resident:
    """b P / W + 4 S / W for every objective's sums."""
    scored = sum(piece.shard for piece in cut if piece.parameter.scored)
    return Resident(weight * _shards(cut), num_sums * FP32 * scored, 0, 0)


def set_resident(cut: Sequence[Piece], weight: int, trained: Mapping[str, int], compact: bool) -> Resident:
    """b P / W + 12 T / W, and either 8 T on every rank (``compact``) or 8 T / W (``scatter``).

    trained: trained weights by parameter; taken to lie evenly in it. A position takes 4 bytes, 8 in parameters of 2^31
    elements or more. With expert parallelism a rank's unsharded sums are those of its own experts.
    """
    sums = index = state = 0.0
    for piece in cut:
        here = _trained(piece, trained)
        share = 1 if compact else piece.ranks
        sums += FP32 * here / share
        length = piece.numel if compact else piece.shard
        is_whole = trained.get(piece.parameter.name, 0) == piece.parameter.numel
        index += (0 if is_whole else 4 if length < 1 << 31 else 8) * here / share
        state += 3 * FP32 * here / piece.ranks
    if compact:
        return Resident(weight * _shards(cut), 0, state, sums + index)
    return Resident(weight * _shards(cut), sums, state, index)


def spa_resident(cut: Sequence[Piece], weight: int, trained: Mapping[str, int], bucket: int = 0) -> Resident:
    """b P / W + 16 T' / W + T' / 8W: masters, two moments and gradient sums of every parameter in which something
    trains (T' weights), and a bit for each. bucket: elements of DeepSpeed's ``reduce_bucket_size``, kept in fp32."""
    own = sum(piece.shard for piece in cut if trained.get(piece.parameter.name))
    return Resident(weight * _shards(cut), FP32 * own, 3 * FP32 * own, num_bytes(own), FP32 * bucket)


def _shards(cut: Sequence[Piece]) -> int:
    return sum(piece.shard for piece in cut)


def _trained(piece: Piece, trained: Mapping[str, int]) -> float:
    """Trained weights of a gathered piece."""
    return trained.get(piece.parameter.name, 0) * piece.numel / piece.parameter.numel


@dataclass(frozen=True)
class Transient:
    """The most that one module makes a rank hold for a moment: gathered weights, and gradients on their way."""

    module: str
    weights: float
    gradient: float

    @property
    def total(self) -> float:
        return self.weights + self.gradient


def transient(
    cut: Sequence[Piece],
    weight: int,
    trained: Mapping[str, int],
    stage: str,
    compact: bool = False,
    recompute: bool = True,
) -> Transient:
    """ZeRO-3 gathers a module's parameters together; hooks free each gradient before the next one comes.

    trained: parameters that get a gradient have a number above 0. Weights: see ``_gathered``. Gradient of the module's
    largest such tensor, of n elements on g ranks: b n where SET is compact, which picks from it as it is; else the more
    of (b + 4) n, while it is cast to fp32, and 4 n (1 + 1 / g) while it is reduced, with 4 n more where it has to be
    padded to g equal parts. SPA's engine pads always, and holds the gradients of the whole module in the model's
    precision too.
    """
    modules: dict[str, list[Piece]] = {}
    for piece in cut:
        modules.setdefault(piece.parameter.name.rpartition(".")[0], []).append(piece)
    kept = 0 if recompute else weight * sum(piece.numel for piece in cut if _is_saved(piece))
    found = []
    for module, members in modules.items():
        learning = [piece for piece in members if trained.get(piece.parameter.name)]
        gradient = 0.0
        if learning:
            largest = max(learning, key=lambda piece: piece.numel)
            reduced = FP32 * largest.numel / largest.ranks if largest.ranks > 1 else 0.0
            copies = 2 if stage == "spa" or largest.numel % largest.ranks else 1
            if stage == "set" and compact:
                gradient = weight * largest.numel
            else:
                gradient = max((weight + FP32) * largest.numel, copies * FP32 * largest.numel + reduced)
            if stage == "spa":
                gradient += weight * sum(piece.numel for piece in learning)
        found.append(Transient(module, _gathered(members, weight, recompute) + kept, gradient))
    return max(found, key=lambda one: one.total)


def _gathered(members: Sequence[Piece], weight: int, recompute: bool) -> float:
    """Of one module: the buffer that is received and the parameters cut out of it; of experts also what the forward
    pass saved of them, a view that outlives ZeRO-3's release. One rank alone uses its own storage."""
    split = [piece for piece in members if piece.ranks > 1]
    own = sum(piece.numel * (3 if recompute and _is_saved(piece) else 2) for piece in split)
    return weight * own


def _is_saved(piece: Piece) -> bool:
    """Whether autograd keeps a gathered weight from the forward to the backward pass: transformers multiplies fused
    experts by transposed views of them, which ZeRO-3's release leaves alive. (Linear layers it replaces.) Only
    gradient checkpointing bounds that to the layer that is computed again."""
    return num_experts(piece.parameter) > 0 and piece.ranks > 1


def takeover_bytes(parameters: Sequence[Parameter], weight: int, world_size: int, autoep_size: int) -> float:
    """What a rank holds beside its weights while DeepSpeed replaces the blocks of experts by its own, one by one.

    A block's fused tensors are gathered whole. A rank's experts are copied out of them, and gate and up of these once
    more to part them: b n (1 + 5 / 3e) of n elements. Before that our probe gathers the first block with its shared
    experts and its router. One rank alone gathers nothing.
    """
    blocks: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        if num_experts(parameter):
            blocks.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
    gathered = 1 if world_size > 1 else 0
    replaced = [
        sum(p.numel * (gathered + len({unit.role for unit in p.units}) / autoep_size) for p in members)
        for members in blocks.values()
    ]
    first = next(iter(blocks), "").rpartition(".")[0]
    probed = gathered * sum(p.numel for p in parameters if blocks and p.name.startswith(f"{first}."))
    return weight * max(probed, *replaced, 0)


def window_bytes(cut: Sequence[Piece], weight: int, zero: Mapping[str, Any]) -> int:
    """Weights that DeepSpeed keeps or fetches beside those in use: what is used again within
    ``stage3_max_reuse_distance`` elements, and the prefetch bucket. zero: the ``zero_optimization`` section."""

    def setting(key: str, default: int) -> int:
        given = zero.get(key, "auto")
        return default if given == "auto" else int(given)

    kept = min(
        setting("stage3_max_reuse_distance", 1_000_000_000), setting("stage3_max_live_parameters", 1_000_000_000)
    ) + setting("stage3_prefetch_bucket_size", 50_000_000)
    return weight * min(kept, sum(piece.numel for piece in cut))


@dataclass(frozen=True)
class Topology:
    """ranks = nodes × per_node; ranks of a node are numbered one behind another, as every launcher does."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def holds(self, size: int) -> bool:
        """Whether no group of ``size`` ranks, one behind another, lies on two nodes."""
        return self.per_node % size == 0

    def abroad(self, size: int) -> float:
        """Sum over a node's ranks of the share of their group of ``size`` that lies on other nodes; the most of any."""
        found = [0.0] * self.nodes
        for rank in range(self.ranks):
            node, first = rank // self.per_node, rank - rank % size
            here = min(first + size, (node + 1) * self.per_node) - max(first, node * self.per_node)
            found[node] += 1 - here / size
        return max(found)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one micro-batch, forward and backward: what a rank receives, and what a node receives from others."""

    rank: float
    node: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.rank + other.rank, self.node + other.node)


NOTHING = Traffic(0, 0)


def gather_traffic(cut: Sequence[Piece], weight: int, where: Topology, times: int = 2) -> Traffic:
    """Every piece gathered ``times`` times: forward, backward, and again where activations are recomputed."""
    return _sum(ring(times * weight * piece.numel, piece, where) for piece in cut)


def reduce_traffic(cut: Sequence[Piece], trained: Mapping[str, int], where: Topology) -> Traffic:
    """One fp32 reduce-scatter of every whole gradient (ESI, SET ``scatter``, SPA)."""
    return _sum(ring(FP32 * piece.numel, piece, where) for piece in cut if trained.get(piece.parameter.name))


def compact_traffic(cut: Sequence[Piece], trained: Mapping[str, int], where: Topology) -> Traffic:
    """SET ``compact``: one fp32 all-reduce (reduce-scatter, then gather) of the trained weights' gradient a step."""
    return _sum(ring(2 * FP32 * _trained(piece, trained), piece, where) for piece in cut)


def token_traffic(
    num_layers: int,
    tokens: int,
    top_k: int,
    hidden: int,
    weight: int,
    autoep_size: int,
    where: Topology,
    times: int = 4,
) -> Traffic:
    """Tokens that travel to their experts' ranks and back in every MoE layer, forward and the same backward (``times``
    4; 6 where activations are recomputed). tokens: of one rank and micro-batch; routed evenly. The ranks of a group
    follow one another, so that of a group which does not divide a node's ranks some are on another node."""
    sent = times * num_layers * tokens * top_k * hidden * weight
    return Traffic(sent * (autoep_size - 1) / autoep_size, sent * where.abroad(autoep_size))


def ring(size: float, piece: Piece, where: Topology) -> Traffic:
    """One all-gather or reduce-scatter of ``size`` bytes over a piece's ranks: (g − 1) / g of it reaches every rank.

    Between nodes runs one ring for each of the tensors that a node's ranks gather: one, or with expert parallelism as
    many as the node has different experts' ranks, each over its own group.
    """
    part = size * (piece.ranks - 1) / piece.ranks
    return Traffic(part, part * min(piece.copies, where.per_node) if where.nodes > 1 else 0.0)


def _sum(parts: Iterable[Traffic]) -> Traffic:
    total = NOTHING
    for part in parts:
        total += part
    return total
