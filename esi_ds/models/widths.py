"""The widths of an architecture that the memory of a row depends on, from its configuration."""

from __future__ import annotations

from transformers import PretrainedConfig

from esi_ds.core.batch_size import Widths
from esi_ds.models.roles import experts_per_token


def widths(config: PretrainedConfig) -> Widths:
    """Of the text model. Where a configuration does not say, the usual ratio stands in: an MLP of four times the width,
    and keys and values as wide as a token."""
    text = config.get_text_config()

    def first(*names: str, default: int = 0) -> int:
        """The first of these attributes that is a number; of one number for each layer, the largest."""
        for name in names:
            value = getattr(text, name, None)
            if isinstance(value, (list, tuple)) and value and all(isinstance(entry, int) for entry in value):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    hidden = first("hidden_size", "d_model", "n_embd", default=1)
    heads = first("num_attention_heads", "decoder_attention_heads", "n_head", default=1)
    latent = first("kv_lora_rank")  # kept instead of keys and values, beside the keys' rotary part
    whole = 2 * first("num_key_value_heads", default=heads) * first("head_dim", default=-(-hidden // heads))
    inner = first("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", default=4 * hidden)
    routed = experts_per_token(text) * first("moe_intermediate_size", "intermediate_size", default=inner)
    shared = first("n_shared_experts", default=0) * first("moe_intermediate_size") + first(
        "shared_expert_intermediate_size", default=0
    )
    return Widths(
        layers=first("num_hidden_layers", "decoder_layers", "n_layer", default=1),
        hidden=hidden,
        inner=max(inner, routed + shared),
        cache=latent + first("qk_rope_head_dim") if latent else whole,
        vocabulary=first("vocab_size", default=1),
    )
