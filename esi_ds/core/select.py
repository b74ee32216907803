"""Exact top-k of a score vector that is split over callers, ranks for instance (docs/method.md §2).

The order is total: larger key first, ties by lower global position. The threshold and the cut among its ties are each
found by a radix search over integer keys: count the leading digit of all keys, find the digit that holds the k-th key,
keep only the keys with that digit, repeat. Only counts are shared, never a score: ``reduce`` adds int64 histograms over
ranks (the identity in one process).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from esi_ds.core.noise import random_bits, stream
from esi_ds.core.units import Parameter
from esi_ds.errors import UserError

CHUNK = 1 << 20  # elements processed together: small enough to stay in cache
DIGIT = 11  # bits
KEY_BITS = 31  # a non-negative float32 keyed by its bit pattern
LARGEST_KEY = (1 << KEY_BITS) - 1
INFINITY_BITS = 0x7F800000  # as a float32; NaN has larger ones, and what has a sign has negative ones

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScoreRun:
    """Scores of consecutive weights: float32 1-D, the first at global position ``position``."""

    scores: Tensor
    position: int


@dataclass(frozen=True)
class Cut:
    """What is selected: keys above ``key``, and keys equal to it at positions up to ``position``; ``count`` in all."""

    key: int
    position: int
    count: int

    def selects(self, keys: Tensor, position: int) -> Tensor:
        """bool [n]: which of the int32 ``keys`` [n] at global positions from ``position`` on are selected."""
        if self.count == 0:
            return torch.zeros_like(keys, dtype=torch.bool)
        selected = keys > self.key
        ties = keys == self.key
        num_within = self.position - position + 1  # ties count up to this index of the run
        ties[max(0, min(num_within, len(keys))) :] = False
        return selected | ties


class Order:
    """Integer keys of scores, the larger selected first: ``top``, ``bottom`` or ``random`` (hashed positions).

    device: where keys are made, wherever the scores lie; None: beside them.
    """

    def __init__(self, name: str, seed: int = 0, device: torch.device | None = None):
        self.name, self._device = name, device
        self._stream = stream(seed, 0x5E1EC7)

    def keys(self, scores: Tensor, position: int) -> Tensor:
        """int32 keys in [0, 2^31) of non-negative float32 ``scores`` at global positions from ``position`` on."""
        device = scores.device if self._device is None else self._device
        if self.name == "random":
            positions = torch.arange(position, position + len(scores), device=device)
            return random_bits(self._stream, positions, KEY_BITS).int()
        bits = scores.to(device).view(torch.int32)
        return bits if self.name == "top" else LARGEST_KEY - bits


def first_invalid(scores: Tensor) -> int | None:
    """Index of the first of the float32 ``scores`` that is not finite and ≥ 0 (−0.0 included: its bits have no place
    in the order); None if there is none."""
    bits = scores.view(torch.int32)
    if len(bits) == 0 or (int(bits.min()) >= 0 and int(bits.max()) < INFINITY_BITS):
        return None
    return int(((bits < 0) | (bits >= INFINITY_BITS)).nonzero()[0])


def all_valid(tensors: Iterable[Tensor]) -> bool:
    """Whether every score of some float32 tensors is finite and ≥ 0. All are read at once: a GPU is waited for once."""
    bits = (scores.view(torch.int32) for scores in tensors if len(scores))
    ends = [end for values in bits for end in (values.min(), values.max())]
    if not ends:
        return True
    read = torch.stack(ends)
    return bool(((read >= 0) & (read < INFINITY_BITS)).all())


def _check_scores(runs: Iterable[ScoreRun]) -> None:
    if all_valid(run.scores for run in runs):
        return
    for run in runs:
        index = first_invalid(run.scores)
        if index is not None:
            position = run.position + index
            raise ValueError(f"the score at global position {position} is {float(run.scores[index])}")


def chunks(runs: Iterable[ScoreRun], order: Order) -> Iterator[tuple[Tensor, int]]:
    """(int32 keys, position of the first) of every run, at most CHUNK elements at a time."""
    for run in runs:
        for start in range(0, len(run.scores), CHUNK):
            position = run.position + start
            yield order.keys(run.scores[start : start + CHUNK], position), position


def radix_search(
    keys_of: Sequence[Callable[[], Iterable[Tensor]]], k: Tensor, bits: int, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """The k-th largest key of each group, and the number of larger keys; both int64 [G].

    keys_of: for each of G groups a callable that yields the caller's integer keys in [0, 2^bits), in 1-D tensors.
    k: int64 [G], 1 ≤ k ≤ number of keys in the group over all callers.
    Collectives: ``reduce`` of int64 [G, 2048] once per 11 bits.
    """
    groups = torch.arange(len(keys_of))
    prefix = torch.zeros(len(keys_of), dtype=torch.int64)
    larger = torch.zeros(len(keys_of), dtype=torch.int64)
    shift = bits
    while shift > 0:
        width = min(DIGIT, shift)
        shift -= width
        histogram = torch.zeros(len(keys_of), 1 << width, dtype=torch.int64)
        for group, keys_iterator in enumerate(keys_of):
            for keys in keys_iterator():
                if shift + width < bits:
                    keys = keys[(keys >> (shift + width)) == int(prefix[group])]
                digits = (keys >> shift) & ((1 << width) - 1)
                histogram[group] += torch.bincount(digits, minlength=1 << width).cpu()
        histogram = reduce(histogram)
        at_least = histogram.flip(1).cumsum(1).flip(1) + larger.unsqueeze(1)  # keys with this digit or a higher one
        digit = (at_least >= k.unsqueeze(1)).sum(1) - 1
        larger = at_least[groups, digit] - histogram[groups, digit]
        prefix = (prefix << width) | digit
    return prefix, larger


def select(
    groups: Sequence[Iterable[ScoreRun]], k: Sequence[int], order: Order, last_position: int, reduce: Reduce
) -> list[Cut]:
    """The exact cut of every group.

    groups: the caller's runs of each group, maybe none; each group is iterated several times. k: how many scores to
    select in each, at most as many as the group has over all callers. last_position: the largest global position.
    Collectives: ``reduce`` of histograms only, whose size does not depend on the number of scores. Raises ValueError
    for a score that is not finite and ≥ 0, on the caller that has it: where there are several, let them agree before.
    """
    for runs in groups:
        _check_scores(runs)
    active = [group for group, count in enumerate(k) if count > 0]
    cuts = [Cut(LARGEST_KEY, -1, 0)] * len(groups)
    if not active:
        return cuts
    num_wanted = torch.tensor([k[group] for group in active], dtype=torch.int64)

    def keys_of(group: int) -> Iterator[Tensor]:
        return (keys for keys, _ in chunks(groups[group], order))

    threshold, above = radix_search([partial(keys_of, group) for group in active], num_wanted, KEY_BITS, reduce)

    def tied_positions(index: int) -> Iterator[Tensor]:
        for keys, position in chunks(groups[active[index]], order):
            ties = (keys == int(threshold[index])).nonzero().squeeze(1)
            yield last_position - (ties + position)  # reversed: the lowest position is the largest key

    position_bits = max(1, last_position.bit_length())
    num_ties = num_wanted - above
    tied = [partial(tied_positions, index) for index in range(len(active))]
    reversed_cut, _ = radix_search(tied, num_ties, position_bits, reduce)
    for index, group in enumerate(active):
        cuts[group] = Cut(int(threshold[index]), last_position - int(reversed_cut[index]), k[group])
    return cuts


def median(tensors: Sequence[Tensor], count: int, reduce: Reduce) -> float:
    """The median of non-negative float32 values over all callers; the lower of two middle ones, as in torch.median.

    tensors: the caller's values, 1-D. count: number of values over all callers, at least 1.
    Collectives: ``reduce`` of three histograms of 16 KiB.
    """
    order = Order("top")
    runs = [ScoreRun(values, 0) for values in tensors]
    _check_scores(runs)
    from_above = torch.tensor([count - (count - 1) // 2])
    keys, _ = radix_search([lambda: (keys for keys, _ in chunks(runs, order))], from_above, KEY_BITS, reduce)
    return float(keys.int().view(torch.float32))


def key_to_score(cut: Cut, order: str) -> float | None:
    """The smallest selected score (``top``) or the largest (``bottom``); None for ``random`` or an empty selection."""
    if cut.count == 0 or order == "random":
        return None
    key = cut.key if order == "top" else LARGEST_KEY - cut.key
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def may_lack_scores(order: str, scope: str, threshold: float | None) -> bool:
    """Whether a selection may hold weights whose score is 0, so that their position decides.

    threshold: score of the last weight selected, which scope ``matrix`` does not have.
    """
    return order == "top" and (scope == "matrix" or threshold == 0)


def without_score(criterion: str, num_zero: int, k: int, scope: str) -> str | None:
    """A remark where ``top`` selects weights whose score is 0; None where it does not.

    num_zero: of the ``k`` selected weights, those with a score of 0.
    """
    if num_zero == 0:
        return None
    if scope == "matrix":
        return (
            f"{criterion}: {num_zero:,} of the mask's {k:,} weights have a score of 0; they are the first ones of "
            "matrices with fewer scores above 0 than the ratio asks for"
        )
    return (
        f"{criterion}: only {k - num_zero:,} weights have a score above 0; the other {num_zero:,} of the mask "
        "are the first ones in the model's order"
    )


def model_k(parameters: tuple[Parameter, ...], ratio: float, of: str) -> int:
    """k = ⌊ratio · n⌋, n the number of all weights or of the scored ones; at most the number of scored weights."""
    scored = sum(parameter.numel for parameter in parameters if parameter.scored)
    (base,) = share_sizes(parameters, of, "model")
    return min(int(ratio * base), scored)


def share_sizes(parameters: Iterable[Parameter], of: str, scope: str) -> list[int]:
    """The numbers of weights that a ratio is a share of: one for the whole model, one for each matrix of a scope
    ``matrix``."""
    if scope == "matrix":
        return [unit.numel for parameter in parameters for unit in parameter.units]
    return [sum(parameter.numel for parameter in parameters if parameter.scored or of == "all")]


def check_ratio(ratio: float, sizes: Sequence[int], field: str) -> None:
    """Raise UserError, naming the least ratio, where ⌊ratio · n⌋ is 0 for every n of ``sizes``: nothing is selected."""
    largest = max(sizes, default=0)
    if largest and int(ratio * largest) == 0:
        least = 1 / largest
        while int(least * largest) == 0:  # rounded down
            least = math.nextafter(least, 1.0)
        problem = f"selects nothing: it is less than one of {largest:,} weights"
        raise UserError(field, ratio, problem, f"the smallest ratio is {least!r}")
