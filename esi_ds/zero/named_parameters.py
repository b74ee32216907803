"""Which weights of a library user's model train: its parameters by name, checked against the mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from esi_ds.core.mask import Mask
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_structure
from esi_ds.models.idle_experts import mend_grouped_product
from esi_ds.models.roles import describe, router_names
from esi_ds.zero.partitioned import whole_shape


def resolve_trained(
    model_or_params: nn.Module | Iterable[Any],
    mask: Mask | str | Path,
    train: str,
    unscored: str,
    router: str | None,
    roles: Mapping[str, str] | None,
) -> tuple[list[dict[str, Any]], Trained]:
    """Parameter groups of (name, parameter) pairs, and which of their weights train; arguments as of ``MaskedAdamW``.

    Raises UserError where the mask is damaged or does not fit, and where nothing would train.
    """
    for name, value, known in (
        ("train", train, ("selected", "complement")),
        ("unscored", unscored, ("freeze", "train")),
        ("router", router, (None, "freeze", "train")),
    ):
        if value not in known:
            raise UserError(name, value, "is unknown", f"give one of {', '.join(map(str, known))}")
    mask = (mask if isinstance(mask, Mask) else Mask.load(mask)).check_bits()
    groups = named_groups(model_or_params)
    named = {name: tensor for group in groups for name, tensor in group["params"]}
    shapes = {name: whole_shape(tensor) for name, tensor in named.items()}
    parameters = _check(model_or_params, named, shapes, mask, roles)
    routers = router_names(parameters)
    if router is not None and not routers:
        raise UserError("router", router, "is set, but no router is known here", "give a model with routers")
    trained = Trained(mask, train, unscored, shapes, routers, router)
    if trained.total == 0:
        raise UserError("mask", str(mask.path), f"nothing would train with train={train}", "is it the right mask?")
    if any(len(shape) == 3 for shape in shapes.values()):  # fused experts
        mend_grouped_product()
    return groups, trained


def named_groups(model_or_params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """Parameter groups whose ``params`` are (name, parameter) pairs. Raises UserError where there are no names."""
    if isinstance(model_or_params, nn.Module):
        return [{"params": list(model_or_params.named_parameters())}]
    items = list(model_or_params)
    groups = [dict(group) for group in items] if items and isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        pairs = list(group["params"])
        if "param_names" in group:
            pairs = list(zip(group.pop("param_names"), pairs, strict=True))
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise UserError(
                "model_or_params",
                None,
                "holds parameters without names, which a mask cannot be matched with",
                "give the model, or model.named_parameters()",
            )
        group["params"] = pairs
    return groups


def _check(
    model_or_params: nn.Module | Iterable[Any],
    named: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    mask: Mask,
    roles: Mapping[str, str] | None,
) -> tuple[Parameter, ...]:
    """The parameters with their roles; empty for pairs, whose roles are unknown.

    Raises UserError unless names and shapes are those of the mask (docs/method.md §3: fail closed).
    """
    first_names: dict[int, str] = {}
    for name, tensor in named.items():
        if (first := first_names.setdefault(id(tensor), name)) != name:
            problem, remedy = (
                f"is {first} by another name",
                "give model.named_parameters(), which names a tied weight once",
            )
            raise UserError("model_or_params", name, problem, remedy)
        if isinstance(tensor, DTensor):
            problem = "is a DTensor: a mask cannot be cut as FSDP or tensor parallelism cuts weights"
            raise UserError("model_or_params", name, problem, "use ZeRO-3, or plain PyTorch")
        if not tensor.is_floating_point() or "4bit" in type(tensor).__name__ or "8bit" in type(tensor).__name__:
            raise UserError(
                "model_or_params", name, "is quantised: it cannot be trained in place", "load it unquantised"
            )
    if isinstance(model_or_params, nn.Module):
        parameters = describe(model_or_params, shapes, roles)
        check_mask_structure(mask, parameters, "mask")
        return parameters
    # Without the model's modules there are no roles: every name of the mask must be present in its shape.
    for name, shape in mask.shapes.items():
        if shapes.get(name) != shape:
            problem = "is not among the parameters" if name not in shapes else f"has shape {list(shapes[name])} here"
            raise UserError("mask", str(mask.path), f"its {name} {problem}", "give every parameter of the mask's model")
    if sum(torch.Size(shape).numel() for shape in shapes.values()) != mask.total_numel:
        raise UserError("mask", str(mask.path), "was made for a model of another size", "give all its parameters")
    return ()
