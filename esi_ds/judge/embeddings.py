"""The embeddings of a judge's tokens: as leaves of a forward pass, and as a table of all tokens (docs/method.md §1).

A judge is fed ids, because its forward pass may do more with them than look up rows (Gemma 3n looks them up again for
every layer). The gradient is taken where the embedding module's output enters the model, and what a token is worth is
what that module gives for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esi_ds.errors import UserError


@dataclass
class Lookups:
    """Outputs of the embedding module in one forward pass, leaves of its graph.

    tokens: for the ids of the batch; more than one where the model looks them up again. others: for anything else.
    """

    tokens: list[Tensor] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)


def embedding_module(model: PreTrainedModel) -> nn.Module:
    """The module that looks up token embeddings. Raises UserError where the model does not say which it is."""
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # transformers' default, and models with their own code
        module = None
    if not isinstance(module, nn.Module):
        raise _refusal(model, "does not say which module looks up its embeddings")
    return module


@contextmanager
def recorded_lookups(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[Lookups]:
    """Forward passes of ``model`` on ``batch`` (with int64 ``input_ids`` [B, L]) inside the block read their token
    embeddings from leaves that require a gradient.

    Lookups of the batch's other entries stay as they are: GPT-2 embeds ``token_type_ids`` by the same table.
    """
    lookups = Lookups()
    ids = batch["input_ids"]
    others = [values for name, values in batch.items() if name != "input_ids"]

    def make_leaf(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        inputs = [value for value in (*positional, *named.values()) if isinstance(value, Tensor)]
        is_tokens = any(_holds(value, ids) for value in inputs)
        if not is_tokens and any(_holds(value, other) for value in inputs for other in others):
            return output
        leaf = output.detach().requires_grad_()
        (lookups.tokens if is_tokens else lookups.others).append(leaf)
        return leaf.clone()  # CTRL scales what it is given in place, which a leaf does not allow

    # A hook is called after those that were there before it, ZeRO's too, and sees what the model will read.
    hook = embedding_module(model).register_forward_hook(make_leaf, with_kwargs=True)
    try:
        yield lookups
    finally:
        hook.remove()


def _holds(value: Tensor, ids: Tensor) -> bool:
    """Whether ``value`` is ``ids`` in some shape."""
    return value.numel() == ids.numel() and torch.equal(value.reshape(ids.shape).to(ids.dtype), ids)


def token_gradient(model: PreTrainedModel, score: Tensor, lookups: Lookups, ids: Tensor) -> Tensor:
    """∂score/∂e [B, L, d] at the embeddings e of ``ids`` [B, L], summed over a token's lookups.

    Frees the graph. Raises UserError where the score does not depend on the embedding module through these ids alone.
    """
    leaves = [*lookups.tokens, *lookups.others]
    if not lookups.tokens or not score.requires_grad:
        raise _refusal(model, "does not read its tokens through its embedding module")
    gradients = torch.autograd.grad(score, leaves, allow_unused=True)
    tokens, others = gradients[: len(lookups.tokens)], gradients[len(lookups.tokens) :]
    if any(gradient is not None and bool(gradient.any()) for gradient in others):
        raise _refusal(model, "looks up other ids than its tokens in its embedding module")
    used = [gradient for gradient in tokens if gradient is not None]
    if not used:
        raise _refusal(model, "does not read its tokens through its embedding module")
    return torch.stack([gradient.reshape(*ids.shape, -1) for gradient in used]).sum(0)


def token_table(model: PreTrainedModel) -> Tensor:
    """[rows, d]: what the embedding module, whose parameters must be whole, gives for each token by itself.

    A view of its weight where it does nothing but look up rows. Raises UserError where it cannot be called with ids.
    """
    module = embedding_module(model)
    if type(module) is nn.Embedding and module.max_norm is None:
        return module.weight.detach()
    rows = getattr(module, "num_embeddings", None) or model.config.get_text_config().vocab_size
    ids = torch.arange(rows, device=next(module.parameters()).device).unsqueeze(1)
    try:
        # Not module(ids): under ZeRO-3 its hooks would count a call that the forward pass does not make.
        with torch.no_grad():
            table = module.forward(ids)
    except (TypeError, ValueError, RuntimeError) as error:  # a module of the judge's own code may raise anything
        raise _refusal(model, f"has an embedding module that does not take ids alone ({error})") from error
    return table.reshape(rows, -1)


def _refusal(model: PreTrainedModel, problem: str) -> UserError:
    return UserError(
        "judge.path",
        model.name_or_path,
        f"{problem}, so that it has no gradient per token",
        "use another judge, or esi.estimator: score_function, which needs only the judge's scores",
    )
