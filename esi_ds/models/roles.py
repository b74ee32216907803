"""Roles of parameters and the logical matrices they hold (METHOD §1): the one place that knows architectures.

A parameter's role follows from its module and shape, not from one family's names. Roles that are scored:
``attention.{q,k,v,o}``, ``mlp.{gate,up,down}``, ``expert.{gate,up,down}``, ``head`` and ``other``; roles that are
not: ``embedding`` (a tied head included), ``norm``, ``bias``, ``router``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from esi_ds.core.units import Parameter, Unit

UNSCORED = frozenset({"embedding", "norm", "bias", "router"})
LEAF_ROLES = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "out_proj": "attention.o",
    "dense": "attention.o",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
    "dense_h_to_4h": "mlp.up",
    "dense_4h_to_h": "mlp.down",
}
EXPERT_ROLES = {
    "gate_proj": "expert.gate",
    "up_proj": "expert.up",
    "down_proj": "expert.down",
    "w1": "expert.gate",
    "w3": "expert.up",
    "w2": "expert.down",
}
ROUTER_LEAVES = frozenset({"gate", "router", "wg", "shared_expert_gate"})
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def describe(model: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None) -> tuple[Parameter, ...]:
    """Every parameter in ``named_parameters()`` order (a tied one once, under its first name).

    shapes: full shapes by name, for a model whose parameters are partitioned (their own shape is empty then).
    Works on the meta device.
    """
    modules = dict(model.named_modules())
    head = getattr(model.get_output_embeddings(), "weight", None) if hasattr(model, "get_output_embeddings") else None
    parameters, offset = [], 0
    for name, tensor in model.named_parameters():
        shape = tuple(shapes[name] if shapes is not None else tensor.shape)
        module_name, _, leaf = name.rpartition(".")
        role = _role(modules, module_name, leaf, shape, is_head=tensor is head)
        units = (
            () if role in UNSCORED else _units(name, role, shape, modules[module_name], getattr(model, "config", None))
        )
        parameters.append(Parameter(name, shape, offset, role, units))
        offset += parameters[-1].numel
    return tuple(parameters)


def _role(modules: Mapping[str, nn.Module], module_name: str, leaf: str, shape: tuple[int, ...], is_head: bool) -> str:
    module = modules[module_name]
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_head:
        return "head"
    if leaf.endswith("bias"):
        return "bias"
    if "norm" in type(module).__name__.lower() or (len(shape) == 1 and "norm" in module_name.rpartition(".")[2]):
        return "norm"
    if _is_router(modules, module_name):
        return "router"
    own_name = module_name.rpartition(".")[2]
    if EXPERT.search(f"{module_name}.") and own_name in EXPERT_ROLES:
        return EXPERT_ROLES[own_name]
    return LEAF_ROLES.get(own_name, "other")


def _is_router(modules: Mapping[str, nn.Module], module_name: str) -> bool:
    """A router by its class, or a gate that stands beside the experts it chooses among."""
    class_name = type(modules[module_name]).__name__
    if "Router" in class_name or class_name.endswith(("MoEGate", "TopkGate", "TopKGate")):
        return True
    parent, _, own_name = module_name.rpartition(".")
    return own_name in ROUTER_LEAVES and hasattr(modules.get(parent), "experts")


def _units(name: str, role: str, shape: tuple[int, ...], module: nn.Module, config) -> tuple[Unit, ...]:
    """The logical matrices of one scored parameter, in flat order of their first elements."""
    layer = int(found.group(1)) if (found := LAYER.search(name)) else None
    leaf, own_name = name.rpartition(".")[2], name.split(".")[-2] if "." in name else name
    if len(shape) == 3 and leaf in ("gate_up_proj", "up_proj", "down_proj"):
        return _fused_expert_units(name, leaf, shape, module, layer)
    rows, width = shape[0], _numel(shape[1:])
    if own_name == "gate_up_proj" and len(shape) == 2:
        return _row_blocks(name, layer, width, (("mlp.gate", rows // 2), ("mlp.up", rows // 2)))
    if own_name in ("qkv_proj", "query_key_value", "Wqkv", "c_attn") and len(shape) == 2:
        blocks = _qkv_units(name, own_name, rows, width, layer, config)
        if blocks:
            return blocks
    expert = int(found.group(1)) if (found := EXPERT.search(name)) else None
    return (Unit(name, role, layer, expert, 0, _numel(shape)),)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _row_blocks(name: str, layer: int | None, width: int, blocks: tuple[tuple[str, int], ...]) -> tuple[Unit, ...]:
    """Matrices stacked along the rows of one weight: (role, number of rows) each."""
    units, start = [], 0
    for role, rows in blocks:
        units.append(Unit(f"{name}[{role.rpartition('.')[2]}]", role, layer, None, start, rows * width))
        start += rows * width
    return tuple(units)


def _qkv_units(name: str, own_name: str, rows: int, width: int, layer: int | None, config) -> tuple[Unit, ...]:
    """q, k and v of a fused projection: stacked (``qkv_proj``), or interleaved head by head (GPT-NeoX)."""
    if config is None:  # a plain module: the heads are not known
        return ()
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if own_name == "qkv_proj" and rows == (heads + 2 * key_heads) * head_dim:
        sizes = (
            ("attention.q", heads * head_dim),
            ("attention.k", key_heads * head_dim),
            ("attention.v", key_heads * head_dim),
        )
        return _row_blocks(name, layer, width, sizes)
    if own_name == "query_key_value" and config.model_type == "gpt_neox" and rows == 3 * heads * head_dim:
        run = head_dim * width
        return tuple(
            Unit(f"{name}[{part}]", f"attention.{part}", layer, None, index * run, run, heads, 3 * run)
            for index, part in enumerate("qkv")
        )
    return ()


def _fused_expert_units(name: str, leaf: str, shape: tuple[int, ...], module: nn.Module, layer: int | None):
    """Experts in one tensor [E, ...]: transformers ≥ 5 says by two attributes of the module how each is packed.

    ``is_transposed``: [E, in, out] instead of [E, out, in]; ``is_concatenated``: gate and up are halves of the
    output axis, else they alternate along it (gpt-oss).
    """
    num_experts, rows, columns = shape
    size = rows * columns
    if leaf != "gate_up_proj":
        part = leaf.removesuffix("_proj")
        return tuple(
            Unit(f"{name}[{expert}]", f"expert.{part}", layer, expert, expert * size, size)
            for expert in range(num_experts)
        )
    transposed = getattr(module, "is_transposed", False)
    concatenated = getattr(module, "is_concatenated", True)
    if transposed:  # every input row holds both outputs
        length, count, stride = (columns // 2, rows, columns) if concatenated else (1, size // 2, 2)
    else:
        length, count, stride = (size // 2, 1, 0) if concatenated else (columns, rows // 2, 2 * columns)
    return tuple(
        Unit(
            f"{name}[{expert}].{part}",
            f"expert.{part}",
            layer,
            expert,
            expert * size + index * length,
            length,
            count,
            stride,
        )
        for expert in range(num_experts)
        for index, part in enumerate(("gate", "up"))
    )
