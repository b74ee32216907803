"""What parts of a weight do, seen by running the model: which rows are queries, keys, values, which are gate and up.

Nothing here reads a name that says how a matrix is packed, so it can contradict those who do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esi_ds.core.units import Parameter, Unit

ZERO = 1e-5  # of the largest gradient: what is nothing but rounding


def problems(model: PreTrainedModel, parameters: tuple[Parameter, ...], ids: Tensor) -> Iterator[str]:
    """Sentences on units whose function is not their role's, at most one per kind of weight."""
    seen = set()
    for sentence in (*attention_problems(model, parameters, ids), *gating_problems(model, parameters, ids)):
        kind = "".join(c for c in sentence if not c.isdigit())
        if kind not in seen:
            seen.add(kind)
            yield sentence


LARGER = ("layer", "block", "head", "norm")  # ends of names of what holds an attention and more, or stands behind one


def attention_of(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost module around a parameter that is an attention, by its class or its name in the model."""
    path = name.split(".")[:-1]
    for depth in range(len(path) - 1, 0, -1):
        module = model.get_submodule(".".join(path[:depth]))
        names = (type(module).__name__.lower(), path[depth - 1])
        if names[0].endswith("attention"):
            return module
        if not any(word.endswith(LARGER) for word in names) and any("attention" in w or "attn" in w for w in names):
            return module
    return None


def has_convolution(attention: nn.Module) -> bool:
    """Whether tokens are mixed between projection and attention: then no row has a function of its own."""
    return any(isinstance(module, nn.Conv1d) for module in attention.modules())


def only_queries_differ(attention: nn.Module) -> bool:
    """Whether keys and values of a token alone both count: without a softmax, or with a sink beside it."""
    is_linear = any(word in type(attention).__name__.lower() for word in ("linear", "lightning"))
    return is_linear or any("sink" in name for name, _ in attention.named_parameters())


def first_tensor(output) -> Tensor:
    return output if isinstance(output, Tensor) else next(o for o in output if isinstance(o, Tensor))


def output_gradients(model: PreTrainedModel, inner: nn.Module, outer: nn.Module, ids: Tensor) -> Tensor | None:
    """|d(a random projection of outer's last output)/d(inner's output)| [L, rows]; None where inner is not run
    once on all tokens."""
    kept: list[Tensor] = []
    results: list[Tensor] = []
    hooks = [
        inner.register_forward_hook(lambda m, i, o: kept.append(first_tensor(o))),
        outer.register_forward_hook(lambda m, i, o: results.append(first_tensor(o))),
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(kept) != 1 or len(results) != 1 or kept[0].ndim != 3 or results[0].ndim != 3:
        return None
    if kept[0].shape[1] != ids.shape[1]:
        return None  # its positions are not the tokens'
    if not results[0].requires_grad:
        return None  # in evaluation it runs without gradients
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(results[0].shape[-1], generator=generator)
    (gradient,) = torch.autograd.grad(results[0][0, -1] @ direction, kept[0], allow_unused=True)
    return None if gradient is None else gradient[0].abs()


def attention_problems(model: PreTrainedModel, parameters: tuple[Parameter, ...], ids: Tensor) -> Iterator[str]:
    """Attention's roles outside an attention, and rows of its projections that work otherwise than their role says."""
    for parameter in parameters:
        roles = {unit.role for unit in parameter.units if unit.role.startswith("attention.")}
        if not roles:
            continue
        attention = attention_of(model, parameter.name)
        owner_name = parameter.name.rpartition(".")[0]
        if attention is None:
            parent = type(model.get_submodule(owner_name.rpartition(".")[0])).__name__
            yield f"{parameter.name} has the role {' and '.join(sorted(roles))} in a {parent}"
            continue
        functions = projection_functions(model, model.get_submodule(owner_name), attention, ids)
        has_values = any(is_value(other) and attention_of(model, other.name) is attention for other in parameters)
        for unit in parameter.units if functions else ():
            allowed = {FUNCTIONS.get(unit.role), "unclear"}
            if unit.role == "attention.k" and not has_values:
                allowed.add("value")  # keys that are the values too
            others = {functions[row] for row in rows_of(unit, parameter)} - allowed
            if others and unit.role in FUNCTIONS:
                yield f"{unit.name} ({unit.role}) holds rows that work as {' and '.join(sorted(others))}"


FUNCTIONS = {"attention.q": "query", "attention.k": "key", "attention.v": "value"}


def projection_functions(
    model: PreTrainedModel, projection: nn.Module, attention: nn.Module, ids: Tensor
) -> list[str] | None:
    """What each row of a projection inside an attention works as; None where that cannot be told.

    With one token alone only values have a gradient; of the last output, only its query has one.
    """
    if not isinstance(projection, nn.Linear) or has_convolution(attention):
        return None
    many = output_gradients(model, projection, attention, ids)
    single = output_gradients(model, projection, attention, ids[:, :1])
    if many is None or single is None:
        return None
    functions = row_functions(many, single)
    if only_queries_differ(attention):
        return [{"gate": "query", "query": "query"}.get(function, "unclear") for function in functions]
    return functions


def is_value(parameter: Parameter) -> bool:
    return any(unit.role == "attention.v" for unit in parameter.units)


def row_functions(many: Tensor, single: Tensor) -> list[str]:
    """Function of each row of a projection, from the gradients of its outputs with many tokens and with one."""
    functions = []
    scale = float(many.max())
    single_scale = float(single.max())
    for row in range(many.shape[1]):
        at_last, before = float(many[-1, row]), float(many[:-1, row].max())
        alone = float(single[0, row]) > ZERO * max(single_scale, scale)
        if before <= ZERO * scale:
            functions.append("unclear" if at_last <= ZERO * scale else "gate" if alone else "query")
        else:
            functions.append("value" if alone else "key")
    return functions


def rows_of(unit: Unit, parameter: Parameter) -> list[int]:
    """Numbers of the rows that a unit has elements in."""
    positions = unit.elements(torch.arange(parameter.numel))
    return (positions // (parameter.numel // parameter.shape[0])).unique().tolist()


def gating_problems(model: PreTrainedModel, parameters: tuple[Parameter, ...], ids: Tensor) -> Iterator[str]:
    """The output of a gated block is linear in all of its up matrices, and not in its gates."""
    blocks: dict[str, dict[str, list[tuple[Parameter, Unit]]]] = {}
    for parameter in parameters:
        for unit in parameter.units:
            kind, _, part = unit.role.rpartition(".")
            if kind in ("mlp", "shared", "expert") and part in ("gate", "up"):
                blocks.setdefault(block_of(parameter), {}).setdefault(part, []).append((parameter, unit))
            if kind in ("mlp", "expert", "shared") and attention_of(model, parameter.name) is not None:
                yield f"{parameter.name} has the role {unit.role} inside an attention"
    for name, parts in blocks.items():
        if set(parts) == {"gate", "up"}:
            yield from block_problems(model, name, parts, ids)


def block_of(parameter: Parameter) -> str:
    """Name of the module whose output gate and up make: around the weight's own module, or it where it owns both."""
    owner = parameter.name.rpartition(".")[0]
    return owner.rpartition(".")[0] if parameter.name.endswith(".weight") else owner


def block_problems(
    model: PreTrainedModel, name: str, parts: dict[str, list[tuple[Parameter, Unit]]], ids: Tensor
) -> Iterator[str]:
    block = model.get_submodule(name)
    calls: list[tuple[tuple, dict]] = []
    hook = block.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    if len(calls) != 1:
        return
    arguments, options = calls[0]

    def output(members: list[tuple[Parameter, Unit]], factor: float) -> Tensor:
        """The block's output with some units multiplied by a factor."""
        kept: dict[str, Tensor] = {}
        with torch.no_grad():
            for parameter, unit in members:
                weight = model.get_parameter(parameter.name)
                kept.setdefault(parameter.name, weight.detach().clone())
                for view in unit.views(weight.view(-1)):
                    view.mul_(factor)
            result = first_tensor(block(*arguments, **options)).double()
            for parameter_name, values in kept.items():
                model.get_parameter(parameter_name).copy_(values)
        return result

    for part, members in parts.items():
        plus, minus, zero = (output(members, factor) for factor in (1.0, -1.0, 0.0))
        scale = float((plus - zero).abs().max())
        bend = float((plus + minus - 2 * zero).abs().max())
        is_linear = bend <= 1e-4 * scale
        if scale > 0 and is_linear != (part == "up"):
            yield f"the {part} of {name} works as {'up' if is_linear else 'gate'} does, or is not cut there"
