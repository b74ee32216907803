"""``model/``: a Hugging Face folder written from partitions, a few layers at a time (docs/design.md §7).

No rank holds more than the tensors of one file. Names and packing are those of the hub, not of the live module:
transformers' conversion is reverted, so that fused experts become ``experts.3.gate_proj.weight`` again.
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
    """Names in groups that share a file, in order: one group per layer, which no conversion crosses, others alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = BLOCK.match(name)
        groups.setdefault(match.group(1) if match else name, []).append(name)
    return list(groups.values())


def plan_export(model: ShardedModel) -> list[list[str]]:
    """The original model's names of parameters and persistent buffers by file: whole layers, up to FILE_BYTES each."""
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
    """Write weights, configuration, tokenizer and model card.

    Collectives: those of ``model.whole`` for every parameter, one gather and two barriers.
    """
    model.release()
    temporary = folder.with_name(f".{folder.name}.tmp")
    if runtime.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    runtime.barrier()
    files = plan_export(model)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = _gather(model, group, keeper=number % runtime.world_size())
        if tensors:
            canonical = revert_weight_conversion(model.module, tensors)
            canonical = {name: tensor.contiguous() for name, tensor in canonical.items()}
            save_tensors(canonical, wait_until_visible(temporary) / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(canonical, file)
            total += sum(tensor.nbytes for tensor in canonical.values())
    gathered = runtime.gather_objects((weight_map, total))
    if runtime.is_main():
        for part, _ in gathered:
            weight_map |= part
        total_size = {"total_size": sum(size for _, size in gathered)}
        index = {"metadata": total_size, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomic(temporary / INDEX_NAME, index)
        with writing(temporary):
            if model.module._auto_class is not None:  # remote code: the weights cannot be loaded without its files
                config = model.module.config
                custom_object_save(model.module, temporary, config=config)  # type: ignore[arg-type]  # takes configs too
            model.module.config.save_pretrained(temporary)
            if model.module.generation_config is not None:
                model.module.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        write_text_atomic(temporary / "README.md", card)
        replace_folder(temporary, folder)
    runtime.barrier()


def _gather(model: ShardedModel, names: list[str], keeper: int) -> dict[str, Tensor]:
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
