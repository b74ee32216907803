"""A model's folder before its weights are loaded: configuration, weights files, context length."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from esi_ds.errors import UserError


def load_model_config(
    path: str, field: str, revision: str | None, trust_remote_code: bool, only_local: bool = False
) -> PretrainedConfig:
    """The architecture of a folder or hub id; ``field`` is the config key to name in an error. only_local: ask no hub,
    read folders and the hub's cache."""
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        raise UserError(field, path, "is no model folder: it holds no config.json", "give a Hugging Face folder")
    try:
        found = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=only_local
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            field,
            path,
            f"holds no model configuration ({str(error).strip().splitlines()[0]})",
            "give a Hugging Face folder or a hub id that can be reached",
        ) from error
    if getattr(found, "quantization_config", None) is not None:
        raise UserError(
            field, path, "is quantised; its weights have no gradient of their own", "give the unquantised model"
        )
    return found


def check_weights(path: str, field: str) -> None:
    """A local folder must hold safetensors (nothing pickled is ever read). Hub ids are checked by the download."""
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(field, path, "holds no *.safetensors weights", "save the model with safe_serialization")


def max_positions(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
