"""Masks and scores of made-up models on disk, of any number of files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from esi_ds.core.mask import DIGESTS_NAME, INDEX_NAME, digest, pack_bits
from esi_ds.core.select import Order, Piece, select
from esi_ds.core.units import Unit


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
    """``mask/`` and ``scores/`` below ``folder``, a file a parameter; the mask is selected here in one piece.

    Scores repeat, so that ties decide.
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
    bits = _selected(scores, units, offsets, ratio, scope, Order(order, seed))
    counts = {name: int(found.sum()) for name, found in bits.items()}
    metadata = {
        "format": "esi-mask/1", "k": str(sum(counts.values())), "ratio": repr(ratio), "total_numel": str(sum(numel)),
        "threshold": "null", "criterion": "esi", "order": order, "scope": scope, "of": "all", "seed": str(seed),
        "fingerprint": "a:b", "shapes": json.dumps(dict(zip(names, shapes, strict=True))),
        "offsets": json.dumps(offsets), "counts": json.dumps(counts),
    }  # fmt: skip
    packed = {name: pack_bits(found) for name, found in bits.items()}
    for kind, data in (("mask", packed), ("scores", scores)):
        place = folder / kind
        place.mkdir(parents=True)
        files = {name: f"model-{i:05d}-of-{len(names):05d}.safetensors" for i, name in enumerate(names, 1)}
        for name, file in files.items():
            save_file({name: data[name]}, place / file, metadata=metadata)
        (place / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "mask" / DIGESTS_NAME).write_text(json.dumps({name: digest(values) for name, values in packed.items()}))
    rows = [{"parameter": name, **asdict(unit)} for name, found in units.items() for unit in found]
    (folder / "mask/units.json").write_text(json.dumps(rows))


def _selected(scores: dict[str, Tensor], units, offsets, ratio: float, scope: str, order: Order) -> dict[str, Tensor]:
    """The definition, whole tensors in memory."""
    last = sum(values.numel() for values in scores.values()) - 1
    bits = {name: torch.zeros(values.numel(), dtype=torch.bool) for name, values in scores.items()}
    if scope == "model":
        groups = [[(name, slice(None), offsets[name]) for name in scores]]
    else:
        groups, position = [], 0
        for name, found in units.items():
            for unit in found:
                groups.append([(name, unit.within(0, scores[name].numel()), position)])
                position += unit.numel
    for group in groups:
        pieces = [Piece(scores[name].flatten()[where], position) for name, where, position in group]
        wanted = int(ratio * sum(len(piece.scores) for piece in pieces))
        (cut,) = select([pieces], [wanted], order, last, lambda counts: counts)
        for piece, (name, where, position) in zip(pieces, group, strict=True):
            bits[name][where] = cut.selects(order.keys(piece.scores, position), position)
    return bits
