"""Random numbers that depend on what they are used for, not on when they are drawn.

A counter-based hash (the finalizer of splitmix64, Steele et al. 2014) gives every (seed, position) a number of its
own, so batch size, world size and order of evaluation do not matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esi_ds.core.portable import cos, log

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
CPU_CHUNK, GPU_CHUNK = 1 << 14, 1 << 22  # float64 numbers at a time: what a core's cache holds; what fills a GPU
FACTORS = ((30, -4658895280553007687), (27, -7723592293110705685))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _logical_shift(values: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros; torch's ``>>`` on int64 fills with the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 with wrapping arithmetic; int64 of the same shape."""
    for shift, factor in FACTORS:
        values = (values ^ _logical_shift(values, shift)) * factor
    return values ^ _logical_shift(values, 31)


def stream(*key: int) -> int:
    """The 64-bit stream number of a tuple of integers (seed, prompt index, ...)."""
    state = torch.zeros((), dtype=torch.int64)
    for part in key:
        state = mix((state + GOLDEN) ^ part)
    return int(state)


def random_bits(key: int, counters: Tensor, bits: int) -> Tensor:
    """Uniform int64 in [0, 2**bits), bits ≤ 63, one for each of the int64 ``counters``, under stream ``key``."""
    return _logical_shift(mix((counters + 1) * GOLDEN + key), 64 - bits)


def gumbel(key: int | Tensor, rows: Tensor, num_columns: int) -> Tensor:
    """Gumbel(0, 1) noise, float32 [len(rows), num_columns]; a row's noise depends only on ``key`` and its number.

    rows: int64 row numbers. key: of all rows, or int64 [len(rows)].
    """
    columns = torch.arange(num_columns, device=rows.device)
    keys = mix((rows + 1) * GOLDEN + key)
    uniform = (random_bits(0, mix(keys.unsqueeze(1) + columns * GOLDEN), 53).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log().float()


def normal(key: int, positions: Tensor) -> Tensor:
    """N(0, 1) noise, float32 [n], of int64 ``positions`` [n]; a position's noise depends only on it and ``key``.

    Box and Muller (1958), in float64, with the same bits on every device. The largest possible value, about 8.6, occurs
    once in 2^53 positions.
    """
    noise = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    size = CPU_CHUNK if positions.device.type == "cpu" else GPU_CHUNK
    streams = [stream(key, which) for which in (1, 2)]
    for part, chunk in zip(noise.split(size), positions.split(size), strict=True):
        first, second = ((random_bits(bits, chunk, 53).double() + 0.5) * 2.0**-53 for bits in streams)
        part.copy_((log(first) * -2.0).sqrt() * cos(second * (2.0 * math.pi)))
    return noise
