"""Exact top-k of a score vector that lies in pieces (docs/method.md §2).

The order is total: higher key first, ties by lower global position. Both steps are one radix search over integer
keys: count the keys' leading digit, find the digit that holds the k-th, look only at keys with that digit, repeat.
Only counts are shared, never a score: ``reduce`` adds int64 histograms over ranks (identity in one process).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esi_ds.core.noise import random_bits, stream
from esi_ds.core.units import Parameter

CHUNK = 1 << 20  # elements looked at together: small enough to stay in cache
DIGIT = 11
KEY_BITS = 31  # a non-negative float32 as its bit pattern
LARGEST_KEY = (1 << KEY_BITS) - 1

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """A contiguous run of scores: ``scores`` float32 1-D, the first at global position ``position``."""

    scores: Tensor
    position: int


@dataclass(frozen=True)
class Cut:
    """What is selected: keys above ``key``, and keys equal to it at positions up to ``position``."""

    key: int
    position: int
    count: int

    def selects(self, keys: Tensor, position: int) -> Tensor:
        """Bool mask for int32 ``keys`` that start at global position ``position``."""
        if self.count == 0:
            return torch.zeros_like(keys, dtype=torch.bool)
        selected = keys > self.key
        ties = keys == self.key
        num_within = self.position - position + 1  # ties count up to this index of the run
        ties[max(0, min(num_within, len(keys))) :] = False
        return selected | ties


class Order:
    """Integer keys of scores, larger = selected first. ``top``, ``bottom`` or ``random`` (hashed positions)."""

    def __init__(self, name: str, seed: int = 0):
        self.name = name
        self._stream = stream(seed, 0x5E1EC7)

    def keys(self, scores: Tensor, position: int) -> Tensor:
        """int32 keys in [0, 2^31) of non-negative float32 ``scores`` that start at global ``position``."""
        if self.name == "random":
            positions = torch.arange(position, position + len(scores), device=scores.device)
            return random_bits(self._stream, positions, KEY_BITS).int()
        bits = scores.view(torch.int32)
        return bits if self.name == "top" else LARGEST_KEY - bits


def chunks(pieces: Iterable[Piece], order: Order) -> Iterator[tuple[Tensor, int]]:
    """(keys, first position) of every piece, at most CHUNK elements at a time."""
    for piece in pieces:
        for start in range(0, len(piece.scores), CHUNK):
            position = piece.position + start
            yield order.keys(piece.scores[start : start + CHUNK], position), position


def radix_search(keys_of: Sequence[Callable[[], Iterable[Tensor]]], k: Tensor, bits: int, reduce: Reduce):
    """The k-th largest key of each group, and how many keys are larger than it.

    keys_of: for each of G groups a callable that yields its integer keys in [0, 2^bits), piece by piece.
    k: int64 [G], 1 ≤ k ≤ number of keys in the group. Returns (int64 [G], int64 [G]).
    Communication: ``reduce`` of int64 [G, 2048] once per 11 bits.
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


def select(groups: Sequence[Sequence[Piece]], k: Sequence[int], order: Order, last_position: int, reduce: Reduce):
    """The exact cut of every group: one ``Cut`` each.

    groups: this caller's pieces of each group (may be empty lists); k: how many to select in each, at most as many
    as the group has over all callers; last_position: the largest global position there is.
    Communication: histograms only, independent of the number of scores.
    """
    active = [group for group, count in enumerate(k) if count > 0]
    cuts = [Cut(LARGEST_KEY, -1, 0)] * len(groups)
    if not active:
        return cuts
    wanted = torch.tensor([k[group] for group in active], dtype=torch.int64)

    def keys_of(group: int) -> Iterator[Tensor]:
        return (keys for keys, _ in chunks(groups[group], order))

    threshold, above = radix_search([lambda g=g: keys_of(g) for g in active], wanted, KEY_BITS, reduce)

    def tied_positions(index: int) -> Iterator[Tensor]:
        for keys, position in chunks(groups[active[index]], order):
            ties = (keys == int(threshold[index])).nonzero().squeeze(1)
            yield last_position - (ties + position)  # reversed: the earliest position is the largest key

    position_bits = max(1, last_position.bit_length())
    needed = wanted - above
    reversed_cut, _ = radix_search(
        [lambda i=i: tied_positions(i) for i in range(len(active))], needed, position_bits, reduce
    )
    for index, group in enumerate(active):
        cuts[group] = Cut(int(threshold[index]), last_position - int(reversed_cut[index]), k[group])
    return cuts


def median(pieces: Sequence[Tensor], count: int, reduce: Reduce) -> float:
    """The median of non-negative float32 values that lie in pieces, as torch.median's: the lower of two middle ones.

    pieces: this caller's values, 1-D; count: how many there are over all callers, at least one.
    Communication: three histograms of 16 KiB, independent of the number of values.
    """
    order = Order("top")
    values = [Piece(piece, 0) for piece in pieces]
    from_above = torch.tensor([count - (count - 1) // 2])
    keys, _ = radix_search([lambda: (keys for keys, _ in chunks(values, order))], from_above, KEY_BITS, reduce)
    return float(keys.int().view(torch.float32))


def key_to_score(cut: Cut, order: str) -> float | None:
    """The threshold as a score: the smallest selected (``top``) or the largest selected (``bottom``)."""
    if cut.count == 0 or order == "random":
        return None
    key = cut.key if order == "top" else LARGEST_KEY - cut.key
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def model_k(parameters: tuple[Parameter, ...], ratio: float, of: str) -> int:
    """k = ⌊ratio · weights⌋, of all weights or of the scored ones; never more than are scored."""
    scored = sum(parameter.numel for parameter in parameters if parameter.scored)
    base = scored if of == "scored" else sum(parameter.numel for parameter in parameters)
    return min(int(ratio * base), scored)
