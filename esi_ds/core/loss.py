"""The tuning loss of single rows (docs/method.md §2, §3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that is not learnt, as in transformers


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of each row's learnt tokens, float32 [B].

    logits: [B, K, V], of the last K positions. labels: int64 [B, K], the token that follows each, or IGNORED.
    """
    learnt = labels != IGNORED
    each = F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="none")
    return torch.zeros(labels.shape, dtype=torch.float32, device=logits.device).masked_scatter(learnt, each).sum(1)
