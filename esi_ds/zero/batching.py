"""How many rows a sharded model reads at once: as many as fit, and only rows that do not change each other's results,
which the model itself is asked (``models/rows.py``)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from esi_ds.core.batch import TokenRows, right_pad
from esi_ds.core.batch_size import rows_that_fit
from esi_ds.errors import UserError
from esi_ds.judge.embeddings import embedding_module
from esi_ds.models.rows import (
    PROBE_LENGTH,
    Difference,
    ahead_note,
    alike_up_to,
    beside_note,
    difference_ahead,
    difference_beside,
    frequencies_note,
    last_logits,
)
from esi_ds.reading import first_line
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.memory import tightest_free_bytes


def of_all_ranks(difference: Difference) -> Difference:
    """The largest of the ranks' differences. One all-reduce."""
    (distance,) = runtime.all_reduce_max(torch.tensor([difference.distance], dtype=torch.float64)).tolist()
    return difference._replace(distance=distance)


def reason_of_all_ranks(reason: str | None) -> str | None:
    """Why rows are read alone, on every rank if any has a reason; None without one. One all-reduce."""
    if not runtime.any_rank(reason is not None):
        return None
    return reason or "another rank found that a row's logits depend on the rows beside it"


def lookahead(model: ShardedModel, ids: Sequence[int], pad: int) -> Difference:
    """How much the logits of earlier tokens change with what follows: a causal model's do not.

    ids: any text's. Collectives: those of three forward passes, and an all-reduce.
    """
    return of_all_ranks(difference_ahead(lambda rows: _logits(model, rows, pad), ids))


def check_causal(model: ShardedModel, ids: Sequence[int], pad: int) -> None:
    """Raise UserError, on every rank, unless the model is causal: a response that is read in one pass would be known
    before it is predicted. Collectives: those of ``lookahead``."""
    ahead = lookahead(model, ids, pad)
    if not ahead.is_rounding:
        raise UserError(
            "model.path",
            model.module.name_or_path,
            f"is not a causal model: {ahead_note(ahead)}",
            "use a causal language model; an encoder needs is_decoder: true in its config.json",
        )


def check_gradient(model: ShardedModel, ids: Sequence[int]) -> None:
    """Raise UserError, on every rank, unless a backward pass reaches the model's embeddings: some architectures run
    forward only, or backward only in training (Reformer), which would show after hours of generation.

    ids: any text's. No parameter gets a gradient. A model that does not say which module looks up its embeddings is not
    asked. Collectives: those of a forward and a backward pass, and an all-reduce.
    """
    try:
        problem = _backward_problem(model, ids[:PROBE_LENGTH])
    except Exception as error:  # whatever an architecture raises is the reason
        problem = f"cannot be differentiated ({type(error).__name__}: {first_line(error)})"
    model.release()
    if runtime.any_rank(problem is not None):
        problem = problem or "cannot be differentiated on another rank"
        remedy = "use a model whose gradient can be taken without training it, dropout off"
        raise UserError("model.path", model.module.name_or_path, problem, remedy)


def _backward_problem(model: ShardedModel, ids: Sequence[int]) -> str | None:
    """Why the model has no gradient; None where it has. Raises what the architecture raises. Collectives: those of
    ``check_gradient``, without its all-reduce."""
    try:
        embedding = embedding_module(model.module)
    except UserError:
        return None
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some scale in place what they are given, which a leaf does not allow

    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    hook = embedding.register_forward_hook(make_leaf)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with _without_expert_hooks(model.module):
            logits = last_logits(model.module, right_pad([list(ids)], 0, runtime.device()), len(ids))
            if logits.requires_grad:
                logits.float().square().sum().backward()
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    is_reached = any(leaf.grad is not None for leaf in leaves)
    return None if is_reached or not leaves else "has no gradient: none reaches its embeddings"


@contextmanager
def _without_expert_hooks(module: nn.Module) -> Iterator[None]:
    """Within the context, expert blocks (DeepSpeed's leaf modules) have no backward hooks, from the forward pass on.

    With an optimizer ZeRO-3's own put zeros into its buckets for the experts of every backward pass, also where no
    parameter has a gradient, and the next one would find them there.
    """
    hooks = {block: block._backward_hooks for block in module.modules() if z3_leaf_module(block)}
    for block in hooks:
        block._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for block, kept in hooks.items():
            block._backward_hooks = kept


def batch_size_for(
    model: ShardedModel, ids: Sequence[int], pad: int, batch_size: int, longest: int
) -> tuple[int, str | None]:
    """``batch_size`` and None, or 1 and the reason where a row's logits depend on the rows beside it (experts with a
    capacity, rotary frequencies that the longest row chooses).

    ids: any text's. longest: tokens of the longest row, the same on every rank. Collectives: those of two forward
    passes, and an all-reduce; none for single rows, or where ``longest`` decides.
    """
    limit = alike_up_to(model.module.config)
    if batch_size == 1:
        return 1, None
    if limit is not None and longest > limit:
        return 1, frequencies_note(limit)
    beside = of_all_ranks(difference_beside(lambda rows: _logits(model, rows, pad), ids))
    return (batch_size, None) if beside.is_rounding else (1, beside_note(beside))


def fitting_rows(row: float, fixed: float) -> int:
    """Rows of ``row`` bytes that fit into the memory that is free now on the tightest rank, beside ``fixed`` bytes.

    One all-reduce.
    """
    return rows_that_fit(tightest_free_bytes(), row, fixed)


@torch.no_grad()
def _logits(model: ShardedModel, rows: TokenRows, pad: int) -> list[Tensor]:
    """Logits [length, V] of every row, by right padding. Collectives: those of a forward pass."""
    batch = right_pad(rows, pad, runtime.device())
    logits = last_logits(model.module, batch, batch["input_ids"].shape[1])
    model.release()
    return [values[: len(row)] for values, row in zip(logits, rows, strict=True)]
