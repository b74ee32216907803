"""The differentiable stand-in for a judged response (docs/method.md §1, "the gradient through discrete text").

For one prompt, logits ℓ [T, V] and contraction c = A ũ [T, V] give L = Σ_t Σ_v p_t(v) c_t(v). Its gradient with
respect to ℓ has a closed form, from which the backward pass starts, so no autograd graph over [T, V] is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from esi_ds.core.noise import gumbel, stream

UNSAMPLED_LOGIT = -17.0  # the paper's code sets the guard's pre-softmax logits to 0 (sampled) and −17 (others)


def softmax_surrogate(
    logits: Tensor, contraction: Tensor, temperature: float, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Value [T] and gradient [T, V] of Σ_v softmax((ℓ + g)/τ)(v) · c(v); all float32."""
    shifted = logits if noise is None else logits + noise
    probability = torch.softmax(shifted / temperature, dim=-1)
    value = (probability * contraction).sum(-1)
    return value, probability * (contraction - value.unsqueeze(-1)) / temperature


def paper_code_surrogate(logits: Tensor, contraction: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Value [T] and gradient [T, V] of Σ_v z'(v) · ℓ(v), z' = ∂J/∂z at guard logits z = 0 (sampled), −17 (others).

    With q = softmax(z): z'(v) = q(v)·(c(v) − ⟨q, c⟩). The sampled token's entry would be the difference of two nearly
    equal numbers, so it is computed as minus the sum of the others. Computed in float64; both results are float32.
    """
    centred = (contraction - contraction.gather(-1, sampled.unsqueeze(-1))).double()
    num_others = logits.shape[-1] - 1
    other = torch.tensor(UNSAMPLED_LOGIT, dtype=torch.float64).exp()
    normaliser = 1 + num_others * other
    q_other = other / normaliser
    mean = q_other * centred.sum(-1, keepdim=True)  # ⟨q, c⟩ − c(sampled): the sampled entry of `centred` is 0
    gradient = q_other * (centred - mean)
    gradient.scatter_(-1, sampled.unsqueeze(-1), -mean / normaliser)
    gradient = gradient.float()
    return (gradient * logits).sum(-1), gradient


def score_function_surrogate(logits: Tensor, sampled: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """Value [T] and gradient [T, V] of (J − b) · log p(y_t), p = softmax(ℓ), ``advantage`` = J − b; all float32."""
    log_probability = torch.log_softmax(logits, dim=-1)
    gradient = log_probability.exp().neg_().scatter_add_(-1, sampled.unsqueeze(-1), torch.ones_like(logits[:, :1]))
    return advantage * log_probability.gather(-1, sampled.unsqueeze(-1)).squeeze(-1), advantage * gradient


def advantages(scores: Mapping[int, float]) -> dict[int, float]:
    """J − b of every prompt, where b is the mean score of the other prompts (leave-one-out baseline, Kool et al. 2019).

    b does not depend on the prompt's response, which keeps the estimate unbiased. b = 0 for a single prompt.
    """
    total, num_others = math.fsum(scores.values()), len(scores) - 1
    return {index: score - (total - score) / max(num_others, 1) for index, score in scores.items()}


def estimate(
    estimator: str,
    logits: Tensor,
    contraction: Tensor,
    sampled: Tensor,
    *,
    temperature: float,
    samples: int,
    seed: int,
    prompt_index: int,
) -> tuple[Tensor, Tensor]:
    """Value (scalar) and gradient [T, V] of one prompt's surrogate; float32.

    estimator: ``soft`` (no noise), ``gumbel`` (mean over ``samples`` draws keyed by seed, prompt, token and draw) or
    ``paper_code``. logits, contraction: float32 [T, V]. sampled: int64 [T], the response's tokens.
    """
    if estimator == "paper_code":
        value, gradient = paper_code_surrogate(logits, contraction, sampled)
        return value.sum(), gradient
    if estimator == "soft":
        value, gradient = softmax_surrogate(logits, contraction, temperature)
        return value.sum(), gradient
    total, mean_gradient = logits.new_zeros(()), torch.zeros_like(logits)
    tokens = torch.arange(len(logits), device=logits.device)
    for draw in range(samples):
        noise = gumbel(stream(seed, prompt_index, draw), tokens, logits.shape[-1])
        value, gradient = softmax_surrogate(logits, contraction, temperature, noise)
        total += value.sum() / samples
        mean_gradient += gradient / samples
    return total, mean_gradient
