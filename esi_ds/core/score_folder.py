"""``scores/`` of a run (docs/design.md §7), read by byte ranges: no file stays in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from esi_ds.core.mask_metadata import MaskMetadata, ScoresMetadata
from esi_ds.errors import UserError
from esi_ds.reading import reading
from esi_ds.tensor_files import read_tensor_folder

REMEDY = "give RUN/scores of the run that made the mask"


class ScoreFolder:
    """The scores of one model. metadata: what they say of themselves. names: the scored parameters."""

    def __init__(self, folder: Path, field: str = "--scores"):
        """field: the option or key that names the folder. Raises UserError if it does not hold whole, sound scores."""
        self.folder, self._field = folder, field
        content = read_tensor_folder(folder, field, REMEDY)
        with reading(field, folder, REMEDY, "holds no scores"):
            self.metadata = ScoresMetadata.parse(content.metadata)
        self._tensors = content.tensors
        self.names = set(content.tensors)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless a parameter's scores are float32 in this shape."""
        stored = self._tensors[name].description if name in self._tensors else "nothing"
        if stored != (expected := f"F32 {list(shape)}"):
            problem = f"holds {stored} for {name}, expected {expected}"
            raise UserError(self._field, str(self.folder), problem, REMEDY)

    def check(self, mask: MaskMetadata) -> None:
        """Raises UserError unless these are scores of the mask's model and weights, by the mask's criterion."""
        for name, shape in mask.shapes.items():
            self.check_shape(name, shape)
        if others := sorted(self.names - set(mask.shapes)):
            problem = f"holds scores of {others[0]}, which the mask does not name"
            raise UserError(self._field, str(self.folder), problem, REMEDY)
        if differences := self.metadata.differences(mask):
            raise UserError(self._field, str(self.folder), f"are not those of the mask: {differences[0]}", REMEDY)

    def read(self, name: str, low: int, high: int) -> Tensor:
        """The scores of the parameter's flat range [low, high): float32 [high − low]. Raises UserError."""
        tensor = self._tensors[name]
        with reading(self._field, tensor.file, REMEDY, "is missing or damaged"):
            with tensor.file.open("rb") as opened:
                opened.seek(tensor.first + 4 * low)
                data = bytearray(opened.read(4 * (high - low)))
            if len(data) != 4 * (high - low):
                raise ValueError("it is shorter than its header says")
        # frombuffer refuses an empty buffer, which a rank without a part of this parameter has.
        return torch.frombuffer(data, dtype=torch.float32) if data else torch.zeros(0)
