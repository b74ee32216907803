"""From the guard's tokens of a response back to the model's, by character offsets (docs/method.md §1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int]


def alignment_weights(
    model_spans: Sequence[Span], guard_spans: Sequence[Span], shown: Span, has_text: Sequence[bool]
) -> Tensor:
    """w [T, J] float32: w[t, j] = |span(t) ∩ span(j)| / |span(j)|.

    Spans are character ranges in the response's text; the model's are disjoint, the guard's may stick out of it.
    ``shown``: the part of the response that the guard's text holds. Tokens t whose ``has_text[t]`` is False, and guard
    tokens of zero length, get weight 0.
    """
    model = torch.tensor(model_spans, dtype=torch.float32).reshape(-1, 2).clamp(*shown)
    guard = torch.tensor(guard_spans, dtype=torch.float32).reshape(-1, 2)
    overlap = torch.minimum(model[:, None, 1], guard[None, :, 1]) - torch.maximum(model[:, None, 0], guard[None, :, 0])
    length = guard[:, 1] - guard[:, 0]
    weights = overlap.clamp(min=0) / length.clamp(min=1)
    return weights * torch.tensor(has_text, dtype=torch.float32).unsqueeze(1)
