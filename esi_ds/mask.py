"""``python -m esi_ds.mask info|verify|compare|select``: look at a mask, check it, hold two against each other, make
another one from the same scores.

One process; one parameter in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esi_ds.artifacts import replace_folder, write_json_atomic
from esi_ds.core.mask import DIGESTS_NAME, INDEX_NAME, Mask, digest, pack_bits
from esi_ds.core.select import Order, Piece, select
from esi_ds.core.units import Unit
from esi_ds.errors import UserError

UNITS_NAME = "units.json"


def read_units(mask: Mask) -> dict[str, list[Unit]]:
    """Logical matrices by parameter, from ``units.json``; a parameter without any is one matrix of its own."""
    file = mask.path / UNITS_NAME
    units: dict[str, list[Unit]] = {name: [] for name in mask.names}
    if file.is_file():
        for row in json.loads(file.read_text()):
            units[row.pop("parameter")].append(Unit(**row))
    for name, found in units.items():
        if not found:
            found.append(Unit(name, "other", None, None, 0, mask.numel(name)))
    return units


def info(mask: Mask) -> list[str]:
    """What the mask is, and where its weights are, by role and by layer."""
    facts = ("format", "criterion", "contrastive", "order", "scope", "ratio", "threshold", "fingerprint")
    lines = [f"{key:12} {mask.metadata[key]}" for key in facts if key in mask.metadata]
    lines.append(f"{'selected':12} {mask.k:,} of {mask.total_numel:,} weights in {len(mask.names)} scored parameters")
    by_role: dict[str, list[int]] = {}
    by_layer: dict[int, list[int]] = {}
    for name, units in read_units(mask).items():
        bits = mask.bits(name)
        for unit in units:
            count = int(bits[unit.within(0, len(bits))].sum())
            tables = [by_role.setdefault(unit.role, [0, 0])]
            if unit.layer is not None:
                tables.append(by_layer.setdefault(unit.layer, [0, 0]))
            for row in tables:
                row[0] += count
                row[1] += unit.numel
    lines += ["", f"{'role':14}{'selected':>14}{'share of mask':>15}{'of the role':>13}"]
    lines += [_share_line(role, *row, mask.k) for role, row in sorted(by_role.items(), key=lambda item: -item[1][0])]
    lines += ["", f"{'layer':14}{'selected':>14}{'share of mask':>15}{'of the layer':>13}"]
    lines += [_share_line(str(layer), *row, mask.k) for layer, row in sorted(by_layer.items())]
    return lines


def _share_line(label: str, count: int, numel: int, k: int) -> str:
    return f"{label:14}{count:>14,}{count / max(k, 1):>15.2%}{count / numel:>13.3%}"


def verify(mask: Mask, scores: Path | None) -> list[str]:
    """Problems of the mask by itself and, given the scores, every parameter whose bits are not the exact top-k."""
    return mask.problems() or (compare_with_scores(mask, scores) if scores is not None else [])


def compare_with_scores(mask: Mask, folder: Path) -> list[str]:
    """Select again from the scores on disk, in one process, and compare bit for bit."""
    weight_map = _score_files(folder)
    if set(weight_map) != set(mask.names):
        return [f"scores and mask name different parameters: {sorted(set(weight_map) ^ set(mask.names))[:5]}"]
    return [
        f"{name}: {wrong} bits differ from the selection by its scores"
        for name, bits in selected(mask, folder, mask.metadata)
        if (wrong := int((bits != mask.bits(name)).sum()))
    ]


def _score_files(folder: Path) -> dict[str, str]:
    """Parameter → file of a scores folder."""
    try:
        return json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    except OSError as error:
        raise UserError("--scores", str(folder), "holds no scores", "give RUN/scores of the same run") from error


def selected(mask: Mask, scores: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name, bool bits) of the exact selection from ``scores``, one parameter in memory at a time.

    mask: any mask made from these scores. wanted: ``order``, ``seed``, ``scope``, ``k``, ``ratio``, as in metadata.
    """
    order = Order(wanted["order"], int(wanted["seed"]))
    weight_map, last = _score_files(scores), mask.total_numel - 1
    offsets = json.loads(mask.metadata["offsets"])

    def piece(name: str) -> Piece:
        with safe_open(scores / weight_map[name], "pt") as opened:
            return Piece(opened.get_tensor(name).flatten(), offsets[name])

    class Pieces:
        """All scores, one parameter in memory at a time."""

        def __iter__(self) -> Iterator[Piece]:
            return (piece(name) for name in mask.names)

    if wanted["scope"] == "model":
        (cut,) = select([Pieces()], [int(wanted["k"])], order, last, lambda counts: counts)
        for name, found in zip(mask.names, Pieces(), strict=True):
            yield name, cut.selects(order.keys(found.scores, found.position), found.position)
    else:
        for name in mask.names:
            yield name, _select_units(mask, name, piece(name), order, last, float(wanted["ratio"]))


def _select_units(mask: Mask, name: str, whole: Piece, order: Order, last: int, ratio: float) -> Tensor:
    """Scope ``matrix``: ⌊ratio · n⌋ of each logical matrix."""
    bits = torch.zeros(len(whole.scores), dtype=torch.bool)
    position = whole.position
    for unit in read_units(mask)[name]:
        where = unit.within(0, len(whole.scores))
        own = Piece(whole.scores[where], position)
        (cut,) = select([[own]], [int(ratio * unit.numel)], order, last, lambda counts: counts)
        bits[where] = cut.selects(order.keys(own.scores, position), position)
        position += unit.numel
    return bits


def write_selection(mask: Mask, scores: Path, output: Path, ratio: float, order: str, seed: int) -> Mask:
    """A mask of another ratio or order from the scores that ``mask`` was made from; its ``of`` and ``scope``.

    Bits are kept in memory (an eighth of a byte a weight). The folder is written whole or not at all.
    """
    if output.exists():
        raise UserError("OUTPUT", str(output), "exists already", "give a new folder")
    metadata = {**mask.metadata, "ratio": repr(ratio), "order": order, "seed": str(seed), "threshold": "null"}
    scored = sum(mask.numel(name) for name in mask.names)
    base = scored if mask.metadata.get("of") == "scored" else mask.total_numel
    metadata["k"] = str(min(int(ratio * base), scored))
    data, counts = {}, {}
    for name, bits in selected(mask, scores, metadata):
        data[name], counts[name] = pack_bits(bits), int(bits.sum())
    metadata |= {"counts": json.dumps(counts), "k": str(sum(counts.values()))}
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    file = "model-00001-of-00001.safetensors"
    save_file(data, temporary / file, metadata=metadata)
    index = {"metadata": {}, "weight_map": dict.fromkeys(data, file)}
    write_json_atomic(temporary / INDEX_NAME, index)
    write_json_atomic(temporary / DIGESTS_NAME, {name: digest(values) for name, values in data.items()})
    if (mask.path / UNITS_NAME).is_file():
        shutil.copyfile(mask.path / UNITS_NAME, temporary / UNITS_NAME)
    replace_folder(temporary, output)
    return Mask.load(output)


def compare(first: Mask, second: Mask) -> list[str]:
    """Overlap of two masks of one model: whole, by role, by layer, and by cell (layer and role)."""
    if first.shapes != second.shapes:
        raise UserError(
            "mask",
            f"{first.path} and {second.path}",
            "are masks of different models",
            "compare masks whose parameters have the same names and shapes",
        )
    rows: dict[tuple[str, str], list[int]] = {}
    for name, units in read_units(first).items():
        one, other = first.bits(name), second.bits(name)
        for unit in units:
            where = unit.within(0, len(one))
            a, b = one[where], other[where]
            layer = "-" if unit.layer is None else str(unit.layer)
            for key in (("all", ""), ("role", unit.role), ("layer", layer), ("cell", f"{layer} {unit.role}")):
                row = rows.setdefault(key, [0, 0, 0])
                row[0] += int(a.sum())
                row[1] += int(b.sum())
                row[2] += int((a & b).sum())
    lines = [f"{'':22}{'first':>12}{'second':>12}{'both':>12}{'of first':>10}{'of second':>10}{'Jaccard':>9}"]
    kinds = ("all", "role", "layer", "cell")
    for (kind, label), (a, b, both) in sorted(
        rows.items(), key=lambda row: (kinds.index(row[0][0]), _natural(row[0][1]))
    ):
        union = a + b - both
        lines.append(
            f"{f'{kind} {label}':22}{a:>12,}{b:>12,}{both:>12,}{both / max(a, 1):>10.2%}"
            f"{both / max(b, 1):>10.2%}{both / max(union, 1):>9.4f}"
        )
    return lines


def _natural(label: str) -> tuple[int, str]:
    number, _, rest = label.partition(" ")
    return (int(number), rest) if number.isdigit() else (-1, label)


def share(text: str) -> float:
    """An argument between 0 and 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esi_ds.mask", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what a mask is and where its weights are").add_argument("mask")
    checker = commands.add_parser("verify", help="check a mask's bits, and against the scores it was made from")
    checker.add_argument("mask")
    checker.add_argument("--scores", type=Path, help="scores/ of the run: select again and compare bit for bit")
    overlap = commands.add_parser("compare", help="overlap of two masks, by role and layer")
    overlap.add_argument("first")
    overlap.add_argument("second")
    maker = commands.add_parser("select", help="a mask of another ratio or order from the same scores")
    maker.add_argument("mask", help="a mask made from the scores")
    maker.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the new mask")
    maker.add_argument("--scores", type=Path, required=True, help="scores/ of the run")
    maker.add_argument("--ratio", type=share, required=True, help="share of the weights")
    maker.add_argument("--order", choices=("top", "bottom", "random"), default="top")
    maker.add_argument("--seed", type=int, default=0, help="of --order random")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "info":
            print("\n".join(info(Mask.load(arguments.mask))))
        elif arguments.command == "compare":
            print("\n".join(compare(Mask.load(arguments.first), Mask.load(arguments.second))))
        elif arguments.command == "select":
            given = (arguments.scores, arguments.output, arguments.ratio, arguments.order, arguments.seed)
            made = write_selection(Mask.load(arguments.mask), *given)
            print(f"{made.k:,} of {made.total_numel:,} weights in {made.path}")
        else:
            found = verify(Mask.load(arguments.mask), arguments.scores)
            print("\n".join(found) or "sound" + (": exactly the selection by its scores" if arguments.scores else ""))
            return 2 if found else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
