"""How many rows a sharded model reads at once outside generation; the model itself is asked (``models/rows.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esi_ds.core.batch import Rows, right_pad
from esi_ds.errors import UserError
from esi_ds.models.rows import depends_on_neighbours, is_causal, last_logits
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel


def reads_causally(model: ShardedModel, ids: Sequence[int], pad: int) -> bool:
    """Whether the logits of earlier tokens are the same whatever follows.

    ids: any text's. Collectives: those of three forward passes, and an all-reduce.
    """
    return not runtime.any_rank(not is_causal(lambda rows: _logits(model, rows, pad), ids))


def check_causal(model: ShardedModel, ids: Sequence[int], pad: int) -> None:
    """Raise UserError, on every rank, unless the model ``reads_causally``: a response that is read in one pass would be
    known before it is predicted. Collectives: those of ``reads_causally``."""
    if not reads_causally(model, ids, pad):
        raise UserError(
            "model.path",
            model.module.name_or_path,
            "is not a causal model: its logits of earlier tokens depend on later ones",
            "use a causal language model; an encoder needs is_decoder: true in its config.json",
        )


def batch_size_for(model: ShardedModel, ids: Sequence[int], pad: int, batch_size: int) -> int:
    """``batch_size``, or 1 where a row's logits depend on the rows beside it (experts with a capacity).

    ids: any text's. Collectives: those of two forward passes, and an all-reduce; none for single rows.
    """
    if batch_size == 1:
        return 1
    depends = depends_on_neighbours(lambda rows: _logits(model, rows, pad), ids)
    return 1 if runtime.any_rank(depends) else batch_size


@torch.no_grad()
def _logits(model: ShardedModel, rows: Rows, pad: int) -> list[Tensor]:
    """Logits [length, V] of every row, by right padding. Collectives: those of a forward pass."""
    batch = right_pad(rows, pad, runtime.device())
    logits = last_logits(model.module, batch, batch["input_ids"].shape[1])
    model.release()
    return [values[: len(row)] for values, row in zip(logits, rows, strict=True)]
