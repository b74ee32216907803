"""Roles of parameters and the logical matrices they hold (docs/method.md §1): all knowledge of architectures.

A parameter's role follows from its module and shape, not from one family's names. Roles that are scored:
``attention.{q,k,v,o}``, multi-head latent attention's ``attention.{q_a,q_b,kv_a,kv_b}`` (DeepSeek: the low-rank factors
of q, and of k and v together), ``mlp.{gate,up,down}``, ``shared.{gate,up,down}`` (experts that every token goes
through), ``expert.{gate,up,down}`` (routed ones), ``head`` and ``other``; roles that are not: ``embedding`` (a tied
head included), ``norm``, ``bias``, ``router``, ``tower`` (what only images or sound go through: no text gives it a
gradient). docs/moe.md lists how each family packs its experts, ``models.fused`` how matrices are fused into one weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import nn

from esi_ds.core.units import Parameter, Unit
from esi_ds.errors import UserError
from esi_ds.models.fused import attention_layout, has_gate_up, is_known_code, units_of
from esi_ds.words import counted

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig

SCORED = (
    *(f"attention.{part}" for part in ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b")),
    *(f"{kind}.{part}" for kind in ("mlp", "shared", "expert") for part in ("gate", "up", "down")),
    "head",
    "other",
)
UNSCORED = frozenset({"embedding", "norm", "bias", "router", "tower"})
LEAF_ROLES = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "q_a_proj": "attention.q_a",
    "q_b_proj": "attention.q_b",
    "kv_a_proj_with_mqa": "attention.kv_a",
    "kv_b_proj": "attention.kv_b",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
    "dense_h_to_4h": "mlp.up",
    "dense_4h_to_h": "mlp.down",
    "output_linear": "mlp.down",  # Granite's shared experts; their gate and up are input_linear
}
# Names that say their role only inside an attention, or only outside.
IN_ATTENTION = {"out_proj": "attention.o", "dense": "attention.o", "c_proj": "attention.o", "Wo": "attention.o"}
OUTSIDE_ATTENTION = {
    "intermediate.dense": "mlp.up",  # BERT's feed-forward layers
    "output.dense": "mlp.down",
    "feed_forward.dense.dense": "mlp.up",  # Reformer's
    "feed_forward.w1": "mlp.gate",  # LFM2's, and Llama's own code's
    "feed_forward.w3": "mlp.up",
    "feed_forward.w2": "mlp.down",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "mlp.fc_in": "mlp.up",
    "mlp.fc_out": "mlp.down",
    "ModernBertDecoderMLP.Wo": "mlp.down",
}
BERT_ATTENTION = {"query": "attention.q", "key": "attention.k", "value": "attention.v"}  # in a module named ``self``
EXPERT_ROLES = {
    "gate_proj": "expert.gate",
    "up_proj": "expert.up",
    "down_proj": "expert.down",
    "gate_up_proj": "expert",  # two matrices
    "w1": "expert.gate",
    "w3": "expert.up",
    "w2": "expert.down",
}
ROUTER_LEAVES = frozenset({"gate", "router", "wg", "shared_expert_gate"})
CORRECTION_BIASES = frozenset({"expert_bias", "e_score_correction_bias"})
ATTENTION_NAMES = frozenset({"self_attn", "self_attention", "attention", "attn"})
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
SHARED = re.compile(r"\.shared_(?:experts?|mlp)\.")
ATTENTION_PATH = re.compile(r"(?:^|[._])(?:\w*_)?(?:attn|attention)s?(?:\.|$)")
# What stands between a tower and the text model, by the names that transformers' multimodal models give it.
PROJECTORS = frozenset(
    {
        *("multi_modal_projector", "multimodal_projector", "mm_projector", "visual_projection", "vision_embed_tokens"),
        *("embed_vision", "embed_audio", "image_embed", "audio_embed"),
    }
)


def describe(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    roles: Mapping[str, str] | None = None,
) -> tuple[Parameter, ...]:
    """Every parameter in ``named_parameters()`` order (a tied one once, under its first name).

    shapes: full shapes by name, for a model whose parameters are partitioned and therefore empty themselves.
    roles: ``model.roles`` of the config, pattern → role; the first pattern that matches a name decides.
    Works on the meta device. Raises UserError for an unknown role, or a pattern that matches nothing.
    """
    roles = roles or {}
    _check_roles(roles, [name for name, _ in model.named_parameters()])
    modules = dict(model.named_modules())
    shapes = shapes or {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    get_head = getattr(model, "get_output_embeddings", None)
    head = getattr(get_head(), "weight", None) if get_head is not None else None
    # Where a head is tied to them, its name may come first (XLM-RoBERTa's).
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    outside, blocks = towers(model), expert_blocks(model, roles)
    numbers = {expert: number for experts in blocks.values() for number, expert in enumerate(experts)}
    parameters: list[Parameter] = []
    offset = 0
    for name, tensor in model.named_parameters():
        shape = tuple(shapes[name])
        module_name, _, leaf = name.rpartition(".")
        around = list(accumulate(module_name.split("."), "{}.{}".format))
        block = next((module for module in around if module in blocks), None)
        expert = next((numbers[module] for module in around if module in numbers), None)
        wanted = _configured_role(name, roles)
        if wanted is not None:
            role = wanted
        elif any(name.startswith(f"{tower}.") for tower in outside):
            role = "tower"
        elif id(tensor) in embeddings:
            role = "embedding"
        else:
            role = _role(modules, module_name, leaf, shape, expert, is_head=tensor is head)
        if role in UNSCORED:
            units: tuple[Unit, ...] = ()
        elif wanted is not None:
            units = _named_units(name, role, shape, expert)
        else:
            units = _units(name, role, shapes, modules, expert, getattr(model, "config", None))
        parameters.append(Parameter(name, shape, offset, role, units, block))
        offset += parameters[-1].numel
    return tuple(parameters)


def towers(model: nn.Module) -> list[str]:
    """Names of the modules that only images or sound go through: models inside the model that take no text
    (transformers' ``input_modalities``), and the projectors behind them."""
    if _takes_only_text(model):
        return []
    return [
        name
        for name, module in model.named_modules()
        if name
        and (
            name.rpartition(".")[2] in PROJECTORS
            or (hasattr(module, "input_modalities") and "text" not in _modalities(module))
        )
    ]


def _modalities(module: nn.Module) -> tuple[str, ...]:
    modalities = getattr(module, "input_modalities", None) or ("text",)
    return (modalities,) if isinstance(modalities, str) else tuple(modalities)


def _takes_only_text(model: nn.Module) -> bool:
    return set(_modalities(model)) == {"text"}


def routers(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, nn.Module]:
    """Modules whose output is the choice of experts, by name in the model's order.

    Excluded: the layers inside a router; the gate of a shared expert, which makes no choice; JetMoE's routers, whose
    output is the tokens in the experts' order. roles: ``model.roles``; a linear layer is a router if its weight has
    that role there.
    """
    modules, named = dict(model.named_modules()), _named_routers(model, roles or {})
    return {
        name: module
        for name, module in modules.items()
        if module in named
        or (
            _router_of(modules, name) == name
            and name.rpartition(".")[2] != "shared_expert_gate"
            and not type(module).__name__.endswith("Gating")
        )
    }


def _named_routers(model: nn.Module, roles: Mapping[str, str]) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _configured_role(f"{name}.weight", roles) == "router"
    ]


def layer_configs(text: PretrainedConfig) -> list[PretrainedConfig]:
    """What each layer of a text model is built from; only the model's own where its layers do not differ.

    Where they do (Gemma 4's wider heads), transformers raises an error for what is asked of the whole.
    """
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def experts_per_token(config: PretrainedConfig) -> int:
    """How many routed experts a token goes through; the maximum if layers differ (Hunyuan); 1 without experts."""
    keys = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")

    def count(layer: PretrainedConfig) -> int:
        sections = (layer, getattr(layer, "ffn_config", None))  # DBRX has a separate section
        counts = next((value for section in sections for key in keys if (value := getattr(section, key, None))), 1)
        return max(counts) if isinstance(counts, (list, tuple)) else counts

    return max(map(count, layer_configs(config)))


def router_names(parameters: Sequence[Parameter]) -> list[str]:
    """Names of the routers' parameters, their biases too."""
    return [parameter.name for parameter in parameters if parameter.role == "router"]


def tower_names(parameters: Sequence[Parameter]) -> list[str]:
    """Names of the parameters that only images or sound go through."""
    return [parameter.name for parameter in parameters if parameter.role == "tower"]


def expert_by_name(name: str) -> int | None:
    """The number of the expert that a parameter belongs to, as its name alone tells it."""
    return int(match.group(1)) if (match := EXPERT.search(name)) else None


def role_by_name(name: str, shape: tuple[int, ...]) -> str:
    """The role of a scored parameter as its name alone tells it: ``other`` where that needs the model's modules, as for
    fused experts."""
    module_name, _, leaf = name.rpartition(".")
    modules, is_head = {module_name: nn.Module()}, module_name == "lm_head"
    role = _role(modules, module_name, leaf, shape, expert_by_name(name), is_head)
    if ".shared_expert" in name:
        role = role.replace("mlp.", "shared.")
    return role if role in SCORED else "other"


def correction_biases(parameters: Sequence[Parameter]) -> list[str]:
    """Names of routers' biases that only order experts: no loss gives them a gradient."""
    return [name for name in router_names(parameters) if name.rpartition(".")[2] in CORRECTION_BIASES]


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter or module belongs to."""
    return int(match.group(1)) if (match := LAYER.search(f"{name}.")) else None


def expert_blocks(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Blocks whose routed experts are separate modules: block's name → its experts' names, in order.

    Which of these experts run, and in which order their gradients arrive, differs between ranks.
    roles: ``model.roles``.
    """
    named = _named_routers(model, roles or {})
    blocks: dict[str, list[str]] = {}
    for name, block in model.named_modules():
        if name and (experts := _expert_list(block, named)) is not None:
            blocks[name] = [f"{name}.{experts}.{expert}" for expert, _ in getattr(block, experts).named_children()]
    return blocks


def _expert_list(block: nn.Module | None, named: Collection[nn.Module] = ()) -> str | None:
    """The name of a block's list of routed experts; None if it has none.

    It is called ``experts``, or has as many entries as a gate beside it has outputs, each with a linear layer
    (Phixtral's ``mlp``). named: routers by ``model.roles``.
    """
    children = dict(block.named_children()) if block is not None else {}
    numbers = [name for name, _ in children["experts"].named_children()] if "experts" in children else []
    lists = {name: child for name, child in children.items() if isinstance(child, (nn.ModuleList, nn.ModuleDict))}
    if "experts" in lists or (numbers and all(map(str.isdigit, numbers))):
        return "experts"
    gates = [
        child for name, child in children.items() if name in ROUTER_LEAVES or _is_router_class(child) or child in named
    ]
    outputs = {linear.out_features for gate in gates for linear in gate.modules() if isinstance(linear, nn.Linear)}
    fitting = (name for name, entries in lists.items() if len(entries) > 1 and len(entries) in outputs)
    return next((name for name in fitting if _are_experts(name, children[name])), None)


def _are_experts(name: str, entries: nn.Module) -> bool:
    """Whether a list beside a gate holds neither layers nor shared experts, nor norms of heads."""
    is_known = LAYER.match(f"{name}.0.") or "shared" in name
    return not is_known and all(any(isinstance(m, nn.Linear) for m in entry.modules()) for entry in entries.children())


def unrecognised(parameters: Sequence[Parameter]) -> list[str]:
    """Names of parameters of an unknown kind, or packed in an unknown way: each matrix in them has one σ, which may be
    that of several."""
    return [p.name for p in parameters if p.units and all(unit.role == "other" for unit in p.units)]


def unrecognised_note(parameters: Sequence[Parameter]) -> str | None:
    """A warning of the ``unrecognised`` parameters; None where there are none."""
    if not (names := unrecognised(parameters)):
        return None
    return (
        f"{counted(len(names), 'parameter')} of an unknown kind, or packed in an unknown way (the first: "
        f"{names[0]}): each is scored as one matrix; name their roles under model.roles in the config"
    )


def _configured_role(name: str, roles: Mapping[str, str]) -> str | None:
    return next((role for pattern, role in roles.items() if fnmatchcase(name, pattern)), None)


def _check_roles(roles: Mapping[str, str], names: Sequence[str]) -> None:
    for pattern, role in roles.items():
        if role not in SCORED and role not in UNSCORED:
            known = ", ".join((*SCORED, *sorted(UNSCORED)))
            raise UserError(f"model.roles.{pattern}", role, "is not a role", f"use one of {known}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"model.roles.{pattern}",
                role,
                "matches no parameter",
                "write a parameter's name, with * for the parts that vary",
            )


def _named_units(name: str, role: str, shape: tuple[int, ...], expert: int | None) -> tuple[Unit, ...]:
    """The matrices of a parameter with a configured role: one, or one per expert if it holds all of them [E, ...]."""
    if role.startswith("expert.") and len(shape) == 3:
        return _by_expert(name, role, shape)
    return (Unit(name, role, layer_of(name), expert, 0, math.prod(shape)),)


def _by_expert(name: str, role: str, shape: tuple[int, ...]) -> tuple[Unit, ...]:
    """One matrix per expert of a parameter that holds all of them, [E, ...]."""
    layer, size = layer_of(name), math.prod(shape[1:])
    return tuple(Unit(f"{name}[{e}]", role, layer, e, e * size, size) for e in range(shape[0]))


def _role(
    modules: Mapping[str, nn.Module],
    module_name: str,
    leaf: str,
    shape: tuple[int, ...],
    expert: int | None,
    is_head: bool,
) -> str:
    module = modules[module_name]
    if is_head:
        return "head"
    if _router_of(modules, module_name) is not None:
        return "router"  # its biases too, DeepSeek's correction bias among them
    if leaf in CORRECTION_BIASES:
        return "router"  # beside the router, not inside it: AFMoE's, ERNIE's own code's
    if leaf.endswith("bias") or leaf == "sinks":  # gpt-oss: one number per head, added to its attention logits
        return "bias"
    if "norm" in type(module).__name__.lower() or (len(shape) == 1 and "norm" in module_name.rpartition(".")[2]):
        return "norm"
    if len(shape) != 2 and max(shape, default=1) == math.prod(shape):
        return "bias"  # one number per head or channel, such as a linear attention's decay: not a matrix
    own_name = module_name.rpartition(".")[2]
    if expert is not None and own_name in EXPERT_ROLES:
        return EXPERT_ROLES[own_name]
    if _is_fused(shape, leaf):
        return "shared" if _is_shared(modules, module_name) else "expert"
    role = _named_role(modules, module_name) if len(shape) == 2 else "other"
    if role.startswith("mlp.") and ATTENTION_NAMES.intersection(module_name.split(".")):
        return "other"  # AFMoE's attention has a gate_proj
    if expert is not None:
        return role.replace("mlp.", "expert.")
    return role.replace("mlp.", "shared.") if _is_shared(modules, module_name) else role


def _named_role(modules: Mapping[str, nn.Module], module_name: str) -> str:
    """The role of a matrix by the name of its module, and by where that is."""
    parent_name, _, own_name = module_name.rpartition(".")
    path = module_name.split(".")
    if ATTENTION_PATH.search(f"{parent_name}."):
        if path[-2] == "self" and own_name in BERT_ATTENTION:
            return BERT_ATTENTION[own_name]
        role = IN_ATTENTION.get(own_name)
    else:
        ends = (".".join(path[-2:]), ".".join(path[-3:]), f"{type(modules.get(parent_name)).__name__}.{own_name}")
        role = next((OUTSIDE_ATTENTION[end] for end in ends if end in OUTSIDE_ATTENTION), None)
    return role or LEAF_ROLES.get(own_name, "other")


def _is_fused(shape: tuple[int, ...], leaf: str) -> bool:
    """Whether a parameter holds all routed experts of a layer, or all shared ones: [E, ...]."""
    return len(shape) == 3 and leaf in ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def _is_shared(modules: Mapping[str, nn.Module], module_name: str) -> bool:
    """Whether a module is, or belongs to, an expert that every token goes through: routed ones are beside it. The only
    MLP of a dense Granite 4 has the same name."""
    match = SHARED.search(f"{module_name}.")
    owner = modules.get(module_name[: match.start()]) if match else None
    is_mixture = any(getattr(owner, name, None) is not None for name in ("experts", "block_sparse_moe"))
    return is_mixture or _expert_list(owner) is not None


def _router_of(modules: Mapping[str, nn.Module], module_name: str) -> str | None:
    """The router that a module is or belongs to (many routers wrap a linear layer); None if there is none."""
    path = module_name.split(".")
    outermost_first = (".".join(path[:length]) for length in range(1, len(path) + 1))
    return next((name for name in outermost_first if _is_router(modules, name)), None)


def _is_router(modules: Mapping[str, nn.Module], module_name: str) -> bool:
    """Whether a module is a router by its class, or is a gate beside the experts it chooses from."""
    module = modules.get(module_name)
    if _is_router_class(module):
        return not _has_experts(module)  # a block that holds both may be named after its router
    parent, _, own_name = module_name.rpartition(".")
    return own_name in ROUTER_LEAVES and parent != "" and _has_experts(modules.get(parent))


def _is_router_class(module: nn.Module | None) -> bool:
    class_name = type(module).__name__
    return "Router" in class_name or class_name.endswith(("MoEGate", "TopkGate", "TopKGate", "TopKGating"))


def _has_experts(module: nn.Module | None) -> bool:
    return hasattr(module, "experts") or _expert_list(module) is not None


def _units(
    name: str,
    role: str,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, nn.Module],
    expert: int | None,
    config: PretrainedConfig | None,
) -> tuple[Unit, ...]:
    """The logical matrices of one scored parameter, in flat order of their first elements."""
    shape = tuple(shapes[name])
    layer = layer_of(name)
    module_name, _, leaf = name.rpartition(".")
    owner_name, _, own_name = module_name.rpartition(".")
    module, owner = modules[module_name], modules.get(owner_name)
    is_shared = _is_shared(modules, module_name)
    if _is_fused(shape, leaf):
        if leaf == "gate_up_proj" and config is not None and not is_known_code(module):
            return _by_expert(name, "other", shape)
        units = _fused_expert_units(name, leaf, shape, layer, _is_transposed(name, shapes), _alternate(module))
        if is_shared:  # a shared expert's number is not that of a routed one
            return tuple(replace(unit, role=unit.role.replace("expert.", "shared."), expert=None) for unit in units)
        return units
    whole = Unit(name, role if role in SCORED else "other", layer, expert, 0, math.prod(shape))
    if len(shape) != 2 or owner is None:
        return (whole,)
    rows, width = shape
    # A module without a config, as in tests and other people's code, is taken at its word.
    is_gate_up = own_name == "gate_up_proj" if config is None else has_gate_up(owner, own_name)
    if is_gate_up:
        kind = "shared" if is_shared else "mlp" if expert is None else "expert"
        half = rows // 2 * width
        starts = {"gate": 0, "up": half}
        return tuple(Unit(f"{name}[{part}]", f"{kind}.{part}", layer, expert, at, half) for part, at in starts.items())
    layout = attention_layout(owner, own_name, config) if config is not None else None
    return (layout and units_of(name, (rows, width), layout, layer)) or (whole,)


def _is_transposed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether fused gate and up are [E, in, 2 · width] instead of [E, 2 · width, in].

    The shape of the down projection beside them, [E, width, in] or [E, in, width], decides for any sizes. Llama-4's
    experts do not have transformers' attribute ``is_transposed``.
    """
    _, rows, columns = shapes[name]
    _, first, second = shapes.get(name.rpartition(".")[0] + ".down_proj", (0, columns, rows // 2))
    return (rows, columns) == (second, 2 * first)


def _alternate(module: nn.Module) -> bool:
    """Whether gate and up alternate in the output (gpt-oss) instead of being its halves, by ``is_concatenated``."""
    return not getattr(module, "is_concatenated", True)


def _fused_expert_units(
    name: str, leaf: str, shape: tuple[int, ...], layer: int | None, transposed: bool, alternate: bool
) -> tuple[Unit, ...]:
    """Experts in one tensor [E, ...]: down projections one after another, or gate and up of each expert together."""
    num_experts, rows, columns = shape
    size = rows * columns
    if leaf != "gate_up_proj":
        return _by_expert(name, f"expert.{leaf.removesuffix('_proj')}", shape)
    if transposed:  # every row, one per input, holds the outputs of both
        length, count, stride = (1, size // 2, 2) if alternate else (columns // 2, rows, columns)
    else:
        length, count, stride = (columns, rows // 2, 2 * columns) if alternate else (size // 2, 1, 0)
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
