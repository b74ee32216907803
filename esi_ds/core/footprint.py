"""Memory and traffic of a rank, from names and shapes alone: bytes held, the largest transient, bytes received.

docs/scaling.md derives the formulas and compares them with measured bytes. In the formulas b is the bytes of a weight,
P the number of weights, S of scored weights, T of trained weights, W of ranks, and e is ``autoep_size``. Nothing here
allocates a tensor or communicates. Activations, the judge, the CUDA context and memory cached by the allocator are not
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esi_ds.core.mask import num_bytes
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.core.units import Parameter

WEIGHT_BYTES = {name: dtype.itemsize for name, dtype in MODEL_DTYPES.items()}
FP32 = 4
IN_FLIGHT, IN_FLIGHT_LIMIT = 2, 2 << 30  # reductions that run beside the backward pass at once, and their bytes
# Weights that ZeRO-3 gathers ahead in one collective where the DeepSpeed config names no number: DeepSpeed's default on
# GPUs, and what a run on CPUs takes (``zero/settings.py: with_prefetch``).
GPU_PREFETCH, CPU_PREFETCH = 50_000_000, 2_000_000
COMPACT_LIMIT = 2 << 30  # bytes of unsharded index and sums that a rank of SET may hold where `tune.reduction` is auto


def reduces_compactly(total: int, reduction: str) -> bool:
    """Whether SET reduces the gradients of its ``total`` trained weights by one all-reduce a step.

    reduction: ``tune.reduction``.
    """
    return reduction == "compact" or (reduction == "auto" and 8 * total <= COMPACT_LIMIT)


@dataclass(frozen=True)
class GatheredTensor:
    """A tensor that ZeRO-3 gathers: a parameter, or with expert parallelism w1, w2 or w3 of a rank's experts.

    numel: elements when gathered. ranks: how many ranks it is partitioned over. copies: how many such tensors the job
    has, each for different experts (e; 1 without expert parallelism). label: appended to the parameter's name.
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


def gathered_tensors(
    parameters: Iterable[Parameter], world_size: int, autoep_size: int | None = None
) -> list[GatheredTensor]:
    """The tensors that hold all parameters. ``autoep_size`` must divide the ranks and every layer's experts."""
    tensors: list[GatheredTensor] = []
    for parameter in parameters:
        if autoep_size is None or not num_experts(parameter):
            tensors.append(GatheredTensor(parameter, parameter.numel, world_size))
            continue
        # All experts are alike: the first one's matrices stand for the rest.
        first = [unit for unit in parameter.units[:2] if unit.expert == parameter.units[0].expert]
        tensors += [
            GatheredTensor(
                parameter,
                unit.numel * num_experts(parameter) // autoep_size,
                world_size // autoep_size,
                autoep_size,
                f"[{unit.role.partition('.')[2]}]",
            )
            for unit in first
        ]
    return tensors


def num_experts(parameter: Parameter) -> int:
    """Number of routed experts fused in one parameter; 0 for any other parameter."""
    is_fused = len(parameter.shape) == 3 and parameter.scored and parameter.role.startswith("expert")
    return parameter.shape[0] if is_fused else 0


@dataclass(frozen=True)
class Resident:
    """Bytes that one rank holds between two micro-batches."""

    weights: float
    gradients: float  # sharded fp32 sums
    optimizer: float  # fp32 masters and moments
    index: float  # SET: positions of the trained weights and unsharded sums; SPA: mask bits
    buffers: float = 0.0  # DeepSpeed's bucket of gradients

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.index + self.buffers


def hpz_share(zero: Mapping[str, Any], ranks: int) -> float:
    """The share of the weights of which each rank keeps a second copy: 1 / min(size of hpZ's groups, W), or 0 without
    hpZ. zero: the ``zero_optimization`` section."""
    size = zero.get("zero_hpz_partition_size", 1)
    return 1 / min(size, ranks) if isinstance(size, int) and size > 1 else 0.0


def esi_resident(tensors: Sequence[GatheredTensor], weight: int, num_sums: int = 1) -> Resident:
    """Scoring: b P / W, and 4 S / W for the sums of every objective."""
    scored = sum(tensor.shard for tensor in tensors if tensor.parameter.scored)
    return Resident(weight * _shards(tensors), num_sums * FP32 * scored, 0, 0)


def set_resident(tensors: Sequence[GatheredTensor], weight: int, trained: Mapping[str, int], compact: bool) -> Resident:
    """SET: b P / W + 12 T / W, and either 8 T on every rank (``compact``) or 8 T / W (``scatter``).

    trained: number of trained weights by parameter, assumed to be spread evenly. A position takes 4 bytes, or 8 in
    parameters of 2^31 elements or more. With expert parallelism a rank holds unsharded sums for its own experts only.
    """
    sums = index = state = 0.0
    for tensor in tensors:
        count = _trained(tensor, trained)
        share = 1 if compact else tensor.ranks
        sums += FP32 * count / share
        length = tensor.numel if compact else tensor.shard
        is_whole = trained.get(tensor.parameter.name, 0) == tensor.parameter.numel
        index += (0 if is_whole else 4 if length < 1 << 31 else 8) * count / share
        state += 3 * FP32 * count / tensor.ranks
    if compact:
        return Resident(weight * _shards(tensors), 0, state, sums + index)
    return Resident(weight * _shards(tensors), sums, state, index)


def spa_resident(
    tensors: Sequence[GatheredTensor], weight: int, trained: Mapping[str, int], bucket: int = 0
) -> Resident:
    """SPA: b P / W + 16 T' / W + T' / 8W, where T' is the number of weights in parameters with a trained weight.

    Masters, two moments and gradient sums take 4 bytes each, and the mask one bit. bucket: elements of DeepSpeed's
    ``reduce_bucket_size``, kept in fp32.
    """
    numel = sum(tensor.shard for tensor in tensors if trained.get(tensor.parameter.name))
    return Resident(weight * _shards(tensors), FP32 * numel, 3 * FP32 * numel, num_bytes(numel), FP32 * bucket)


def _shards(tensors: Sequence[GatheredTensor]) -> int:
    return sum(tensor.shard for tensor in tensors)


def _trained(tensor: GatheredTensor, trained: Mapping[str, int]) -> float:
    """Expected number of trained weights in a gathered tensor."""
    return trained.get(tensor.parameter.name, 0) * tensor.numel / tensor.parameter.numel


@dataclass(frozen=True)
class Transient:
    """Bytes that a rank briefly holds for one module: its gathered weights, and gradients in flight."""

    module: str
    weights: float
    gradient: float

    @property
    def total(self) -> float:
        return self.weights + self.gradient


def transient(
    tensors: Sequence[GatheredTensor],
    weight: int,
    trained: Mapping[str, int],
    stage: str,
    compact: bool = False,
    recompute: bool = True,
) -> Transient:
    """The largest transient of any module: ZeRO-3 gathers a module whole, and hooks free one gradient after another.

    A block whose experts are listed, each a module of its own, is gathered as one module. weight: bytes of a weight.
    trained: parameters that get a gradient have a number above 0. recompute: whether activations are checkpointed.
    """
    blocks = {tensor.parameter.block for tensor in tensors}
    modules: dict[str, list[GatheredTensor]] = {}
    for tensor in tensors:
        module = tensor.parameter.block or tensor.parameter.name.rpartition(".")[0]
        modules.setdefault(module, []).append(tensor)
    saved = 0 if recompute else weight * sum(tensor.numel for tensor in tensors if _is_saved(tensor))
    transients: list[Transient] = []
    for module, members in modules.items():
        learning = [tensor for tensor in members if trained.get(tensor.parameter.name)]
        gradient = _gradient(learning, weight, stage, compact, module in blocks) if learning else 0.0
        transients.append(Transient(module, _gathered(members, weight, recompute) + saved, gradient))
    return max(transients, key=lambda transient: transient.total)


def _gradient(learning: Sequence[GatheredTensor], weight: int, stage: str, compact: bool, is_block: bool) -> float:
    """Bytes of the gradients of a module's trained tensors while it is in the backward pass.

    That of the largest, of n elements on g ranks: SET ``compact`` picks from it as it is, which takes b n. Otherwise it
    takes the larger of (b + 4) n, while it is cast to fp32, and 4 n (1 + 1 / g), while it is reduced; padding it to g
    equal parts takes 4 n more. Beside it the others of a block of listed experts wait in fp32, because they are reduced
    in one order on all ranks. SPA's engine always pads, and also holds the gradients of the whole module in the model's
    precision.
    """
    largest = max(learning, key=lambda tensor: tensor.numel)
    numel = sum(tensor.numel for tensor in learning)
    if stage == "set" and compact:
        return weight * largest.numel
    reduced = FP32 * largest.numel / largest.ranks if largest.ranks > 1 else 0.0
    copies = 2 if stage == "spa" or largest.numel % largest.ranks else 1
    gradient = max((weight + FP32) * largest.numel, copies * FP32 * largest.numel + reduced)
    if stage == "spa":
        return gradient + weight * numel
    return gradient + FP32 * (numel - largest.numel) if is_block else gradient


def in_flight_bytes(tensors: Sequence[GatheredTensor], trained: Mapping[str, int], stage: str, compact: bool) -> float:
    """Bytes of the reductions of ESI's and SET's hooks that run beside the backward pass: sent and received, fp32.

    At most those of the ``IN_FLIGHT`` largest gradients, and ``IN_FLIGHT_LIMIT``; a larger one is waited for, and so is
    each where experts lie on different ranks (``zero/in_flight.py``). Small gradients share one. SET ``compact`` and
    SPA's engine have none.
    """
    if stage == "spa" or compact or any(tensor.copies > 1 for tensor in tensors):
        return 0.0
    learning = [tensor for tensor in tensors if trained.get(tensor.parameter.name) and tensor.ranks > 1]
    sizes = sorted(FP32 * tensor.numel * (1 + 1 / tensor.ranks) for tensor in learning)
    return min(sum([size for size in sizes if size <= IN_FLIGHT_LIMIT][-IN_FLIGHT:]), IN_FLIGHT_LIMIT)


def _gathered(members: Sequence[GatheredTensor], weight: int, recompute: bool) -> float:
    """Bytes of one gathered module: the receive buffer and the parameters copied out of it.

    Experts also count what the forward pass saved, a view that outlives ZeRO-3's release. A single rank gathers
    nothing.
    """
    partitioned = [tensor for tensor in members if tensor.ranks > 1]
    numel = sum(tensor.numel * (3 if recompute and _is_saved(tensor) else 2) for tensor in partitioned)
    return weight * numel


def _is_saved(tensor: GatheredTensor) -> bool:
    """Whether autograd keeps a gathered weight from the forward to the backward pass.

    transformers multiplies by transposed views of fused experts, and ZeRO-3's release leaves these views alive (linear
    layers it replaces). Only gradient checkpointing limits that to the layer being recomputed.
    """
    return num_experts(tensor.parameter) > 0 and tensor.ranks > 1


def takeover_bytes(parameters: Sequence[Parameter], weight: int, world_size: int, autoep_size: int) -> float:
    """Extra bytes that a rank holds while DeepSpeed replaces the expert blocks with its own, one at a time.

    A block's fused tensors, n elements, are gathered whole; the rank's experts are copied out of them, and their gate
    and up matrices are copied again to split them: b n (1 + 5 / 3e). Before that our probe gathers the first block
    with its shared experts and router. A single rank gathers nothing.
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


def window_bytes(
    tensors: Sequence[GatheredTensor], weight: int, zero: Mapping[str, Any], prefetch: int = GPU_PREFETCH
) -> int:
    """Bytes of weights that DeepSpeed keeps gathered beyond those in use.

    These are weights used again within ``stage3_max_reuse_distance`` elements, and the prefetch bucket. zero: the
    ``zero_optimization`` section, whose keys DeepSpeed takes with and without ``stage3_``. prefetch: weights in the
    bucket where the section names no number.
    """

    def setting(key: str, default: int) -> int:
        value = zero.get(f"stage3_{key}", zero.get(key, "auto"))
        return default if value == "auto" else int(value)

    kept = min(setting("max_reuse_distance", 1_000_000_000), setting("max_live_parameters", 1_000_000_000))
    kept += setting("prefetch_bucket_size", prefetch)
    return weight * min(kept, sum(tensor.numel for tensor in tensors))


@dataclass(frozen=True)
class Topology:
    """Ranks on nodes: ranks = nodes × per_node, and the ranks of a node are numbered consecutively."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def holds(self, size: int) -> bool:
        """Whether every group of ``size`` consecutive ranks lies on one node."""
        return self.per_node % size == 0

    def abroad(self, size: int) -> float:
        """The largest, over nodes, of the sum over its ranks of the share of their group of ``size`` on other nodes."""
        shares = [0.0] * self.nodes
        for rank in range(self.ranks):
            node, first = rank // self.per_node, rank - rank % size
            num_local = min(first + size, (node + 1) * self.per_node) - max(first, node * self.per_node)
            shares[node] += 1 - num_local / size
        return max(shares)


@dataclass(frozen=True)
class Traffic:
    """Bytes received in one micro-batch, forward and backward: by a rank, and by a node from other nodes."""

    rank: float
    node: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.rank + other.rank, self.node + other.node)


NOTHING = Traffic(0, 0)


def gather_traffic(tensors: Sequence[GatheredTensor], weight: int, where: Topology, times: int = 2) -> Traffic:
    """Every tensor gathered ``times`` times: forward, backward, and once more where activations are recomputed."""
    return sum((ring(times * weight * tensor.numel, tensor, where) for tensor in tensors), NOTHING)


def reduce_traffic(tensors: Sequence[GatheredTensor], trained: Mapping[str, int], where: Topology) -> Traffic:
    """One fp32 reduce-scatter of every whole gradient (ESI, SET ``scatter``, SPA)."""
    learning = (tensor for tensor in tensors if trained.get(tensor.parameter.name))
    return sum((ring(FP32 * tensor.numel, tensor, where) for tensor in learning), NOTHING)


def compact_traffic(tensors: Sequence[GatheredTensor], trained: Mapping[str, int], where: Topology) -> Traffic:
    """SET ``compact``: one fp32 all-reduce (reduce-scatter, then gather) of the trained weights' gradient a step."""
    return sum((ring(2 * FP32 * _trained(tensor, trained), tensor, where) for tensor in tensors), NOTHING)


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
    """Tokens sent to their experts' ranks and back in every MoE layer, in the forward and the backward pass.

    tokens: of one rank and micro-batch, assumed to be routed evenly. times: 4, or 6 where activations are recomputed.
    The ranks of a group are consecutive, so a group whose size does not divide the ranks of a node crosses nodes.
    """
    sent = times * num_layers * tokens * top_k * hidden * weight
    return Traffic(sent * (autoep_size - 1) / autoep_size, sent * where.abroad(autoep_size))


def ring(size: float, tensor: GatheredTensor, where: Topology) -> Traffic:
    """One all-gather or reduce-scatter of ``size`` bytes over a tensor's g ranks: each receives (g − 1) / g of it.

    Between nodes there is one ring, or with expert parallelism one for each group of ranks with the same experts that
    a node belongs to.
    """
    part = size * (tensor.ranks - 1) / tensor.ranks
    return Traffic(part, part * min(tensor.copies, where.per_node) if where.nodes > 1 else 0.0)
