"""``model/``: a Hugging Face folder written from partitions, by all ranks at once (docs/design.md §7).

Names and packing are those of the hub, not of the live module: transformers' conversion is reverted, so that fused
experts become ``experts.3.gate_proj.weight`` again. What the conversion only renames, every rank writes its own part
of. What it takes apart or transposes, the ranks gather a layer at a time, taking turns to convert and write it. The
files are those that safetensors itself would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from esi_ds.artifacts import replace_folder, temporary_name, write_text_atomic, writing
from esi_ds.core.stored import DTYPES
from esi_ds.models.beside_weights import copy_beside_weights
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import Entry, FolderFiles, by_parameter, file_name, packed, raw_bytes

FILE_BYTES = 2 << 30
BLOCK = re.compile(r"(.*?\.(?:layers|h|blocks|layer)\.\d+)\.")
METADATA = {"format": "pt"}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Conversion(NamedTuple):
    """Tensors of one file that are converted together. sources: the model's names of what they are made of."""

    file: str
    sources: tuple[str, ...]


@dataclass
class Plan:
    """The files of an export.

    files: file → its tensors, in the order in which they lie there. unchanged: name in a file → the model's name of the
    parameter or buffer whose bytes it has. conversions: what makes the other tensors.
    """

    files: dict[str, list[Entry]] = field(default_factory=dict)
    unchanged: dict[str, str] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)


def layer_groups(names: Iterable[str]) -> list[list[str]]:
    """Names in groups that share a file, in order: one group per layer, which no conversion crosses, others alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = BLOCK.match(name)
        groups.setdefault(match.group(1) if match else name, []).append(name)
    return list(groups.values())


def plan_export(model: ShardedModel) -> Plan:
    """What is written where. Converts every layer on the meta device, which gives names and shapes but no values."""
    dtype = {layout.parameter.name: model.by_name[layout.name].dtype for layout in model.layouts}
    tensors = {p.name: torch.empty(p.shape, dtype=dtype[p.name], device="meta") for p in model.parameters}
    tensors |= {name: buffer.to("meta") for name, buffer in model.buffers().items()}
    grouped = packed(layer_groups(tensors), lambda layer: sum(tensors[name].nbytes for name in layer), FILE_BYTES)
    plan = Plan()
    for number, groups in enumerate(grouped, 1):
        file = file_name(number, len(grouped))
        entries: list[Entry] = []
        for group in groups:
            name_of = {id(tensors[name]): name for name in group}
            converted = revert_weight_conversion(model.module, {name: tensors[name] for name in group})
            entries += [Entry(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in converted.items()]
            unchanged = {name: name_of[id(tensor)] for name, tensor in converted.items() if id(tensor) in name_of}
            plan.unchanged |= unchanged
            if sources := sorted(set(group).difference(unchanged.values())):
                converted_alone = revert_weight_conversion(model.module, {name: tensors[name] for name in sources})
                assert set(converted_alone) == set(converted) - set(unchanged), (file, sources)
                plan.conversions.append(Conversion(file, tuple(sources)))
        order = list(DTYPES)
        plan.files[file] = sorted(entries, key=lambda entry: (-order.index(entry.dtype), entry.name))
    return plan


def export_model(
    model: ShardedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str, base: Path | None = None
) -> None:
    """Write weights, configuration, tokenizer and model card.

    base: the folder that the model was read from, whose other files, such as those of an image processor, are copied.
    Collectives: those of ``model.whole`` for every parameter that is converted, and three barriers.
    """
    model.release()
    plan = plan_export(model)
    files = FolderFiles(temporary_name(folder), plan.files, METADATA, compact=True)
    if runtime.is_main():
        files.start()
    runtime.barrier()
    _write_converted(model, plan, files)
    local_runs = by_parameter(model.shards, {shard.name: model.local_weight(shard) for shard in model.shards})
    buffers = model.buffers()

    def local_bytes(name: str) -> Iterator[tuple[int, memoryview]]:
        source = plan.unchanged.get(name)
        for low, values in local_runs.get(source, ()) if source is not None else ():
            yield low * values.element_size(), raw_bytes(values)
        if source in buffers and runtime.is_main():
            yield 0, raw_bytes(buffers[source])

    files.write(local_bytes)
    runtime.barrier()
    if runtime.is_main():
        temporary = files.folder
        with writing(temporary):
            if model.module._auto_class is not None:  # remote code: the weights cannot be loaded without its files
                config = model.module.config
                custom_object_save(model.module, temporary, config=config)  # type: ignore[arg-type]  # takes configs too
            # As transformers does; the text part of a composite model's configuration names none, and servers go by it.
            model.module.config.architectures = [type(model.module).__name__]
            model.module.config.save_pretrained(temporary)
            if model.module.generation_config is not None:
                model.module.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if base is not None:
                copy_beside_weights(base, temporary, "model.path", only_missing=True)
        write_text_atomic(temporary / "README.md", card)
        replace_folder(temporary, folder)
    runtime.barrier()


def _write_converted(model: ShardedModel, plan: Plan, files: FolderFiles) -> None:
    """Gather, convert and write what is not stored as the model has it; the ranks take turns.

    A rank writes one group while the next is gathered, and holds no more than these two. Collectives: those of
    ``model.whole``.
    """

    def convert(conversion: Conversion, tensors: dict[str, Tensor]) -> None:
        converted = revert_weight_conversion(model.module, tensors)
        files.write_tensors(conversion.file, converted)

    with ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for number, conversion in enumerate(plan.conversions):
            tensors = _gather(model, conversion.sources, keeper=number % runtime.world_size())
            if tensors:
                if pending is not None:
                    pending.result()
                pending = writer.submit(convert, conversion, tensors)
            del tensors
        if pending is not None:
            pending.result()


def _gather(model: ShardedModel, names: Iterable[str], keeper: int) -> dict[str, Tensor]:
    """Copies of parameters and buffers on the CPU of rank ``keeper``, none on others; one tensor is whole at a time."""
    tensors: dict[str, Tensor] = {}
    buffers = model.buffers()
    parameters = {parameter.name: parameter for parameter in model.parameters}
    for name in names:
        if name in parameters:
            tensor = model.whole(parameters[name], keeper)
        else:
            tensor = buffers[name].detach().to("cpu", copy=True) if runtime.rank() == keeper else None
        if tensor is not None:
            tensors[name] = tensor
    return tensors
