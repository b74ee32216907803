"""What lies beside the safetensors weights of a model's folder, for a folder with other weights."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from esi_ds.artifacts import write_json_atomic
from esi_ds.errors import UserError
from esi_ds.models.quantised import plain_configuration, read_quantisation
from esi_ds.models.weights import CONFIG_NAME
from esi_ds.reading import read_json

# Weights in any format, and their indexes: a reader that prefers another format would get the other model's.
WEIGHTS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.ot"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.pkl"),
)
CARD = "README.md"  # tells of the other model


def copy_beside_weights(source: Path, target: Path, field: str) -> None:
    """Copy configuration, tokenizer and the rest of a model's folder; no weights, and no model card.

    The configuration of a quantised model becomes that of the dequantised one. Raises UserError naming ``field``.
    """

    def is_left_out(file: Path) -> bool:
        return file == source / CARD or (not file.is_dir() and any(fnmatch(file.name, one) for one in WEIGHTS))

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if is_left_out(Path(folder, name))}

    try:
        shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)
    except shutil.Error as error:
        first = error.args[0][0]
        problem = f"cannot be copied ({first[2]})"
        raise UserError(field, str(first[0]), problem, "remove it or make it readable") from error
    if read_quantisation(source, field) is not None:
        write_json_atomic(target / CONFIG_NAME, plain_configuration(source, field))


def name_dtype(folder: Path, dtype: torch.dtype, field: str) -> None:
    """Have the configuration name the dtype of most weights: transformers would round them to another one."""
    file = folder / CONFIG_NAME
    content = read_json(file, dict[str, Any], field, "mend it") if file.is_file() else {}
    sections = [content]
    while isinstance(text := sections[-1].get("text_config") or sections[-1].get("thinker_config"), dict):
        sections.append(text)
    keys = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    name = str(dtype).removeprefix("torch.")
    if any(section[key] != name for section, key in keys):
        for section, key in keys:
            section[key] = name
        write_json_atomic(file, content)
