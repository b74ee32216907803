"""What lies beside the safetensors weights of a model's folder, for a folder with other weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from esi_ds.artifacts import write_json_atomic
from esi_ds.errors import UserError
from esi_ds.models.chat_templates import chat_templates, of_tokenizer, write_chat_templates
from esi_ds.models.quantised import plain_configuration, read_quantisation
from esi_ds.models.weights import CONFIG_NAME
from esi_ds.reading import read_configuration

# Weights in any format, and their indexes: a reader that prefers another format would get the other model's.
WEIGHTS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.ot"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.pkl"),
)
CARD = "README.md"  # tells of the other model
FOLDERS = frozenset((".git", ".cache"))  # of a clone or a download: they hold the other weights again

# Of a tokenizer saved by transformers before version 5. Beside one that version 5 has saved, which says the same in
# tokenizer_config.json, they would overrule it.
TOKEN_MAPS = frozenset(("special_tokens_map.json", "added_tokens.json"))
# Keys of a configuration that change no logit of the model in use, or that whoever writes its weights sets.
UNCOMPUTED = re.compile(
    r"_.*|.*_token_id|.*dropout(?:_prob|_rate)?|.*_pdrop|.*layerdrop|(?:torch_)?dtype|transformers_version|architectures"
    r"|use_cache|quantization_config|output_.*|return_dict|gradient_checkpointing|.*aux_loss.*|auto_map|tokenizer_class"
    r"|pretraining_tp|initializer_range|.*_version|use_mamba_kernels|id2label|label2id|num_labels|problem_type"
    r"|finetuning_task|task_specific_params"
)


def copy_beside_weights(source: Path, target: Path, field: str, only_missing: bool = False) -> None:
    """Copy configuration, tokenizer and the rest of a model's folder; no weights, and no model card.

    The configuration of a quantised model becomes that of the dequantised one. only_missing: leave the files alone that
    ``target`` has, a saved tokenizer's among them, and out what is in folders, where a training may have left its
    checkpoints, ``TOKEN_MAPS``, and a processor's chat template where the tokenizer has got another one. Permissions
    are those of new files. Raises UserError naming ``field``.
    """
    is_quantised = read_quantisation(source, field) is not None
    templates = chat_templates(target)
    is_written_otherwise = bool(templates) and of_tokenizer(templates) != of_tokenizer(chat_templates(source))

    def is_left_out(file: Path) -> bool:
        if file.is_dir():
            return only_missing or file.name in FOLDERS
        if only_missing and (file.name in TOKEN_MAPS or (target / file.relative_to(source)).exists()):
            return True
        return file == source / CARD or any(fnmatch(file.name, pattern) for pattern in WEIGHTS)

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if is_left_out(Path(folder, name))}

    has_config = (target / CONFIG_NAME).exists()
    target.mkdir(parents=True, exist_ok=True)
    mode = target.stat().st_mode
    try:
        shutil.copytree(source, target, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    except shutil.Error as error:
        first = error.args[0][0]
        problem = f"cannot be copied ({first[2]})"
        raise UserError(field, str(first[0]), problem, "remove it or make it readable") from error
    finally:
        target.chmod(mode)
    if is_quantised and not (only_missing and has_config):
        write_json_atomic(target / CONFIG_NAME, plain_configuration(source, field))
    if only_missing and is_written_otherwise:
        write_chat_templates(target, templates)


def check_same_configuration(base: Path, tuned: Path) -> None:
    """Raise UserError, naming ``TUNED``, where two models of the same weights would compute differently: in a key of
    their (text model's) configurations that both have, or in rotary scaling that one has. A model without one, or with
    its own code, is read as its file has it."""
    try:
        old, new = (_defaults_filled(*model) for model in ((base, "BASE"), (tuned, "TUNED")))
    except UserError:
        old, new = (_as_stored(*model) for model in ((base, "BASE"), (tuned, "TUNED")))
    for key in sorted({*(old.keys() & new.keys()), "rope_scaling"}):
        if old.get(key) != new.get(key) and _is_computed(key, new):
            problem = f"has {key} {new.get(key)!r:.200} in {CONFIG_NAME}, and the base {old.get(key)!r:.200}"
            remedy = "a patch holds weights and chat templates alone: keep the whole tuned model"
            raise UserError("TUNED", str(tuned), problem, remedy)


def _is_computed(key: str, configuration: Mapping[str, Any]) -> bool:
    """Whether a logit may depend on a key of a configuration."""
    if key == "max_position_embeddings":  # scaled and learnt positions follow from it, plain rotary ones do not
        rotary = configuration.get("rope_parameters")
        return not (isinstance(rotary, dict) and rotary.get("rope_type") == "default")
    if key == "router_jitter_noise":  # noise of training; PhiMoE's routers compare logits with it
        return configuration.get("model_type") == "phimoe"
    return not UNCOMPUTED.fullmatch(key)


def _defaults_filled(folder: Path, field: str) -> dict[str, Any]:
    """The text model's configuration with the defaults of its class: transformers 5 writes other keys than 4 did."""
    from esi_ds.models.folder import ModelSource, load_model_config  # imports transformers

    config: dict[str, Any] = load_model_config(ModelSource(str(folder), field=field)).get_text_config().to_dict()
    return config


def _as_stored(folder: Path, field: str) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    content = read_configuration(file, field, "mend it") if file.is_file() else {}
    return text if isinstance(text := content.get("text_config"), dict) else content


def name_dtype(folder: Path, dtype: torch.dtype, field: str) -> None:
    """Have the configuration name the dtype of most weights: transformers would round them to another one."""
    file = folder / CONFIG_NAME
    content = read_configuration(file, field, "mend it") if file.is_file() else {}
    sections = [content]
    while isinstance(text := sections[-1].get("text_config") or sections[-1].get("thinker_config"), dict):
        sections.append(text)
    keys = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    name = str(dtype).removeprefix("torch.")
    if any(section[key] != name for section, key in keys):
        for section, key in keys:
            section[key] = name
        write_json_atomic(file, content)
