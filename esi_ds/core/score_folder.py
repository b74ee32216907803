"""``scores/`` of a run (docs/design.md §7), read by byte ranges: no file stays in memory."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from esi_ds.core.mask_metadata import SCORES_FORMAT, MaskMetadata, ScoresMetadata
from esi_ds.core.stored import StoredReader
from esi_ds.errors import UserError
from esi_ds.reading import first_line, reading, share_of
from esi_ds.tensor_files import DIGESTS_NAME, read_digests, read_tensor_folder, tensor_sha256

REMEDY = "give RUN/scores of the run that made the mask"
UNNAMED = "does not say whose scores it holds: taken as the mask's"
DAMAGE_REMEDY = "scores must be finite, at least 0 and unchanged: score again, or copy the folder again"


class ScoreFolder:
    """The scores of one model. metadata: what they say of themselves; None in scores of other tools that say nothing.
    names: the scored parameters."""

    def __init__(self, folder: Path, field: str = "--scores"):
        """field: the option or key that names the folder. Raises UserError if it does not hold whole, sound scores."""
        self.folder, self._field = folder, field
        content = read_tensor_folder(folder, field, REMEDY)
        with reading(field, folder, REMEDY, "holds no scores"):
            texts = content.metadata
            is_esi_ds = texts.get("format", "").startswith("esi-")  # others are of frameworks: "pt"
            if not is_esi_ds and not texts.keys().isdisjoint(("criterion", "fingerprint")):  # another tool saved ours
                is_esi_ds, texts = True, {**texts, "format": SCORES_FORMAT}
            self.metadata = ScoresMetadata.parse(texts) if is_esi_ds else None
        self._tensors = content.tensors
        self.names = set(content.tensors)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless a parameter's scores are float32 in this shape."""
        stored = self._tensors[name].description if name in self._tensors else "nothing"
        if stored != (expected := f"F32 {list(shape)}"):
            problem = f"holds {stored} for {name}, expected {expected}"
            raise UserError(self._field, str(self.folder), problem, REMEDY)

    def check(self, mask: MaskMetadata) -> None:
        """Raises UserError unless these are scores of the mask's parameters and, if they say so, of its weights, by its
        criterion."""
        for name, shape in mask.shapes.items():
            self.check_shape(name, shape)
        if others := sorted(self.names - set(mask.shapes)):
            problem = f"holds scores of {others[0]}, which the mask does not name"
            raise UserError(self._field, str(self.folder), problem, REMEDY)
        if self.metadata is not None and (differences := self.metadata.differences(mask)):
            raise UserError(self._field, str(self.folder), f"are not those of the mask: {differences[0]}", REMEDY)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Parameter → sha256 of its scores; empty for scores of an earlier version. Raises UserError."""
        return read_digests(self.folder, self.names, self._field, DAMAGE_REMEDY)

    def problems(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """Every parameter whose scores are not those that were written, one sentence each; empty without digests.

        Reads the share ``part`` of ``num_parts``, so that ranks can share the work. Raises UserError where the digests
        cannot be read.
        """
        problems: list[str] = []
        sizes = {name: self._tensors[name].num_bytes for name in sorted(self.digests)}
        for name in share_of(sizes, part, num_parts):
            try:
                if tensor_sha256(self._tensors[name]) != self.digests[name]:
                    problems.append(f"the scores of {name} differ from those that were written ({DIGESTS_NAME})")
            except (OSError, ValueError) as error:
                problems.append(f"the scores of {name} cannot be read ({first_line(error)})")
        return problems

    def refuse(self, problems: Iterable[str]) -> None:
        """Raise UserError naming the first of ``problems``, if there is any."""
        if (problem := next(iter(problems), None)) is not None:
            raise UserError(self._field, str(self.folder), problem, DAMAGE_REMEDY)

    def read(self, name: str, low: int, high: int) -> Tensor:
        """The scores of the parameter's flat range [low, high): float32 [high − low]. Raises UserError."""
        tensor = self._tensors[name]
        values = torch.empty(high - low)
        with reading(self._field, tensor.file, REMEDY, "is missing or damaged"), StoredReader() as reader:
            reader.fill(values, tensor, low)
        return values
