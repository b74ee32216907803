"""transformers' renamings and conversions between the names of a checkpoint's tensors and those of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key


class LoadedName(NamedTuple):
    """A tensor's name in the checkpoint, and in the model.

    loaded: of tensors that are converted, the name of the first weight that they make. converter: None where the tensor
    is only renamed. pattern: the converter's source that the name matches.
    """

    stored: str
    loaded: str
    converter: WeightConverter | None
    pattern: str | None


def loaded_names(
    model: PreTrainedModel, conversions: Sequence[WeightTransform], stored: Iterable[str], state: dict[str, Any]
) -> Iterator[LoadedName]:
    """The names that transformers gives a checkpoint's tensors in the model, in the checkpoint's order.

    Marks the conversions that are used. state: the model's ``state_dict``.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    for name in stored:
        loaded, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        yield LoadedName(name, loaded, converter_of[pattern] if pattern is not None else None, pattern)


def keep_used(model: PreTrainedModel, conversions: Iterable[WeightTransform]) -> None:
    """Leave the conversions that loading has used with the model, as transformers does: an export reverts these.

    Reverting a renaming that never happened would give names that no checkpoint has.
    """
    # nn.Module declares every attribute a tensor or a module; this one is neither, hence the ignore.
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]  # type: ignore[assignment]
