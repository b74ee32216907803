"""The Kullback-Leibler divergence of two models' next-token distributions (Kullback and Leibler 1951)."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # logits of each model that are float64 at once, 32 MiB: bounds the temporaries


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(P ‖ Q) at every position, nats, float64 [T]: P the softmax of ``reference``, Q that of ``other``, both [T, V].

    Over the whole vocabulary, in float64, some positions at a time. A token of which P is 0 adds nothing; where Q is 0
    and P is not, the divergence is infinite. Raises ValueError for logits of different shapes.
    """
    if reference.shape != other.shape:
        raise ValueError(f"logits {list(reference.shape)} and {list(other.shape)} have no divergence")
    divergences = torch.zeros(len(reference), dtype=torch.float64)
    step = max(1, CHUNK // reference.shape[1])
    for first in range(0, len(reference), step):
        part = slice(first, first + step)
        log_p, log_q = (logits[part].double().log_softmax(-1) for logits in (reference, other))
        terms = (log_p - log_q).mul_(log_p.exp())
        divergences[part] = terms.masked_fill_(log_p == -torch.inf, 0.0).sum(-1).clamp_(min=0.0).cpu()
    return divergences
