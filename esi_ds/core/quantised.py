"""Weights that a checkpoint stores quantised, read as floating-point numbers by ranges of elements.

Two formats, each a tensor of codes beside a tensor of scales:

- FP8 with block scales (DeepSeek-V3, arXiv 2412.19437): ``float8_e4m3fn`` codes, and a scale for each block of rows and
  columns; the last blocks of a matrix may be smaller.
- MXFP4 (OCP Microscaling Formats v1.0, as gpt-oss stores it): two 4-bit E2M1 codes a byte, and for every 32 codes of a
  row a power of two, whose exponent is a byte with bias 127.

Values are computed in float32 and rounded once, which gives the bits of transformers' ``Fp8Dequantize`` and
``convert_moe_packed_tensors`` (5.23). Temporary memory is some twenty megabytes, of MXFP4 a few copies of one expert's
matrix in float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from esi_ds.core.stored import DTYPES, StoredReader
from esi_ds.tensor_files import StoredTensor

CHUNK = 1 << 20  # elements that are dequantised at a time, but never less than a row
# Values of the E2M1 codes, the sign in the highest bit (OCP Microscaling Formats v1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
NAN_EXPONENT = 255  # E8M0's only code that is not a number (OCP Microscaling Formats v1.0)
CODES_PER_SCALE = 32


class BlockScaled(NamedTuple):
    """FP8 codes [..., R, C] and scales [..., ⌈R / block rows⌉, ⌈C / block columns⌉], of any floating-point dtype.

    name: of the weight. block: rows and columns.
    """

    name: str
    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The shape that the scales must have."""
        *leading, rows, columns = self.shape
        return (*leading, math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1]))

    def fill(self, values: Tensor, reader: StoredReader, low: int) -> None:
        """As ``fill_weights``; reads the codes of the range and all scales."""
        rows, columns = self.shape[-2:]
        scale_rows, scale_columns = self.scales_shape[-2:]
        scales = reader.whole(self.scales).float().view(-1, scale_columns)
        # Five times as fast on CPUs as torch's own conversion of every code.
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        step = max(1, CHUNK // columns)
        for row in range(low // columns, math.ceil((low + len(values)) / columns), step):
            last_row = min(row + step, math.ceil((low + len(values)) / columns))
            first, last = max(low, row * columns), min(low + len(values), last_row * columns)
            codes = torch.zeros((last_row - row) * columns, dtype=torch.uint8)
            read = codes[first - row * columns : last - row * columns]
            reader.fill(read.view(torch.float8_e4m3fn), self.codes, first)
            numbers = torch.arange(row, last_row)
            numbers = numbers // rows * scale_rows + numbers % rows // self.block[0]
            factors = scales[numbers].repeat_interleave(self.block[1], dim=1)[:, :columns]
            products = table.index_select(0, codes.int()).view(-1, columns).mul_(factors).flatten()
            values[first - low : last - low].copy_(products[first - row * columns : last - row * columns])


class Microscaled(NamedTuple):
    """MXFP4 codes [E, R, G, 16] and exponents [E, R, G] of a weight [E, 32 G, R]: each expert's matrix is transposed.

    name: of the weight.
    """

    name: str
    codes: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, _ = self.codes.shape
        return experts, CODES_PER_SCALE * groups, rows

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The shape that the exponents must have."""
        return self.codes.shape[:-1]

    def fill(self, values: Tensor, reader: StoredReader, low: int) -> None:
        """As ``fill_weights``; reads the experts that have elements in the range. Raises ValueError on a NaN scale."""
        size = math.prod(self.shape[1:])
        for expert in range(low // size, math.ceil((low + len(values)) / size)):
            first, last = max(low, expert * size), min(low + len(values), (expert + 1) * size)
            matrix = self._expert(expert, reader).flatten()
            values[first - low : last - low].copy_(matrix[first - expert * size : last - expert * size])

    def _expert(self, expert: int, reader: StoredReader) -> Tensor:
        """An expert's matrix [32 G, R] in float32."""
        _, columns, rows = self.shape
        codes = torch.empty(rows * columns // 2, dtype=torch.uint8)
        exponents = torch.empty(rows * columns // CODES_PER_SCALE, dtype=torch.uint8)
        reader.fill(codes, self.codes, expert * len(codes))
        reader.fill(exponents, self.scales, expert * len(exponents))
        if bool((exponents == NAN_EXPONENT).any()):
            raise ValueError(f"{self.scales.name} holds a scale that is not a number (expert {expert})")
        table = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)])  # the low bits come first
        powers = torch.ldexp(torch.ones(NAN_EXPONENT), torch.arange(NAN_EXPONENT) - EXPONENT_BIAS)
        values = table.index_select(0, codes.int()).view(-1, CODES_PER_SCALE)
        return values.mul_(powers.index_select(0, exponents.int()).unsqueeze(1)).view(rows, columns).T


Weight: TypeAlias = StoredTensor | BlockScaled | Microscaled


def file_of(weight: Weight) -> Path:
    """The file that holds a weight, or the codes of a quantised one."""
    return weight.file if isinstance(weight, StoredTensor) else weight.codes.file


def stored_dtype(weight: Weight) -> torch.dtype | None:
    """The dtype of the stored values: float32 for a quantised weight, None if torch does not have it."""
    return DTYPES.get(weight.dtype) if isinstance(weight, StoredTensor) else torch.float32


def fill_weights(reader: StoredReader, values: Tensor, weight: Weight, low: int = 0) -> None:
    """Fill contiguous ``values`` [n], of any dtype and device, with the weight's elements [low, low + n).

    They are rounded to the dtype of ``values`` as ``Tensor.to`` does. Raises OSError, and ValueError where the file is
    shorter, its dtype is not known, or a scale is not a number.
    """
    if isinstance(weight, StoredTensor):
        reader.fill(values, weight, low)
    elif len(values):
        weight.fill(values, reader, low)


def whole_weight(reader: StoredReader, weight: Weight, dtype: torch.dtype) -> Tensor:
    """All of a weight, in its shape: of ``dtype`` if it is quantised, else as it is stored. Raises as
    ``fill_weights`` does."""
    if isinstance(weight, StoredTensor):
        return reader.whole(weight)
    values = torch.empty(math.prod(weight.shape), dtype=dtype)
    weight.fill(values, reader, 0)
    return values.view(weight.shape)
