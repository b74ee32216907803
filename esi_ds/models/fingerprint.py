"""Which model a mask belongs to (docs/design.md §7): names, shapes, and the weights in the checkpoint.

Weights are hashed tensor by tensor from the checkpoint's safetensors files, so that the digest does not depend on how
tensors are split into files, and ranks can share the reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from esi_ds.core.mask import EmptyMask, Mask
from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.models.weights import checkpoint_tensors
from esi_ds.reading import share_of

BLOCK = 1 << 24
# Parts of a parameter's name that torch.compile, checkpointing, FSDP and data parallelism insert.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})


def structure_digest(parameters: Iterable[Parameter]) -> str:
    """sha256 of the sorted (name, shape) pairs, as JSON."""
    pairs = sorted((parameter.name, list(parameter.shape)) for parameter in parameters)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def tensor_digests(folder: Path, part: int = 0, num_parts: int = 1, field: str = "model.path") -> dict[str, str]:
    """sha256 of "dtype shape" and the bytes of every tensor in the share ``part`` of ``num_parts``.

    Raises UserError naming ``field`` where the folder holds no complete weights.
    """
    digests = {}
    tensors = {tensor.name: tensor for tensor in checkpoint_tensors(folder, field)}
    for name in share_of({name: tensor.num_bytes for name, tensor in tensors.items()}, part, num_parts):
        _, file, first, last, description = tensors[name]
        digest = hashlib.sha256(description.encode())
        with file.open("rb") as opened:
            opened.seek(first)
            for start in range(first, last, BLOCK):
                digest.update(opened.read(min(BLOCK, last - start)))
        digests[name] = digest.hexdigest()
    return digests


def weights_digest(digests: Mapping[str, str]) -> str:
    """sha256 of the names and digests of all tensors."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def fingerprint(parameters: Iterable[Parameter], digests: Mapping[str, str]) -> str:
    """``structure:weights``, two sha256 in hexadecimal, so that other shapes and other weights are distinguishable."""
    return f"{structure_digest(parameters)}:{weights_digest(digests)}"


def check_mask_structure(mask: Mask, parameters: Sequence[Parameter], field: str) -> None:
    """Raise UserError if the mask omits a scored parameter of this model, or names one that the model does not have or
    has in another shape (docs/method.md §3: fail closed). The mask may name unscored parameters too."""
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    if inside := next((name for name in shapes if name not in mask.shapes and unwrapped(name) in mask.shapes), None):
        problem = f"the model is wrapped, as by torch.compile, checkpointing or data parallelism ({inside})"
        raise UserError(field, str(mask.path), problem, "give the model itself, before it is wrapped")
    wrapped = [name for name in shapes if name.startswith("base_model.model.") or ".lora_" in name]
    if wrapped:
        raise UserError(
            field, str(mask.path), f"the model is wrapped by an adapter ({wrapped[0]})", "give its base model"
        )
    missing = [parameter.name for parameter in parameters if parameter.scored and parameter.name not in mask.shapes]
    extra = [name for name in mask.shapes if name not in shapes]
    total = sum(parameter.numel for parameter in parameters)
    for names, problem in ((missing, "does not name {}"), (extra, "names {}, which the model does not have")):
        if names:
            listed = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            remedy = "it is another model's mask: score this model"
            if not extra and mask.total_numel == total:
                remedy = "it was made with other roles: give its model.roles, or score this model"
            raise UserError(field, str(mask.path), problem.format(listed), remedy)
    for name, shape in mask.shapes.items():
        if shapes[name] != shape:
            raise UserError(
                field,
                str(mask.path),
                f"{name} has shape {list(shape)} in the mask and {list(shapes[name])} in the model",
                "it is another model's mask: score this model",
            )
    if mask.total_numel != total:
        raise UserError(
            field,
            str(mask.path),
            f"is for a model of {mask.total_numel:,} weights; this one has {total:,}",
            "it is another model's mask: score this model",
        )


def unwrapped(name: str) -> str:
    """A parameter's name without the parts that wrappers insert anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_mask_weights(mask: Mask, fingerprint: str, allow_mismatch: bool, field: str) -> bool:
    """Whether the mask belongs to exactly these weights. Raises UserError if not, unless a mismatch is allowed."""
    if mask.fingerprint == fingerprint or isinstance(mask, EmptyMask):
        return True
    if not allow_mismatch:
        raise UserError(
            field,
            str(mask.path),
            f"belongs to other weights (fingerprint {mask.fingerprint[:16]}…{mask.fingerprint[-8:]}, the model has "
            f"{fingerprint[:16]}…{fingerprint[-8:]})",
            "score this model, or add --allow-fingerprint-mismatch if this is intended",
        )
    return False
