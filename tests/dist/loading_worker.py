"""Run by test_loading.py under a launcher: each case's model, loaded under ZeRO-3, to <name>-<rank>.safetensors.

argv: a JSON list of cases {"name", "model", "dtype", "class" (optional), "export" (optional: a folder
to write the model to)}. The file holds logits, the whole parameters ("parameter.<name>") and the buffers
("buffer.<name>"), and its metadata "num_bytes", what the rank read of the weights, and "num_broadcasts", how often it
took part in a broadcast until they were loaded; of a model that is refused, <name>-<rank>.txt has the message.
<name>-<rank>.json has the bytes of live tensors before the model was loaded, while it was there and once it was closed.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import torch
import transformers
from cases import run_cases, tensor_bytes
from safetensors.torch import save_file

from esi_ds.core.stored import StoredReader
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource
from esi_ds.tensor_files import StoredTensor
from esi_ds.zero import runtime, weights
from esi_ds.zero.engine import load_sharded
from esi_ds.zero.export import export_model

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
IDS = torch.tensor([[1, 5, 9, 20, 33, 7]])


class CountingReader(StoredReader):
    """The reader of the last load: how many bytes has it read? Rank 1 cannot read the model "unreadable"."""

    last: StoredReader

    def __init__(self) -> None:
        super().__init__()
        CountingReader.last = self

    def fill(self, values: torch.Tensor, tensor: StoredTensor, low: int = 0) -> None:
        if "unreadable" in tensor.file.parts and runtime.rank() == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(tensor.file))
        super().fill(values, tensor, low)


broadcasts: list[int] = []
plain_broadcast = torch.distributed.broadcast


def counting_broadcast(tensor: torch.Tensor, *arguments, **options):
    broadcasts.append(tensor.nbytes)
    return plain_broadcast(tensor, *arguments, **options)


def run_case(case: dict) -> None:
    path = Path(case["model"])
    target = path.parent / f"{case['name']}-{runtime.rank()}"
    settings = {**SETTINGS, "bf16": {"enabled": case["dtype"] == "bf16"}}
    sizes = [tensor_bytes()]
    auto_class = getattr(transformers, case.get("class", "AutoModelForCausalLM"))
    broadcasts.clear()
    try:
        model = load_sharded(ModelSource(str(path)), case["dtype"], settings, auto_class=auto_class)
    except UserError as error:
        target.with_suffix(".txt").write_text(str(error))
        return
    metadata = {"num_bytes": str(CountingReader.last.num_bytes), "num_broadcasts": str(len(broadcasts))}
    with torch.no_grad():
        tensors = {"logits": model.module(IDS).logits}
    model.release()
    for parameter in model.parameters:
        for keeper in range(runtime.world_size()):
            whole = model.whole(parameter, keeper)
            if whole is not None:
                tensors[f"parameter.{parameter.name}"] = whole
    tensors |= {f"buffer.{name}": buffer.clone() for name, buffer in model.module.named_buffers()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target.with_suffix(".safetensors"), metadata=metadata)
    del tensors, whole
    if "export" in case:
        export_model(model, Path(case["export"]), transformers.AutoTokenizer.from_pretrained(path), "")
    sizes.append(tensor_bytes())
    model.close()
    target.with_suffix(".json").write_text(json.dumps([*sizes, tensor_bytes()]))


if __name__ == "__main__":
    weights.StoredReader = CountingReader
    torch.distributed.broadcast = counting_broadcast
    run_cases(run_case, freeze=False)
