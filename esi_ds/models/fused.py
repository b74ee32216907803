"""How matrices that are fused into one weight lie in it, known by the class of the layer that takes them apart.

A name and a shape do not tell: a ``qkv_proj`` of 3 · H rows is stacked q, k, v in Phi-3, four blocks of q, v, k in
CodeGen, and q, k, v of one head after another in MiniMax. Each row of the tables below is read off transformers' code
(5.23) and proven by a test that runs the layer and sees which of q, k and v, or of gate and up, each row is
(tests/unit/test_fused.py). A layer whose class is not here, such as a model's own code, has no known layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from esi_ds.core.units import Unit

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig


class Layout(NamedTuple):
    """The outputs of a fused projection: ``repeat`` times the parts, one after another.

    parts: (role, number of outputs). transposed: whether the weight is [in, out], as transformers' Conv1D has it.
    """

    repeat: int
    parts: tuple[tuple[str, int], ...]
    transposed: bool = False

    @property
    def num_outputs(self) -> int:
        """Outputs of the projection."""
        return self.repeat * self.period

    @property
    def period(self) -> int:
        """Outputs after which the parts repeat."""
        return sum(size for _, size in self.parts)


Q, K, V = "attention.q", "attention.k", "attention.v"
CODEGEN_BLOCKS = 4  # ``mp_num`` in modeling_codegen.py: the number of TPU cores it was trained on


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """(heads of q, heads of k and v, weights of a head)."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _q_k_v(heads: int, key_heads: int, dim: int) -> Layout:
    return Layout(1, ((Q, heads * dim), (K, key_heads * dim), (V, key_heads * dim)))


def _stacked(config: PretrainedConfig) -> Layout:
    return _q_k_v(*_heads(config))


def _by_head(config: PretrainedConfig) -> Layout:
    heads, _, dim = _heads(config)
    return Layout(heads, ((Q, dim), (K, dim), (V, dim)))


def _codegen(config: PretrainedConfig) -> Layout:
    heads, _, dim = _heads(config)
    size = heads * dim // CODEGEN_BLOCKS
    return Layout(CODEGEN_BLOCKS, ((Q, size), (V, size), (K, size)))


def _columns(config: PretrainedConfig) -> Layout:
    return _q_k_v(1, 1, config.hidden_size)._replace(transposed=True)


def _falcon(config: PretrainedConfig) -> Layout:
    if not config.new_decoder_architecture:
        return _gpt_bigcode(config)
    (heads, _, dim), groups = _heads(config), config.num_kv_heads
    return Layout(groups, ((Q, heads // groups * dim), (K, dim), (V, dim)))


def _gpt_bigcode(config: PretrainedConfig) -> Layout:
    heads, _, dim = _heads(config)
    return _q_k_v(heads, 1, dim) if config.multi_query else _by_head(config)


def _dbrx(config: PretrainedConfig) -> Layout:
    heads, _, dim = _heads(config)
    return _q_k_v(heads, config.attn_config.kv_n_heads, dim)


def _gated_query(config: PretrainedConfig) -> Layout:
    """q of each head with the gate of its output; the gate is of no kind that has a role."""
    heads, _, dim = _heads(config)
    return Layout(heads, ((Q, dim), ("other", dim)))


# (class of the attention, name of its projection) → layout. The config is the text model's.
ATTENTION: dict[tuple[str, str], Callable[[PretrainedConfig], Layout]] = {
    ("Phi3Attention", "qkv_proj"): _stacked,
    ("Phi4MultimodalAttention", "qkv_proj"): _stacked,
    ("MptAttention", "Wqkv"): _stacked,
    ("DbrxAttention", "Wqkv"): _dbrx,
    ("GPTNeoXAttention", "query_key_value"): _by_head,
    ("GPTNeoXJapaneseAttention", "query_key_value"): _by_head,
    ("BloomAttention", "query_key_value"): _by_head,
    ("PersimmonAttention", "query_key_value"): _by_head,
    ("FalconAttention", "query_key_value"): _falcon,
    ("FalconFlashAttention2", "query_key_value"): _falcon,
    ("MiniMaxLightningAttention", "qkv_proj"): _by_head,
    ("CodeGenAttention", "qkv_proj"): _codegen,
    ("GPT2Attention", "c_attn"): _columns,
    ("Attention", "c_attn"): _columns,  # openai-gpt
    ("GPTBigCodeAttention", "c_attn"): _gpt_bigcode,
    **{
        (f"{family}Attention", "q_proj"): _gated_query
        for family in ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe", "Qwen4ExpText")
    },
}
# (class, name of its projection) of gated blocks whose gate is the first half of the rows and whose up is the second.
GATE_UP = frozenset(
    {
        ("Phi3MLP", "gate_up_proj"),
        ("Phi4MultimodalMLP", "gate_up_proj"),
        ("GlmMLP", "gate_up_proj"),
        ("Glm4MLP", "gate_up_proj"),
        ("Zamba2MLP", "gate_up_proj"),
        ("MiniMaxM3VLDenseMLP", "gate_up_proj"),
        ("ModernBertDecoderMLP", "Wi"),
        ("GraniteMoeSharedMLP", "input_linear"),
        ("GraniteMoeHybridMLP", "input_linear"),
        ("GraniteMoeSWAMLP", "input_linear"),
    }
)


def is_known_code(module: nn.Module) -> bool:
    """Whether a module's class is transformers' own, which is what the tables here were read off."""
    return type(module).__module__.startswith("transformers.models.")


def has_gate_up(owner: nn.Module, projection: str) -> bool:
    """Whether a projection of a gated block is known to hold gate in the first half of its rows, up in the second."""
    return is_known_code(owner) and (type(owner).__name__, projection) in GATE_UP


def attention_layout(owner: nn.Module, projection: str, config: PretrainedConfig) -> Layout | None:
    """The layout of a projection of an attention; None where it is not fused, or not known to be.

    owner: the module that the projection belongs to. config: of the whole model.
    """
    read = ATTENTION.get((type(owner).__name__, projection)) if is_known_code(owner) else None
    return None if read is None else read(config.get_text_config(decoder=True))


def units_of(name: str, shape: tuple[int, ...], layout: Layout, layer: int | None) -> tuple[Unit, ...] | None:
    """The matrices of a fused weight [out, in], or [in, out] where transposed; None if the layout has another size."""
    rows, columns = shape
    if layout.transposed:
        if layout.repeat != 1 or layout.num_outputs != columns:
            return None
        runs = [(size, rows, columns) for _, size in layout.parts]  # length, count and stride of every part
        scale = 1
    else:
        if layout.num_outputs != rows:
            return None
        stride = layout.period * columns if layout.repeat > 1 else 0
        runs = [(size * columns, layout.repeat, stride) for _, size in layout.parts]
        scale = columns
    units, start = [], 0
    for (role, size), (length, count, stride) in zip(layout.parts, runs, strict=True):
        part = "gate" if role == "other" else role.rpartition(".")[2]
        units.append(Unit(f"{name}[{part}]", role, layer, None, start * scale, length, count, stride))
        start += size
    return tuple(units)
