"""Models that are never allocated: names, shapes and counts of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource, stored_weights
from esi_ds.models.roles import describe
from esi_ds.models.ties import untie
from esi_ds.reading import reading

CHUNK = 8192  # tokens that a Llama 4 attends to at once in its layers with chunks


def meta_model(
    config: PretrainedConfig,
    source: ModelSource,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    dtype: str | None = None,
) -> PreTrainedModel:
    """The model of an architecture, on the meta device.

    Weights that the configuration ties are tied unless the checkpoint, where it is on this machine, holds different
    values. dtype: a key of ``MODEL_DTYPES``, in which the weights are loaded and therefore compared; None: as stored.

    Raises UserError for an architecture that ``auto_class`` does not take.
    """
    problem = f"is not a model for {auto_class.__name__}"
    remedy = f"give a folder that transformers' {auto_class.__name__} reads"
    with reading(source.field, config.name_or_path or config.model_type, remedy, problem), torch.device("meta"):
        model = _from_config(config, source, auto_class)
    model.tie_weights()
    if model.all_tied_weights_keys:
        untie(model, stored_weights(source), MODEL_DTYPES[dtype] if dtype is not None else None)
    return model


def _from_config(
    config: PretrainedConfig, source: ModelSource, auto_class: type[_BaseAutoModelClass]
) -> PreTrainedModel:
    """``auto_class.from_config``, with code from the folder that the configuration was read from: transformers would
    take that of the main branch of ``config.name_or_path``, which may have moved."""
    code = getattr(config, "auto_map", {}).get(auto_class.__name__)
    if not (source.trust_remote_code and code):
        return auto_class.from_config(config, trust_remote_code=source.trust_remote_code)
    folder, commit = source.folder(only_local=True), source.code_revision(only_local=True)
    model_class: type[PreTrainedModel] = get_class_from_dynamic_module(code, folder, code_revision=commit)
    return model_class._from_config(config)


def model_bytes(
    config: PretrainedConfig, source: ModelSource, dtype: str, auto_class: type[_BaseAutoModelClass]
) -> int:
    """Bytes of all weights in ``dtype``, a key of ``MODEL_DTYPES``. Raises UserError as ``meta_model`` does."""
    model = meta_model(config, source, auto_class)
    return sum(parameter.numel() for parameter in model.parameters()) * MODEL_DTYPES[dtype].itemsize


def complete_chunks(model: PreTrainedModel) -> None:
    """Say how long the chunks of a Llama 4's attention are, where its configuration does not.

    Llama Guard 4's leaves it out, and transformers then computes nothing; its model card sets 8192, Llama 4's own.
    """
    text = model.config.get_text_config()
    if getattr(text, "attention_chunk_size", 0) is None and "chunked_attention" in (text.layer_types or ()):
        text.attention_chunk_size = CHUNK


def meta_parameters(
    config: PretrainedConfig, source: ModelSource, roles: Mapping[str, str] | None = None, dtype: str | None = None
) -> tuple[Parameter, ...]:
    """Names, shapes, roles and logical matrices of a model that is never allocated.

    roles: ``model.roles``. dtype: as for ``meta_model``. Raises UserError for an architecture that is not a causal
    language model's, and for a parameter without elements, which ZeRO-3 cannot gather.
    """
    parameters = describe(meta_model(config, source, dtype=dtype), roles=roles)
    if empty := [parameter.name for parameter in parameters if parameter.numel == 0]:
        problem, remedy = f"has a parameter without elements ({empty[0]})", "make it a buffer in the model's code"
        raise UserError(source.field, source.path, problem, remedy)
    return parameters
