"""Memory of this rank: what is free, and giving it back when a model is no longer needed (docs/zero3.md §13)."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from esi_ds import host_memory
from esi_ds.zero import runtime


def free_memory_bytes() -> int:
    """Free bytes for this rank: of the GPU, or its share of what the host still has for the job.

    Blocks that PyTorch has cached are free: it allocates from them, though the driver counts them as used.
    """
    if runtime.device().type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return host_memory.available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size()))


def tightest_free_bytes() -> int:
    """``free_memory_bytes`` of the rank that has the least. One all-reduce."""
    free = torch.tensor([-float(free_memory_bytes())], dtype=torch.float64)
    return int(-runtime.all_reduce_max(free).item())


def free(held: object, kept: Collection[int] = ()) -> None:
    """Free the storage of every tensor in nested containers, and of its gradient, whatever else refers to it.

    kept: addresses of storages that stay.
    """
    if isinstance(held, Tensor):
        for tensor in (held, held.grad if held.is_leaf else None):
            if tensor is None or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in kept:
                continue
            if storage.resizable():
                storage.resize_(0)
            else:  # numpy has seen it: it goes with the last tensor that refers to it
                tensor.data = tensor.detach().new_empty(0)
    elif isinstance(held, (Mapping, list, tuple, set)):
        for item in held.values() if isinstance(held, Mapping) else held:
            free(item, kept)


def collect() -> None:
    """Free objects that refer to each other, and give PyTorch's cached blocks back to the device."""
    from deepspeed.accelerator import get_accelerator

    gc.collect()
    get_accelerator().empty_cache()
