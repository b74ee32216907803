"""The three architectures: a dense Llama, a Qwen3-MoE with the same vocabulary, and the guard, a smaller Llama."""

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

CONTEXT = 512  # positions; the longest rendered guard prompt with a 64-token reply stays well below


def shared(tokenizer: Tokenizer) -> dict[str, Any]:
    """What every architecture has in common: vocabulary, context, untied head, special tokens."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "sdpa",
    }


def build_llama(tokenizer: Tokenizer) -> PreTrainedModel:
    """5 layers, 6 query heads over 2 key-value heads: about 2.2 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            **shared(tokenizer),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
        )
    )


def build_qwen3moe(tokenizer: Tokenizer) -> PreTrainedModel:
    """4 layers, each with 8 experts of which 2 answer a token: about 2.7 M parameters."""
    untyped: dict[str, Any] = {"head_dim": 32, "experts_implementation": "grouped_mm"}  # fields that come as **kwargs
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **shared(tokenizer),
            **untyped,
            hidden_size=160,
            intermediate_size=320,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
        )
    )


def build_guard(tokenizer: Tokenizer) -> PreTrainedModel:
    """4 layers of width 128: about 1.2 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            **shared(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
    )


def initialise(model: PreTrainedModel, tokenizer: Tokenizer) -> PreTrainedModel:
    """Scale the matrices to their widths (HF's fixed 0.02 is small for narrow models) and set how it generates."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = 1 if "embed" in name else parameter.shape[-1]
                parameter.normal_(0.0, 0.05 if "embed" in name else fan_in**-0.5)
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_((2 * model.config.num_hidden_layers) ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


BUILDERS = {"llama": build_llama, "qwen3moe": build_qwen3moe, "guard": build_guard}


def build(name: str, tokenizer: Tokenizer, seed: int) -> PreTrainedModel:
    """A freshly initialised fp32 model of one architecture."""
    torch.manual_seed(seed)
    return initialise(BUILDERS[name](tokenizer), tokenizer)
