"""Models that are never allocated: names, shapes and counts of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.models.roles import describe


def meta_model(
    config: PretrainedConfig,
    auto_class: type = AutoModelForCausalLM,
    trust_remote_code: bool = False,
    field: str = "model.path",
) -> nn.Module:
    """On the meta device. trust_remote_code: of the section of the experiment's config that names the model, at
    ``field``. Raises UserError for an architecture that the class does not take."""
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        problem = f"is no model for {auto_class.__name__} ({str(error).strip().splitlines()[0]})"
        remedy = f"give a folder that transformers' {auto_class.__name__} reads"
        raise UserError(field, config.name_or_path or config.model_type, problem, remedy) from error
    model.tie_weights()
    return model


def meta_parameters(
    config: PretrainedConfig, roles: Mapping[str, str] | None = None, trust_remote_code: bool = False
) -> tuple[Parameter, ...]:
    """Names, shapes, roles and logical matrices of a model that is never allocated.

    roles: ``model.roles``. trust_remote_code: of the section of the experiment's config that names the model.
    """
    return describe(meta_model(config, trust_remote_code=trust_remote_code), given=roles)
