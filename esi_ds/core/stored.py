"""Values of tensors that lie in safetensors files, read by ranges of elements: no other byte of a file is read."""

from __future__ import annotations

from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from esi_ds.tensor_files import StoredTensor

# safetensors' name of a dtype → torch's, in safetensors' order: a file's tensors lie by dtype, the last of these first,
# then by name (https://github.com/huggingface/safetensors, ``safetensors/src/tensor.rs: Dtype, prepare``).
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
# What ``model.dtype`` calls a dtype.
MODEL_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK = 1 << 24  # elements that are converted at a time


class StoredReader:
    """Reads ranges of stored tensors. Files stay open until it is closed: a mixture may have 100,000 tensors.

    num_bytes: how many it has read.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._files: dict[Path, FileIO] = {}

    def __enter__(self) -> StoredReader:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._files.values():
            opened.close()

    def fill(self, values: Tensor, tensor: StoredTensor, low: int = 0) -> None:
        """Fill contiguous ``values`` [n], of any dtype and device, with the stored elements [low, low + n).

        They are rounded to the dtype of ``values`` as ``Tensor.to`` does. Raises OSError, and ValueError where the file
        is shorter or its dtype is not known.
        """
        if (stored := DTYPES.get(tensor.dtype)) is None:
            raise ValueError(f"{tensor.name} is of dtype {tensor.dtype}, which torch does not have")
        file = self._files.get(tensor.file) or self._files.setdefault(tensor.file, tensor.file.open("rb", buffering=0))
        file.seek(tensor.first + low * stored.itemsize)
        for block in values.split(BLOCK):
            is_direct = block.device.type == "cpu" and block.dtype == stored
            target = block if is_direct else torch.empty(len(block), dtype=stored)
            self._read(file, target)
            if not is_direct:
                block.copy_(target)

    def whole(self, tensor: StoredTensor) -> Tensor:
        """All of a tensor, in its shape and in the dtype that it is stored in. Raises as ``fill`` does."""
        shape = torch.Size(tensor.shape)
        values = torch.empty(shape.numel(), dtype=DTYPES.get(tensor.dtype))
        self.fill(values, tensor)
        return values.view(shape)

    def _read(self, file: FileIO, target: Tensor) -> None:
        left = target.view(torch.uint8).numpy().data
        while left:
            count = file.readinto(left)
            if not count:
                raise ValueError(f"{file.name} is shorter than its header says")
            self.num_bytes += count
            left = left[count:]
