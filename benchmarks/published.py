"""ESI as the paper's public code computes it (docs/method.md §6): one process, one prompt at a time, plain torch.

For comparison with this project's scoring pass, of which it uses nothing. Written from docs/method.md: the guard reads
the response alone; J is the logit of its safe verdict; J's gradient is taken with respect to pre-softmax logits over
the guard's whole vocabulary, 0 at the tokens of the response and -17 elsewhere (docs/method.md §1, ``paper_code``); it
goes through the model as a gradient of the model's logits, so both have one vocabulary; and the gradients of all
weights of the model are summed in the model's dtype. That code also draws one sample of Gumbel noise, whose place
docs/method.md does not say: it is left out here, as in ``paper_code``.

Shapes: T tokens of the response, V of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

UNSAMPLED_LOGIT = -17.0


@dataclass(frozen=True)
class Row:
    """Ids of one prompt and its response, and of what the guard reads before and after the response.

    safe: the guard's verdict whose logit is J, read after the last id.
    """

    prompt: list[int]
    response: list[int]
    before: list[int]
    after: list[int]
    safe: int


def judge_gradient(guard: PreTrainedModel, row: Row) -> Tensor:
    """∂J/∂z [T, V] in the guard's dtype, z being the pre-softmax logits of the response's tokens."""
    table = guard.get_input_embeddings().weight.detach()
    ids = torch.tensor(row.response, device=table.device).unsqueeze(1)
    z = torch.full((len(ids), len(table)), UNSAMPLED_LOGIT, dtype=table.dtype, device=table.device)
    z = z.scatter(1, ids, 0.0).requires_grad_()
    embeddings = torch.cat([table[row.before], z.softmax(-1) @ table, table[row.after]])
    logits = guard(inputs_embeds=embeddings.unsqueeze(0), use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, -1, row.safe], z)
    return gradient


def add_gradient(model: PreTrainedModel, guard: PreTrainedModel, row: Row) -> None:
    """Add one prompt's gradient to ``grad`` of all weights of the model, in the model's dtype."""
    gradient = judge_gradient(guard, row)
    ids = torch.tensor([row.prompt + row.response], device=gradient.device)
    # The logits at a position predict the next one.
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
    logits.backward(gradient.to(logits.dtype))


def scored_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of linear layers by name, in the model's order; a head that is tied to the embeddings is none."""
    embeddings = model.get_input_embeddings().weight
    linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module.weight for name, module in linear.items() if module.weight is not embeddings}


def scores(model: PreTrainedModel, num_rows: int) -> dict[str, Tensor]:
    """|σ · ∇S| of the scored weights, float32 in their shapes, from the gradients of ``num_rows`` rows.

    σ: unbiased standard deviation of the weight's matrix.
    """
    return {
        name: (weight.detach().float().std() * weight.grad.float() / num_rows).abs()
        for name, weight in scored_weights(model).items()
    }


def selected(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k highest of all scores, as bool masks in the shapes of the weights."""
    flat = torch.cat([values.flatten() for values in scores.values()])
    bits = torch.zeros_like(flat, dtype=torch.bool)
    bits[flat.topk(k).indices] = True
    parts = bits.split([values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for part, (name, values) in zip(parts, scores.items(), strict=True)}
