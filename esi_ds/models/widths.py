"""The widths of an architecture that the memory of a row depends on, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from esi_ds.core.batch_size import Widths
from esi_ds.models.roles import experts_per_token, layer_configs


def widths(config: PretrainedConfig) -> Widths:
    """The widths of the text model. Where a configuration does not give one, the usual ratio is assumed: an MLP of four
    times the width, and keys and values as wide as a token. transformers writes the attention that it
    computes into the configuration as it makes the model: ``eager`` for architectures that no kernel serves (gpt-oss,
    Gemma 2)."""
    text = config.get_text_config()
    layers = layer_configs(text)

    def first(*names: str, default: int = 0, of: Sequence[PretrainedConfig] = layers) -> int:
        """The first of these attributes that is a number, or the largest if it is one number for each layer."""
        for name in names:
            values = [getattr(layer, name, None) for layer in of]
            numbers = [n for v in values for n in (v if isinstance(v, (list, tuple)) else (v,)) if type(n) is int]
            if max(numbers, default=0) > 0:
                return max(numbers)
        return default

    hidden = first("hidden_size", "d_model", "n_embd", default=1)
    heads = first("num_attention_heads", "decoder_attention_heads", "n_head", default=1)
    latent = first("kv_lora_rank")  # kept instead of keys and values, beside the keys' rotary part
    whole = max(
        2
        * first("num_key_value_heads", default=heads, of=[layer])
        * first("head_dim", default=-(-hidden // heads), of=[layer])
        for layer in layers
    )
    inner = first("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", default=4 * hidden)
    experts = experts_per_token(text)
    routed = experts * first("moe_intermediate_size", "intermediate_size", default=inner)
    shared = first("n_shared_experts", default=0) * first("moe_intermediate_size") + first(
        "shared_expert_intermediate_size", default=0
    )
    return Widths(
        layers=first("num_hidden_layers", "decoder_layers", "n_layer", default=1),
        hidden=hidden,
        inner=max(inner, routed + shared),
        cache=latent + first("qk_rope_head_dim") if latent else whole,
        vocabulary=first("vocab_size", default=1),
        written_heads=heads if text._attn_implementation == "eager" else 0,
        experts=experts,
    )
