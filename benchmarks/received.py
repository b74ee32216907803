"""Counts the bytes that collectives bring to this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as distributed


class Received:
    """Bytes that this rank receives in ring collectives, by purpose: gathers, gradients, tokens.

    Wraps the functions of torch.distributed; to be made before DeepSpeed is imported, which keeps references to them.
    """

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(("gathers", "gradients", "tokens"), 0.0)
        self._ranks = distributed.get_world_size
        for name, what, index in (
            ("all_gather_into_tensor", "gathers", 0),
            ("reduce_scatter_tensor", "gradients", 1),
            ("all_to_all_single", "tokens", 0),
            ("all_reduce", "gradients", 0),
        ):
            setattr(distributed, name, self._counted(getattr(distributed, name), name, what, index))

    def _counted(self, function: Callable[..., Any], name: str, what: str, index: int) -> Callable[..., Any]:
        """``function`` with the tensor at ``index`` of its arguments counted as ``what``."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = [*arguments, *keywords.values()]
            # Counts and losses of a few numbers are traffic that the formulas leave out.
            if tensors[index].is_floating_point() and tensors[index].numel() > 64:
                ranks = self._ranks(keywords.get("group"))
                times = 2 if name == "all_reduce" else 1
                self.bytes[what] += times * tensors[index].nbytes * (ranks - 1) / ranks
            return function(*arguments, **keywords)

        return call

    @contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        """Yields a dictionary that holds, once the block has ended, the bytes received in it."""
        before, received = dict(self.bytes), dict[str, float]()
        yield received
        received.update({what: self.bytes[what] - before[what] for what in before})
