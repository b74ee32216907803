"""How many rows fit into memory, from the widths of an architecture alone: what ``auto`` batch sizes are made of.

The formulas (docs/scaling.md) err on the side of fewer rows. Nothing here allocates a tensor or communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

from esi_ds.core.footprint import FP32

MOST_ROWS = 64
WHOLE_SHARE = 0.8  # of the free memory that the whole model may take during generation
USABLE = 0.8  # share of the free memory; the rest is for fragments, workspaces and what the formulas leave out
# Values that autograd keeps for each token and layer, in units of the width: norms keep their input and its fp32 copy,
# attention its inputs, queries and output, the residual stream its sums; the MLP gate, up, activation and product. Each
# further expert of a token keeps its own copy of the input, and its output.
KEPT_HIDDEN, KEPT_INNER, KEPT_EXPERT = 16, 5, 3
LOGIT_COPIES = 5  # fp32 copies of one row's logits while its surrogate is computed


@dataclass(frozen=True)
class Widths:
    """layers: number. hidden: width of a token. inner: width of the MLP, or of all experts that a token reaches.
    cache: keys and values of a token in one layer. vocabulary: number of logits. written_heads: heads of attention that
    writes out its matrices, [length, length] of each head; 0 where a kernel keeps them to itself. experts: that a token
    reaches; 1 in a dense model."""

    layers: int
    hidden: int
    inner: int
    cache: int
    vocabulary: int
    written_heads: int = 0
    experts: int = 1

    @property
    def mlp(self) -> int:
        """Values of a token in the MLP of one layer."""
        return KEPT_INNER * self.inner + KEPT_EXPERT * (self.experts - 1) * self.hidden


def generation_bytes(widths: Widths, weight: int, prompt: int, new: int) -> int:
    """Bytes of one row: the cache of all its tokens, one layer's activations on the prompt, and the logits in fp32.

    weight: bytes of a value in the model's precision. prompt, new: tokens.
    """
    tokens = prompt + new
    cache = weight * widths.layers * widths.cache * tokens
    grown = weight * widths.cache * tokens  # of the layer whose cache is being copied to a longer one
    layer = (weight * widths.mlp + FP32 * 2 * widths.hidden) * prompt
    layer += attention_bytes(widths, weight, prompt)
    return cache + grown + layer + 2 * (weight + FP32) * widths.vocabulary


def scoring_bytes(widths: Widths, weight: int, tokens: int, learnt: int, recompute: bool) -> int:
    """Bytes of one row in a forward and backward pass: what autograd keeps, and logits with their gradient.

    tokens: of the row. learnt: how many of its last tokens have logits. recompute: whether activations are recomputed.
    """
    layer = weight * (KEPT_HIDDEN * widths.hidden + widths.mlp + widths.cache) * tokens
    layer += attention_bytes(widths, weight, tokens)
    kept = weight * widths.layers * widths.hidden * tokens + layer if recompute else widths.layers * layer
    return kept + 2 * weight * widths.vocabulary * learnt


def attention_bytes(widths: Widths, weight: int, tokens: int) -> int:
    """Bytes of one row and layer: attention's matrices before the softmax, after it in fp32, and after it again, where
    they are written out. Both passes need all three; autograd keeps the last two."""
    return (2 * weight + FP32) * widths.written_heads * tokens**2


def surrogate_bytes(widths: Widths, learnt: int) -> int:
    """Bytes of the whole batch, whose rows take turns: the fp32 copies of one row's logits."""
    return LOGIT_COPIES * FP32 * widths.vocabulary * learnt


def rows_that_fit(free: float, row: float, fixed: float = 0.0) -> int:
    """The largest power of two, at most ``MOST_ROWS``, of rows that fit into the usable part of ``free`` bytes beside
    ``fixed``; 1 where not even one fits. A power of two seldom changes with the few bytes by which ranks and starts
    differ."""
    room, rows = USABLE * free - fixed, MOST_ROWS
    while rows > 1 and rows * row > room:
        rows //= 2
    return rows
