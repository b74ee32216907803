"""The attributes that DeepSpeed sets on a parameter under ZeRO-3, behind typed functions.

Imports no deepspeed: ``MaskedAdamW`` needs none in plain PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attributes(tensor: Tensor) -> Any:
    """The tensor without its type, for attributes that torch does not declare."""
    return tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 partitions it: buffers stay whole."""
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, partitioned or not."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def partition_group(tensor: Tensor) -> torch.distributed.ProcessGroup:
    """The ranks that a partitioned parameter is distributed over."""
    return attributes(tensor).ds_process_group


def partition_numel(tensor: Tensor) -> int:
    """Elements of one rank's partition, including padding: the same on every rank of the group."""
    return attributes(tensor).ds_tensor.ds_numel


def partition_bounds(tensor: Tensor) -> tuple[int, int]:
    """[first, last) of this rank's partition in the flat whole parameter, including padding."""
    size = partition_numel(tensor)
    first = torch.distributed.get_rank(partition_group(tensor)) * size
    return first, first + size


def local_range(tensor: Tensor) -> tuple[int, int]:
    """[first, last) of this rank's partition in the flat whole parameter, without padding; both the end if it is empty.

    All of a tensor that is not partitioned.
    """
    numel = math.prod(whole_shape(tensor))
    if not is_partitioned(tensor):
        return 0, numel
    first, last = partition_bounds(tensor)
    return min(first, numel), min(last, numel)
