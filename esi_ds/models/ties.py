"""Whether weights that a configuration ties are tied: the checkpoint decides, as in transformers.

transformers ties what ``tie_word_embeddings`` asks for unless the checkpoint holds both weights with different values
(5.23, ``modeling_utils.py: PreTrainedModel.tie_weights``). A model on the meta device has no values to compare: the
checkpoint's are compared here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from esi_ds.core.quantised import Weight, fill_weights, stored_dtype
from esi_ds.core.stored import StoredReader
from esi_ds.models.conversions import loaded_names

CHUNK = 1 << 22  # elements that are compared at a time


def untie(model: PreTrainedModel, stored: Sequence[Weight], dtype: torch.dtype | None) -> None:
    """Give each weight of a tied meta model that the checkpoint stores with other values a parameter of its own.

    stored: what the checkpoint holds. dtype: in which the model is loaded, since weights are compared after rounding;
    None: as they are stored.
    """
    loaded = by_loaded_name(model, stored)
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in loaded and source in loaded and not _are_equal(loaded[target], loaded[source], dtype):
            module_name, _, leaf = target.rpartition(".")
            module = model.get_submodule(module_name)
            setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf))))
            del model.all_tied_weights_keys[target]


def by_loaded_name(model: PreTrainedModel, stored: Sequence[Weight]) -> dict[str, Weight]:
    """The checkpoint's tensors by the names that transformers gives them in the model."""
    conversions = get_model_conversion_mapping(model)
    names = loaded_names(model, conversions, (weight.name for weight in stored), model.state_dict())
    return {name.loaded: weight for name, weight in zip(names, stored, strict=True)}


def _are_equal(first: Weight, second: Weight, dtype: torch.dtype | None) -> bool:
    if first.shape != second.shape:
        return False
    if dtype is None:
        dtypes = stored_dtype(first), stored_dtype(second)
        dtype = torch.promote_types(dtypes[0] or torch.float32, dtypes[1] or torch.float32)
    numel = math.prod(first.shape)
    with StoredReader() as reader:
        for low in range(0, numel, CHUNK):
            one, two = (torch.empty(min(CHUNK, numel - low), dtype=dtype) for _ in range(2))
            fill_weights(reader, one, first, low)
            fill_weights(reader, two, second, low)
            if not torch.equal(one, two):
                return False
    return True
