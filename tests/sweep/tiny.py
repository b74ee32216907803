"""A tiny model of every causal architecture that transformers knows, from its own config class.

Sizes are set by the names that config classes give them; OVERRIDES holds what an architecture wants besides. Every
kind of layer of ``LAYER_LISTS`` appears at least once, and so does every mixture but Doge's, which is not causal.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
MAX_NUMEL = 3_000_000  # above it a size has escaped the shrinking
NUM_EXPERTS = 5  # no other size: a matrix with five rows belongs to a router
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 32, 4, 2, 8, 512

SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim"), HIDDEN
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "ffn_hidden_size",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "dff",
            "intermediate_size_mlp",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "dim_ff",
            "block_ff_dim",
            "feed_forward_size",
            "mlp_hidden_size",
        ),
        24,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim", "dim_head", "d_kv"), HEAD_DIM),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "seq_length"), POSITIONS),
    "rotary_dim": 4,
    "mamba_d_state": 8,
    "state_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "zero_expert_num": 2,
    "index_head_dim": 8,
    "index_n_heads": 16,  # with few, scores of exactly 0 are tied, and their order is arbitrary
    "index_topk": 16,
    "image_size": 28,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
}
SECTIONS = (
    "text_config",
    "vision_config",
    "audio_config",
    "encoder_config",
    "decoder_config",
    "global_config",
    "patcher_config",
    "ffn_config",
    "attn_config",
)
OPTIONAL = ("q_lora_rank",)  # None is a setting of its own
CAUSAL = ("is_decoder", "use_causal_mask", "causal")  # encoders that can be decoders: only those are language models
NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_GEMMA4 = {
    "vocab_size_per_layer_input": 343,
    "hidden_size_per_layer_input": 8,
    "per_layer_config": {1: {"head_dim": 16}},
}
_GEMMA3N = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": [24] * 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "vocab_size_per_layer_input": 343,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_count": 2,
    "hc_lowrank": 8,
}
_BYTES = {"vocab_size": 343, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 8}
_BLT = _BYTES | {"num_key_value_heads": 4, "num_hidden_layers": 1}
_GEMMA4_MOE = _GEMMA4 | {"enable_moe_block": True}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "blt": {
        "cross_attn_k": 1,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": _BLT | {"hidden_size_global": 32, "cross_attn_k": 1},
        "decoder_config": _BLT | {"hidden_size_global": 32, "cross_attn_k": 1},
        "global_config": _BLT | {"encoder_cross_output_size": None},
        "patcher_config": _BLT,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {
        "text_config": {"head_dim": 16},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_input_size": HIDDEN},
    },
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4_text": _GEMMA4_MOE,
    "gemma4": {"text_config": _GEMMA4_MOE},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_assistant": {"text_config": {"per_layer_config": {1: {"head_dim": 16}}}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "per_layer_config": {1: {"head_dim": 16}}}},
    "flint": {"mlp_only_layers": [0]},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "minimax": {"num_key_value_heads": HEADS},  # its fused qkv then has as many rows as a stacked one
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1,
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        }
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 400,
        "shape_vocab_size": 400,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm": {"emb_dim": 32, "causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 2,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def shrink(defaults: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Small values for what a config (or a section of one) holds under a known name."""
    changes: dict[str, Any] = {}
    for key, value in defaults.items():
        is_size = isinstance(value, int) or (value is None and key not in OPTIONAL)
        if key in SIZES and is_size:
            changes[key] = SIZES[key]
        elif key == "vocab_size":
            changes |= {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        elif key in SECTIONS and isinstance(value, dict):
            changes[key] = value | shrink(value, vocab_size)
        elif key == "per_layer_config":  # by the numbers of layers that are not there now
            changes[key] = {}
        elif key in CAUSAL and value is not None:
            changes[key] = True
    if "qk_rope_head_dim" in changes and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = HEADS  # multi-head latent attention: each head has keys of its own
    return changes | shorten(defaults)


def shorten(defaults: dict[str, Any]) -> dict[str, Any]:
    """As many layers as there are kinds of them, at least two; lists with an entry per layer to match."""
    kinds = {key: list(dict.fromkeys(defaults[key])) for key in LAYER_LISTS if defaults.get(key)}
    if not kinds:
        return {}
    num_layers = max(2, *(len(values) for values in kinds.values()))
    lists = {key: (values * num_layers)[:num_layers] for key, values in kinds.items()}
    return lists | {key: num_layers for key in NUM_LAYERS if key in defaults}


def tiny_config(model_type: str, vocab_size: int) -> PretrainedConfig:
    """A config of this type with a few ten thousand weights."""
    config_class = CONFIG_MAPPING[model_type]
    changes = shrink(config_class().to_dict(), vocab_size)
    changes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return config_class(**merged(changes, OVERRIDES.get(model_type, {})))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, section by section."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) and key in SECTIONS else value
    return result


def build(model_type: str, folder: Path, tokenizer: PreTrainedTokenizerFast, extra_rows: int = 3) -> PreTrainedModel:
    """A random tiny model, saved with its tokenizer. Its matrices are large enough for every part to matter.

    extra_rows: logits beyond the tokenizer, as padded vocabularies have. Raises ValueError where sizes have escaped.
    """
    config = tiny_config(model_type, len(tokenizer) + extra_rows)
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if numel > MAX_NUMEL:
        raise ValueError(f"the tiny model has {numel} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def randomise(model: PreTrainedModel) -> None:
    """Matrices get normal values, everything else keeps its initial ones plus a little noise."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            is_matrix = isinstance(module, (nn.Linear, nn.Embedding)) or parameter.ndim == 3
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                if is_matrix and parameter.ndim > 1:
                    scale = 0.6 if isinstance(module, nn.Embedding) else 1.2 / math.sqrt(parameter.shape[-1])
                    parameter.copy_(scale * noise)
                else:
                    parameter.add_(0.1 * noise)
