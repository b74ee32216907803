"""Which files of a folder are its weights, and what each of them holds: one answer for loading, fingerprints and
patches.

The rule is that of transformers' ``from_pretrained`` (5.23, ``modeling_utils.py: _get_resolved_checkpoint_files``) with
safetensors only: the file that ``transformers_weights`` of ``config.json`` names, else ``model.safetensors``, else the
files of ``model.safetensors.index.json``. Whatever lies beside them (variants, ``consolidated.safetensors``, adapters,
pickled weights) is not loaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from esi_ds.errors import UserError
from esi_ds.reading import check_regular, is_bare_name, read_configuration, read_index, reading
from esi_ds.tensor_files import INDEX_NAME, SINGLE_NAME, StoredTensor, read_header

CONFIG_NAME = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
# Saved by torch's distributed checkpointing; transformers would read them first, in an order of its own.
DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
REMEDY = "give a Hugging Face folder whose weights are complete safetensors files, or copy it again"


def weights_name(folder: Path, field: str) -> str:
    """The file that transformers opens first: a safetensors file with all weights, or an index of several.

    Raises UserError naming ``field`` where there is none.
    """
    if not folder.is_dir():
        raise UserError(field, str(folder), "is not a folder", "give a Hugging Face folder")
    for file in folder.iterdir():
        if DISTRIBUTED.fullmatch(file.name):
            problem = f"holds {file.name}, a part of a distributed checkpoint, which is not read"
            raise UserError(field, str(folder), problem, "save the model as whole safetensors files")
    name = _configured_name(folder, field)
    if name is None:
        name = next((name for name in (SINGLE_NAME, INDEX_NAME) if (folder / name).is_file()), None)
    if name is None:
        problem, remedy = f"holds neither {SINGLE_NAME} nor {INDEX_NAME}", "save the model with save_pretrained"
        if pickled := sorted(file.name for file in folder.glob("pytorch_model*.bin")):
            problem = f"holds pickled weights ({pickled[0]}), which are not read: unpickling runs code"
            remedy = "load it with transformers where you trust it, and save_pretrained to a new folder"
        elif any(folder.glob("*.gguf")):
            problem = f"holds GGUF files, which are not read, and neither {SINGLE_NAME} nor {INDEX_NAME}"
            remedy = "give the unquantised model as safetensors"
        raise UserError(field, str(folder), problem, remedy)
    return name


def names_to_fetch(folder: Path, field: str) -> list[str]:
    """The names of the weights that transformers may load from a folder that holds all files but weights.

    Raises UserError naming ``field`` for a damaged index or configuration.
    """
    name = _configured_name(folder, field)
    first = [SINGLE_NAME, INDEX_NAME] if name is None else [name]
    indices = [folder / name for name in first if name.endswith(INDEX_SUFFIX) and (folder / name).is_file()]
    parts = {part for index in indices for part in read_index(index, field, REMEDY).values()}
    return [*(name for name in first if not name.endswith(INDEX_SUFFIX)), *sorted(parts)]


def weight_files(folder: Path, field: str = "model.path") -> list[Path]:
    """The files that transformers loads from a folder, sorted.

    Raises UserError naming ``field`` where there are none, where one of them is missing or no regular file, or where
    its name leads out of the folder.
    """
    name = weights_name(folder, field)
    if not name.endswith(INDEX_SUFFIX):
        names = [name]
    else:
        names = sorted(set(read_index(folder / name, field, REMEDY).values()))
        if not names:
            raise UserError(field, str(folder / name), "names no weights", REMEDY)
    for name in names:
        with reading(field, folder / name, REMEDY):
            check_regular(folder / name)
    return [folder / name for name in names]


def _configured_name(folder: Path, field: str) -> str | None:
    """``transformers_weights`` of ``config.json``: the name of a safetensors file or of an index, None if not set."""
    file = folder / CONFIG_NAME
    if not file.is_file():  # a folder of scores, or one that is being written
        return None
    name = read_configuration(file, field, REMEDY).get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not is_bare_name(name) or not name.endswith((".safetensors", INDEX_SUFFIX)):
        problem = f"has transformers_weights {name!r}, which is not the name of a safetensors file beside it"
        raise UserError(field, str(file), problem, "remove the key, or name a file of the folder")
    return name


def checkpoint_tensors(folder: Path, field: str = "model.path") -> list[StoredTensor]:
    """Every tensor in a folder's ``weight_files``, by name. If several files hold a tensor, the last file's counts,
    which is the one that transformers loads. Raises UserError naming ``field``."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder, field):
        tensors |= {tensor.name: tensor for tensor in read_header(file, field, REMEDY)[0]}
    return sorted(tensors.values())
