"""Masks and scores of made-up models on disk, written by plain safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from esi_ds.core.mask import DIGESTS_NAME, INDEX_NAME, digest, pack_bits
from esi_ds.core.noise import random_bits, stream
from esi_ds.core.units import Unit

MASK_FILE = "model-00001-of-00001.safetensors"


def mask_metadata(masks: Mapping[str, Tensor], **others: str) -> dict[str, str]:
    """Metadata of a mask file. ``others`` are added, and replace what the masks themselves say.

    masks: parameter → the weights selected, bool in the parameter's shape.
    """
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    scored, k = sum(mask.numel() for mask in masks.values()), sum(counts.values())
    total = int(others.get("total_numel", scored))
    has_threshold = k > 0 and others.get("scope", "model") == "model" and others.get("order", "top") != "random"
    return {
        "format": "esi-mask/1",
        "k": str(k),
        "ratio": repr(min(1.0, (k + 0.5) / total)),
        "total_numel": str(total),
        "threshold": "0.5" if has_threshold else "null",
        "criterion": "esi",
        "order": "top",
        "fingerprint": "a:b",
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "counts": json.dumps(counts),
        **others,
    }


def write_mask(folder: Path, masks: Mapping[str, Tensor], **others: str) -> Path:
    """Write a mask folder of one file, with what the format requires and no more; arguments as of ``mask_metadata``."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: pack_bits(mask.flatten()) for name, mask in masks.items()}
    save_file(packed, folder / MASK_FILE, metadata=mask_metadata(masks, **others))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(masks, MASK_FILE)}))
    return folder


def units_of(name: str, layer: int, rows: int, columns: int) -> list[Unit]:
    """A fused tensor: one contiguous matrix in the upper half, two that share the rows of the lower one."""
    upper, half = rows // 2, columns // 2
    rest, start = rows - upper, upper * columns
    return [
        Unit(f"{name}.a", "attention.v", layer, None, 0, upper * columns),
        Unit(f"{name}.b", "mlp.gate", layer, None, start, half, rest, columns),
        Unit(f"{name}.c", "mlp.up", layer, None, start + half, columns - half, rest, columns),
    ]


def write_pair(folder: Path, shapes: list[tuple[int, int]], ratio: float, scope: str, order: str, seed: int) -> None:
    """Write ``mask/`` and ``scores/`` below ``folder``, one file per parameter; the mask is selected in one process.

    Scores repeat, so that ties decide the selection.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{index}.fused" for index in range(len(shapes))]
    scores = {
        name: (torch.randint(0, 40, shape, generator=generator) / 8.0)
        for name, shape in zip(names, shapes, strict=True)
    }
    units = {name: units_of(name, i, *shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    numel = [values.numel() for values in scores.values()]
    offsets = {name: sum(numel[:index]) for index, name in enumerate(names)}
    bits = _selected(scores, units, ratio, scope, order, seed)
    masks = {name: values.view(scores[name].shape) for name, values in bits.items()}
    selection = {"order": order, "scope": scope, "of": "all", "seed": str(seed), "offsets": json.dumps(offsets)}
    metadata = mask_metadata(masks, ratio=repr(ratio), **selection)
    if metadata["threshold"] != "null":
        selected = torch.cat([values[masks[name]] for name, values in scores.items()])
        metadata["threshold"] = repr(float(selected.min() if order == "top" else selected.max()))
    about = {key: metadata[key] for key in ("criterion", "fingerprint", "total_numel", "seed")}
    packed = {name: pack_bits(values) for name, values in bits.items()}
    for kind, data in (("mask", packed), ("scores", scores)):
        (folder / kind).mkdir(parents=True)
        files = {name: f"model-{i:05d}-of-{len(names):05d}.safetensors" for i, name in enumerate(names, 1)}
        for name, file in files.items():
            text = metadata if kind == "mask" else {"format": "esi-scores/1", **about}
            save_file({name: data[name]}, folder / kind / file, metadata=text)
        (folder / kind / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "mask" / DIGESTS_NAME).write_text(json.dumps({name: digest(values) for name, values in packed.items()}))
    rows = [{"parameter": name, **asdict(unit)} for name, parts in units.items() for unit in parts]
    (folder / "mask/units.json").write_text(json.dumps(rows))


def _selected(
    scores: Mapping[str, Tensor], units: Mapping[str, Sequence[Unit]], ratio: float, scope: str, order: str, seed: int
) -> dict[str, Tensor]:
    """The definition of the selection, on whole tensors in memory."""
    bits = {name: torch.zeros(values.numel(), dtype=torch.bool) for name, values in scores.items()}
    if scope == "model":
        groups = [[(name, slice(None)) for name in scores]]
    else:
        every = {name: torch.arange(values.numel()) for name, values in scores.items()}
        groups = [[(name, unit.elements(every[name]))] for name, parts in units.items() for unit in parts]
    position = 0
    for group in groups:
        values = [scores[name].flatten()[where] for name, where in group]
        keys = torch.cat(values) if order != "bottom" else -torch.cat(values)
        if order == "random":
            keys = random_bits(stream(seed, 0x5E1EC7), torch.arange(position, position + len(keys)), 31)
        position += len(keys)
        chosen = _largest(keys, int(ratio * len(keys))).split([len(part) for part in values])
        for (name, where), part in zip(group, chosen, strict=True):
            bits[name][where] = part
    return bits


def _largest(keys: Tensor, k: int) -> Tensor:
    """The k largest, and of equal ones the first; without sorting, which takes long for millions."""
    if k == 0:
        return torch.zeros(len(keys), dtype=torch.bool)
    least = keys.kthvalue(len(keys) - k + 1).values
    chosen = keys > least
    chosen[(keys == least).nonzero().flatten()[: k - int(chosen.sum())]] = True
    return chosen
