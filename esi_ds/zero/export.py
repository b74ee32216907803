"""``model/``: a Hugging Face folder written from partitions, a few layers at a time (docs/design.md §7).

No rank ever holds more than one file's tensors. Names and packing are the hub's, not the live module's: transformers'
own conversion is run backwards, so fused experts become ``experts.3.gate_proj.weight`` again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from esi_ds.artifacts import replace_folder, wait_until_visible, write_json_atomic, write_text_atomic, writing
from esi_ds.core.mask import INDEX_NAME
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import save_tensors

FILE_BYTES = 2 << 30
BLOCK = re.compile(r"(.*?\.(?:layers|h|blocks|layer)\.\d+)\.")


def layer_groups(names: Iterable[str]) -> list[list[str]]:
    """Names that belong together, in order: one group a layer (a conversion never reaches beyond it), others alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = BLOCK.match(name)
        groups.setdefault(found.group(1) if found else name, []).append(name)
    return list(groups.values())


def plan_export(model: ShardedModel) -> list[list[str]]:
    """The model's own names by file: whole layers, up to FILE_BYTES a file. Persistent buffers are checkpointed too."""
    item_size = {layout.parameter.name: model.by_name[layout.name].element_size() for layout in model.layouts}
    size = {p.name: p.numel * item_size[p.name] for p in model.parameters}
    size |= {name: buffer.nbytes for name, buffer in model.buffers().items()}
    files: list[list[str]] = [[]]
    filled = 0
    for group in layer_groups(size):
        needed = sum(size[name] for name in group)
        if files[-1] and filled + needed > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1] += group
        filled += needed
    return files


def export_model(model: ShardedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Weights, configuration, tokenizer and model card. ``model.whole``'s collectives, one gather, two barriers."""
    model.release()
    temporary = folder.with_name(f".{folder.name}.tmp")
    if runtime.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    runtime.barrier()
    files = plan_export(model)
    weight_map: dict[str, str] = {}
    total = 0
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = _gather(model, names, keeper=index % runtime.world_size())
        if tensors:
            canonical = revert_weight_conversion(model.module, tensors)
            canonical = {name: tensor.contiguous() for name, tensor in canonical.items()}
            save_tensors(canonical, wait_until_visible(temporary) / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(canonical, file)
            total += sum(tensor.nbytes for tensor in canonical.values())
    gathered = runtime.gather_objects((weight_map, total))
    if runtime.is_main():
        names = {name: file for part, _ in gathered for name, file in part.items()}
        index = {
            "metadata": {"total_size": sum(size for _, size in gathered)},
            "weight_map": dict(sorted(names.items())),
        }
        write_json_atomic(temporary / INDEX_NAME, index)
        with writing(temporary):
            if model.module._auto_class is not None:  # of remote code, whose files the weights cannot be read without
                custom_object_save(model.module, temporary, config=model.module.config)
            model.module.config.save_pretrained(temporary)
            if model.module.generation_config is not None:
                model.module.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        write_text_atomic(temporary / "README.md", card)
        replace_folder(temporary, folder)
    runtime.barrier()


def _gather(model: ShardedModel, names: list[str], keeper: int) -> dict[str, Tensor]:
    """Copies on the CPU of one rank; one parameter is whole at a time."""
    tensors: dict[str, Tensor] = {}
    buffers = model.buffers()
    parameters = {parameter.name: parameter for parameter in model.parameters}
    for name in names:
        if name in parameters:
            found = model.whole(parameters[name], keeper)
        else:
            found = buffers[name].detach().to("cpu", copy=True) if runtime.rank() == keeper else None
        if found is not None:
            tensors[name] = found
    return tensors
