"""``esi-ds mask info|verify|compare|select``: describe a mask, check it, compare it with another, or make
another one from the same scores.

A few million weights are in memory at a time, whatever the mask's size. ``mpirun -n 64 python -m esi_ds.mask ...``
shares the work among processes on any number of nodes and prints the same output once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from esi_ds.config.section import MAX_SEED
from esi_ds.core.mask import Mask, refuse_problems
from esi_ds.core.mask_metadata import follows
from esi_ds.core.score_folder import UNNAMED, ScoreFolder
from esi_ds.core.units import Unit
from esi_ds.errors import UserError
from esi_ds.ranks import Ranks, find_ranks
from esi_ds.reading import json_sha256
from esi_ds.reselect import Reselection, check_cover, read_units, remarks_on, spans, states_units, write_selection
from esi_ds.terminal import ReaderGone, clean_output, help_text

MAX_CELLS = 40  # lines of ``compare`` by layer and role that are shown unasked
MADE_BY = ("criterion", "contrastive", "normalise", "order", "of", "scope", "ratio")  # what a selection follows from


def count_units(masks: Sequence[Mask], ranks: Ranks) -> tuple[list[Unit], Tensor]:
    """The logical matrices of one model's masks, and int64 [matrices, masks + 1]: how many weights of each matrix every
    mask selects, and in the last column how many all masks select. Raises UserError where the matrices do not cover
    every weight once. The matrices are those of the first mask that states some. Collectives: a gather, and one sum of
    the counts."""
    stating = next(filter(states_units, masks), masks[0])
    by_name = read_units(stating)
    check_cover(stating, by_name, ranks)
    units = [unit for units_of_parameter in by_name.values() for unit in units_of_parameter]
    firsts: dict[str, int] = {}
    position = 0
    for name, units_of_parameter in by_name.items():
        firsts[name], position = position, position + len(units_of_parameter)
    counts = torch.zeros(len(units), len(masks) + 1, dtype=torch.int64)
    for name, low, high in spans(masks[0])[ranks.rank :: ranks.size]:
        bits = [mask.bits(name, low, high) for mask in masks]
        bits.append(torch.stack(bits).all(0))
        for number, unit in enumerate(by_name[name], firsts[name]):
            if unit.meets(low, high):
                counts[number] += torch.tensor([int(unit.elements(part, low).sum()) for part in bits])
    return units, ranks.add(counts)


def info(mask: Mask, ranks: Ranks) -> list[str]:
    """Lines about the mask, and about where its weights are, by role and by layer."""
    facts = ("format", "criterion", "contrastive", "normalise", "order", "scope", "ratio", "threshold")
    lines = [f"{key:12} {mask.metadata[key]}" for key in facts if key in mask.metadata]
    lines += [f"{'made from':12} {mask.fingerprint}", f"{'bits sha256':12} {json_sha256(mask.digests_of_bits())}"]
    lines.append(f"{'selected':12} {mask.k:,} of {mask.total_numel:,} weights in {len(mask.names)} scored parameters")
    by_role: dict[str, list[int]] = {}
    by_layer: dict[int, list[int]] = {}
    units, counts = count_units([mask], ranks)
    for unit, count in zip(units, counts[:, 0].tolist(), strict=True):
        tables = [by_role.setdefault(unit.role, [0, 0])]
        if unit.layer is not None:
            tables.append(by_layer.setdefault(unit.layer, [0, 0]))
        for row in tables:
            row[0] += count
            row[1] += unit.numel
    chance = mask.k / max(sum(unit.numel for unit in units), 1)
    lines += ["", f"{'role':14}{'selected':>14}{'share of mask':>15}{'of the role':>13}{'times chance':>14}"]
    roles = sorted(by_role.items(), key=lambda item: -item[1][0])
    lines += [_share_line(role, count, numel, mask.k, chance) for role, (count, numel) in roles]
    lines += ["", f"{'layer':14}{'selected':>14}{'share of mask':>15}{'of the layer':>13}{'times chance':>14}"]
    layers = sorted(by_layer.items())
    lines += [_share_line(str(layer), count, numel, mask.k, chance) for layer, (count, numel) in layers]
    return lines


def _share_line(label: str, count: int, numel: int, k: int, chance: float) -> str:
    """chance: the share of all scored weights that is selected, and would be of these if the mask were a random one."""
    of_part = count / max(numel, 1)
    times = of_part / chance if chance else 0.0
    return f"{label:14}{count:>14,}{count / max(k, 1):>15.2%}{of_part:>13.3%}{times:>14.2f}"


def bit_problems(mask: Mask, ranks: Ranks) -> list[str]:
    """Every contradiction between the bits and the metadata, in the model's order. Collectives: one gather."""
    order = {name: index for index, name in enumerate(mask.names)}
    gathered = ranks.gather(mask.problems(ranks.rank, ranks.size))
    distinct = dict.fromkeys(line for lines in gathered for line in lines)
    return sorted(distinct, key=lambda line: order.get(line.partition(": ")[0], len(order)))


def load_sound(path: str | Path, ranks: Ranks) -> Mask:
    """A mask whose bits have been checked. Raises UserError where they are damaged. Collectives: one gather."""
    mask = Mask.load(path)
    refuse_problems(mask, bit_problems(mask, ranks))
    return mask


def verify(mask: Mask, scores: Path | None, ranks: Ranks) -> list[str]:
    """Lines about the mask's defects or, if it has none and there are scores, about bits that contradict them.

    Raises UserError where units or scores are not those of the mask, or damaged.
    """
    problems = bit_problems(mask, ranks)
    if not problems:
        problems = unit_problems(mask, ranks)
    return problems or (compare_with_scores(mask, scores, ranks) if scores is not None else [])


def unit_problems(mask: Mask, ranks: Ranks) -> list[str]:
    """With scope ``matrix``, matrices that do not select ⌊ratio · n⌋ of their n weights. Collectives: as of
    ``count_units``."""
    units, counts = count_units([mask], ranks)
    if mask.header.scope == "model":
        return []
    return [
        f"{unit.name}: {count:,} of {unit.numel:,} weights selected, which ratio {mask.header.ratio!r} does not select"
        for unit, count in zip(units, counts[:, 0].tolist(), strict=True)
        if not follows(count, mask.header.ratio, unit.numel, unit.numel)
    ]


def compare_with_scores(mask: Mask, folder: Path, ranks: Ranks) -> list[str]:
    """Select again from the scores on disk, and report every parameter whose bits differ, and a wrong threshold.

    Raises UserError for scores of another model or criterion, and for scores that are negative or not finite.
    """
    scores = ScoreFolder(folder, "--scores")
    scores.check(mask.header)
    selection = Reselection(mask, scores, mask.header, ranks)
    index_of = {name: index for index, name in enumerate(mask.names)}
    wrong = torch.zeros(len(index_of), dtype=torch.int64)
    for name, low, high in spans(mask)[ranks.rank :: ranks.size]:
        wrong[index_of[name]] += int((selection.bits(name, low, high) != mask.bits(name, low, high)).sum())
    problems = [
        f"{name}: {count} bits differ from the selection by its scores"
        for name, count in zip(mask.names, ranks.add(wrong).tolist(), strict=True)
        if count
    ]
    if _float32(selection.threshold) != _float32(mask.header.threshold):
        problems.append(f"threshold is {mask.header.threshold!r}, the scores have {selection.threshold!r}")
    return problems


def _float32(value: float | None) -> float | None:
    """The nearest fp32 number, which scores are: its shortest text is nearest to another number of 64 bits."""
    return None if value is None else float(torch.tensor(value, dtype=torch.float32))


def compare(first: Mask, second: Mask, ranks: Ranks, with_cells: bool = False) -> list[str]:
    """What two masks of one architecture were made from, where that differs, and their overlap: in total, by role, by
    layer, and by cell (layer and role) where those are at most ``MAX_CELLS`` or ``with_cells`` asks for them."""
    if first.shapes != second.shapes:
        raise UserError(
            "mask",
            f"{first.path} and {second.path}",
            "are masks of different models",
            "compare masks whose parameters have the same names and shapes",
        )
    rows: dict[tuple[str, str], list[int]] = {}
    units, counts = count_units([first, second], ranks)
    for unit, counts_of_unit in zip(units, counts.tolist(), strict=True):
        layer = "-" if unit.layer is None else str(unit.layer)
        for key in (("all", ""), ("role", unit.role), ("layer", layer), ("cell", f"{layer} {unit.role}")):
            row = rows.setdefault(key, [0, 0, 0])
            for index, count in enumerate(counts_of_unit):
                row[index] += count
    lines = _made_otherwise(first, second)
    if states_units(first) and states_units(second) and read_units(first) != read_units(second):
        lines.append("the matrices and roles are the first mask's; the second was made with others (model.roles)")
    lines += [f"{'':22}{'first':>12}{'second':>12}{'both':>12}{'of first':>10}{'of second':>10}{'Jaccard':>9}"]
    num_cells = sum(kind == "cell" for kind, _ in rows)
    kinds = ("all", "role", "layer", "cell") if with_cells or num_cells <= MAX_CELLS else ("all", "role", "layer")
    shown = [row for row in rows.items() if row[0][0] in kinds]
    for (kind, label), (a, b, both) in sorted(shown, key=lambda row: (kinds.index(row[0][0]), _natural(row[0][1]))):
        union = a + b - both
        lines.append(
            f"{f'{kind} {label}':22}{a:>12,}{b:>12,}{both:>12,}{both / max(a, 1):>10.2%}"
            f"{both / max(b, 1):>10.2%}{both / max(union, 1):>9.4f}"
        )
    return lines if "cell" in kinds else [*lines, f"--cells also shows the {num_cells} cells (layer and role)"]


def _made_otherwise(first: Mask, second: Mask) -> list[str]:
    """A line on what two masks were made from, where it differs; else none."""
    parts = []
    if first.fingerprint != second.fingerprint:
        parts.append(f"from other weights (fingerprints {first.fingerprint} and {second.fingerprint})")
    pairs = ((key, getattr(first.header, key), getattr(second.header, key)) for key in MADE_BY)
    parts += [f"{key} {one} and {other}" for key, one, other in pairs if one != other]
    return [f"the masks were made differently: {', '.join(parts)}"] if parts else []


def _natural(label: str) -> tuple[int, str]:
    number, _, rest = label.partition(" ")
    return (int(number), rest) if number.isdigit() else (-1, label)


def share(text: str) -> float:
    """Parse an argument in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def seed(text: str) -> int:
    """Parse an argument in the range of ``run.seed``."""
    value = int(text)
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {MAX_SEED}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="esi-ds mask", description=help_text(__doc__))
    commands = parser.add_subparsers(dest="command", required=True)
    describer = commands.add_parser("info", help="describe a mask and where its weights are")
    describer.add_argument("mask", help="folder of the mask")
    checker = commands.add_parser("verify", help="check a mask by itself and against its scores")
    checker.add_argument("mask", help="folder of the mask")
    checker.add_argument("--scores", type=Path, help="folder of the scores: select again and compare every bit")
    overlap = commands.add_parser("compare", help="overlap of two masks, by role and by layer")
    overlap.add_argument(
        "--cells",
        action="store_true",
        help=f"also by layer and role together, even if that takes more than {MAX_CELLS} lines",
    )
    overlap.add_argument("first", help="folder of a mask")
    overlap.add_argument("second", help="folder of the other mask")
    maker = commands.add_parser("select", help="make a mask of another ratio or order from the same scores")
    maker.add_argument("mask", help="folder of any mask selected from the scores")
    maker.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the new mask")
    maker.add_argument("--scores", type=Path, required=True, help="folder of the scores")
    maker.add_argument("--ratio", type=share, required=True, help="share of the weights to select")
    maker.add_argument("--order", choices=("top", "bottom", "random"), default="top", help="which weights (top)")
    maker.add_argument("--seed", type=seed, help="seed of --order random (0)")
    return parser


@clean_output()
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    arguments = make_parser().parse_args(argv)
    ranks = Ranks()
    try:
        ranks = find_ranks()
        lines, code = _run(arguments, ranks)
        if ranks.rank == 0:
            print("\n".join(lines))
        return code
    except ReaderGone:
        raise
    except Exception as error:
        if ranks.reports_error():
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
        ranks.abort()
        return 2 if isinstance(error, UserError) else 1


def _run(arguments: argparse.Namespace, ranks: Ranks) -> tuple[list[str], int]:
    """A command's output and exit code; the same on every rank."""
    if arguments.command == "info":
        return info(load_sound(arguments.mask, ranks), ranks), 0
    if arguments.command == "compare":
        masks = load_sound(arguments.first, ranks), load_sound(arguments.second, ranks)
        return compare(*masks, ranks, arguments.cells), 0
    if arguments.command == "select":
        return _select(arguments, ranks), 0
    defects = verify(Mask.load(arguments.mask), arguments.scores, ranks)
    if defects:
        return defects, 2
    if arguments.scores is None:
        return ["sound"], 0
    is_named = ScoreFolder(arguments.scores).metadata is not None
    return ["sound: exactly the selection by its scores", *([] if is_named else [f"{arguments.scores} {UNNAMED}"])], 0


def _select(arguments: argparse.Namespace, ranks: Ranks) -> list[str]:
    """Write a mask; lines about it."""
    order, seed_argument = arguments.order, arguments.seed
    if seed_argument is not None and order != "random":
        remedy = "add --order random, or leave the seed out"
        raise UserError("--seed", seed_argument, f"has no effect on the order {order}", remedy)
    mask, seed = Mask.load(arguments.mask), seed_argument or 0
    new = write_selection(mask, arguments.scores, arguments.output, arguments.ratio, order, seed, ranks)
    how = f"order {order}" + (f", seed {seed}" if order == "random" else "")
    selected = f"{new.k:,} of {new.total_numel:,} weights in {new.path} ({how})"
    return [selected, *remarks_on(new, arguments.scores, ranks)]


if __name__ == "__main__":
    sys.exit(main())
