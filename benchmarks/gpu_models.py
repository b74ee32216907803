"""Random models in the shapes of published ones, for benchmarks.gpu; tiny ones of the same architectures for CPUs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks import ROOT
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

TOKENIZER = ROOT / "examples/models/llama-aligned"  # its 1,536 tokens; the models' further rows are padding
SHARED = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    # A layer of Qwen3-30B-A3B; two of them.
    "Qwen3-MoE": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}
TINY = {
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def shape(name: str, tiny: bool, **changes: Any) -> PretrainedConfig:
    """The configuration of one of ``SHAPES``, or of a tiny model of its architecture."""
    sizes = SHAPES[name] | (TINY if tiny else {}) | changes
    if "num_experts" not in sizes:
        return LlamaConfig(**SHARED, max_position_embeddings=8192, rope_theta=500000.0, **sizes)
    if tiny:
        sizes |= {"moe_intermediate_size": 16, "num_experts": 16, "num_experts_per_tok": 2} | changes
    return Qwen3MoeConfig(**SHARED, max_position_embeddings=8192, **sizes)


def random_model(config: PretrainedConfig, dtype: str, seed: int = 0) -> PreTrainedModel:
    """A model with transformers' initial weights, made on this rank's device, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(runtime.device()):
        return AutoModelForCausalLM.from_config(config, dtype=MODEL_DTYPES[dtype]).eval()


def settings(dtype: str) -> dict[str, Any]:
    """A DeepSpeed config for one rank; the rest as in ``ds_configs/zero3.json``."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def sharded_model(config: PretrainedConfig, dtype: str, seed: int = 0) -> ShardedModel:
    """``random_model`` under ZeRO-3, without a file between."""
    return ShardedModel(random_model(config, dtype, seed), settings(dtype))


def save_model(config: PretrainedConfig, dtype: str, folder: Path) -> None:
    """``random_model`` as a Hugging Face folder, with the tokenizer of the tiny models."""
    random_model(config, dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)


def checkpoint(module: PreTrainedModel, enabled: bool) -> None:
    """Recompute activations in the backward pass of a plain model, or keep them."""
    if enabled:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        module.gradient_checkpointing_disable()
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = enabled
