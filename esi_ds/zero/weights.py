"""Filling partitions from safetensors: every rank reads the bytes of its own partition, and no weight is sent.

transformers reads the files on rank 0, gathers every weight and broadcasts it. Here its renamings and conversions are
kept, and only the reading is replaced. A weight that is stored as the model has it is read by its flat range. One that
is converted from other tensors is converted on every rank, from whole tensors; of experts that are stored one by one
and stacked, a rank reads those of which it holds a part. Quantised weights are dequantised range by range as they are
read; of MXFP4's experts a rank reads those of which it holds a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
    dot_natural_key,
)

from esi_ds.core.quantised import Weight, fill_weights, whole_weight
from esi_ds.core.stored import StoredReader
from esi_ds.errors import UserError
from esi_ds.models.conversions import keep_used, loaded_names
from esi_ds.models.folder import ModelSource
from esi_ds.models.weights import REMEDY
from esi_ds.reading import reading
from esi_ds.tensor_files import StoredTensor, read_header
from esi_ds.zero import runtime
from esi_ds.zero.partitioned import attributes, is_partitioned, local_range, whole_shape

OTHER_SHAPES = "holds weights whose shapes do not match its configuration"


class WrongShape(ValueError):
    """A stored weight has another shape than the model's."""


class Converted(NamedTuple):
    """A weight that was converted: whole, or rows of it from the flat element ``low`` on. shape: the whole weight's."""

    values: Tensor
    low: int
    shape: tuple[int, ...]


@contextmanager
def every_rank_reads_its_part(source: ModelSource, remedy: str, problem: str) -> Iterator[None]:
    """Have transformers' ``from_pretrained`` under ZeRO-3 read weights as this module does, inside the block.

    It then raises UserError, on every rank, where a file cannot be read (which the error calls ``problem``) or a weight
    has another shape than the model's. Collectives: one gather, in place of two broadcasts of every weight: DeepSpeed's
    of the model that has just been made, and transformers' of what rank 0 has read.
    """

    initialise_missing = PreTrainedModel._initialize_missing_keys

    def headers(file: str, **_: Any) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in read_header(Path(file), source.field, REMEDY)[0]}

    def read(
        model: PreTrainedModel, stored: dict[str, Weight], load_config: modeling_utils.LoadStateDictConfig
    ) -> tuple[list[str], set[str]]:
        conversions = load_config.weight_mapping or []
        names: set[str] = set()
        refusal: UserError | None = None
        try:
            with reading(source.field, source.path, remedy, problem), StoredReader() as reader:
                names = PartsReader(model, stored, conversions, reader).fill()
            keep_used(model, conversions)  # the same on every rank: each names all that is stored
        except UserError as error:
            refusal = error
            if isinstance(error.__cause__, WrongShape):
                refusal = UserError(error.field, error.value, f"{OTHER_SHAPES} ({error.__cause__})", remedy)
        runtime.raise_first(refusal)  # perhaps only one rank reads the bytes that cannot be read
        return [], set(model.state_dict()) - names

    def initialise(model: PreTrainedModel, is_quantized: bool) -> None:
        """What transformers does once the weights are read: some architectures' code for it asks for the shapes of
        weights, which are empty placeholders here, also of weights that were read."""
        kind = f"is of type {model.config.model_type}, which transformers cannot initialise under ZeRO-3"
        other = "give a model of another architecture; docs/architectures.md lists those that load"
        with reading(source.field, source.path, other, kind):
            initialise_missing(model, is_quantized)

    def partition(init: Init, parameter: nn.Parameter) -> None:
        """What zero.Init does with a new parameter, without the broadcast of what its memory happens to hold."""
        init._convert_to_deepspeed_param(parameter)
        attributes(parameter).partition()

    with (
        patch.object(Init, "_zero_init_param", partition),
        patch.object(PreTrainedModel, "_initialize_missing_keys", initialise),
        patch.object(modeling_utils, "load_state_dict", headers),
        patch.object(modeling_utils, "_load_state_dict_into_zero3_model", read),
    ):
        yield


class PartsReader:
    """This rank's parts of a model's weights, and its persistent buffers, as a checkpoint holds them."""

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Weight],
        conversions: Sequence[WeightTransform],
        reader: StoredReader,
    ):
        self._model, self._stored, self._conversions, self._reader = model, stored, conversions, reader
        self._targets: dict[str, Tensor] = model.state_dict(keep_vars=True)

    def fill(self) -> set[str]:
        """Fill what the checkpoint holds; its names in the model. Raises WrongShape, and as ``StoredReader.fill`` and
        transformers' conversions do. No collectives."""
        names = set()
        for name, value in self._values():
            if name in self._targets:
                self._fill(name, self._targets[name], value)
                attributes(self._targets[name])._is_hf_initialized = True
                names.add(name)
        return names

    def _values(self) -> Iterator[tuple[str, Weight | Converted]]:
        """What the checkpoint holds, by its name in the model; one conversion is in memory at a time."""
        groups: dict[str, WeightConverter] = {}  # by the first name that a conversion has in the model
        in_order = sorted(self._stored, key=dot_natural_key)  # experts in the order of their numbers
        for stored_name, name, entry, pattern in loaded_names(self._model, self._conversions, in_order, self._targets):
            if name not in self._targets:
                continue
            weight = self._stored[stored_name]
            if entry is None or pattern is None:
                yield name, weight
                continue
            if name not in groups:
                groups[name] = WeightConverter(entry.source_patterns, entry.target_patterns, entry.operations)
            read = partial(whole_weight, self._reader, weight, self._targets[name].dtype)
            groups[name].add_tensor(name, stored_name, pattern, read)  # type: ignore[arg-type]  # callables too
        for name, group in groups.items():
            yield from self._converted(name, group)

    def _converted(self, name: str, group: WeightConverter) -> Iterator[tuple[str, Converted]]:
        """What a conversion makes: whole, or of a stack of experts the rows of which this rank holds a part."""
        target = self._targets[name]
        shape = whole_shape(target)
        low, num_rows = 0, None
        if _is_stack(group, shape):
            size = torch.Size(shape[1:]).numel()  # elements of a row
            first, last = local_range(target)
            first, last = first // size, -(-last // size)
            if first == last:
                yield name, Converted(torch.empty(0), 0, shape)
                return
            low, num_rows = first * size, shape[0]
            for pattern, rows in group.collected_tensors.items():
                group.collected_tensors[pattern] = rows[first:last]
        prefix = self._model.base_model_prefix
        for loaded_name, tensors in group.convert(name, model=self._model, config=self._model.config).items():
            values = tensors[0] if isinstance(tensors, list) else tensors
            whole = tuple(values.shape) if num_rows is None else (num_rows, *values.shape[1:])
            full_name = f"{prefix}.{loaded_name}"
            yield full_name if full_name in self._targets else loaded_name, Converted(values, low, whole)

    def _fill(self, name: str, target: Tensor, value: Weight | Converted) -> None:
        if value.shape != (shape := whole_shape(target)):
            raise WrongShape(f"{name} has shape {list(value.shape)}, the model's is {list(shape)}")
        if not is_partitioned(target):
            if isinstance(value, Converted):
                target.detach().copy_(value.values.view(shape))
            else:
                target.detach().copy_(whole_weight(self._reader, value, target.dtype).view(shape))
            return
        low, high = local_range(target)
        part = attributes(target).ds_tensor.detach().view(-1)[: high - low]
        if not isinstance(value, Converted):
            fill_weights(self._reader, part, value, low)
        elif len(part):
            part.copy_(value.values.flatten()[low - value.low : high - value.low])
        attributes(target).ds_secondary_tensor = None  # hpZ's copy, from which gathers would read


def _is_stack(group: WeightConverter, shape: tuple[int, ...]) -> bool:
    """Whether every row of the weight is made of one tensor of each of the conversion's sources, its expert's."""
    stack, *others = group.operations
    return (
        isinstance(stack, MergeModulelist)
        and stack.dim == 0
        and all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others)
        and len(group.target_patterns) == 1
        and all(len(rows) == shape[0] for rows in group.collected_tensors.values())
    )
