"""Batches of token sequences of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TokenRows = Sequence[Sequence[int]]


def cut_by_length(lengths: Mapping[int, int], size: int, longest: int | None) -> list[list[int]]:
    """Numbers of rows in the order of ``lengths``, cut into batches of ``size``.

    lengths: number → tokens. longest: rows that are longer come last, each alone; None: none is.
    """
    together = [number for number in lengths if longest is None or lengths[number] <= longest]
    batches = [together[start : start + size] for start in range(0, len(together), size)]
    return batches + [[number] for number in lengths if longest is not None and lengths[number] > longest]


def right_pad(rows: TokenRows, pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [B, L], with every row aligned to the left edge.

    For everything but generation: a causal model's row does not depend on what stands to its right, whether the model
    heeds the mask or not, and its positions are those that the model counts for the row alone.
    """
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
    }


def left_pad(rows: TokenRows, pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [B, L], with every row aligned to the right edge, where generation goes on.

    ``generate`` derives positions from the mask. Not every architecture heeds the mask (``models/rows.py``).
    """
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
    }
