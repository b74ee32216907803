"""Models that are never allocated: names, shapes and counts of their weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


def meta_model(
    config: PretrainedConfig, auto_class: type = AutoModelForCausalLM, trust_remote_code: bool = False
) -> nn.Module:
    """On the meta device. trust_remote_code: of the section of the experiment's config that names the model."""
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model
