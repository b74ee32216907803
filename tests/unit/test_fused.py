"""Every known layout of fused matrices (esi_ds/models/fused.py) against what each row does when the layer runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CodeGenConfig, Phi3Config, PreTrainedModel
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconFlashAttention2

from esi_ds.core.units import Parameter
from esi_ds.models import fused
from esi_ds.models.roles import describe, towers, unrecognised

sys.path.insert(0, str(ROOT / "tests/sweep"))
import functional  # noqa: E402
import tiny  # noqa: E402

IDS = torch.tensor([[5, 17, 3, 42, 9, 28, 31]])
FUNCTIONS = {"attention.q": "query", "attention.k": "key", "attention.v": "value", "other": "gate"}
# name → (model type, other settings): every branch of every layout in the table.
ATTENTION: dict[str, tuple[str, dict]] = {
    **{
        name: (name, {})
        for name in (
            *("phi3", "phi4_multimodal", "mpt", "dbrx", "gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu"),
            *("codegen", "gpt2", "gpt-sw3", "openai-gpt", "minimax"),
            *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"),
        )
    },
    "falcon, one key for all": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, a key for each head": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    ),
    "falcon, groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode, one key for all": ("gpt_bigcode", {"multi_query": True}),
    "gpt_bigcode, a key for each head": ("gpt_bigcode", {"multi_query": False}),
    "codegen, two heads a block": ("codegen", {"n_head": 8}),
    "phi3, a key for each head": ("phi3", {"num_key_value_heads": 4}),
}
GATED = (
    *("phi3", "phi4_multimodal", "glm", "glm4", "zamba2", "minimax_m3_vl_text", "modernbert-decoder"),
    *("granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
)


@cache
def model_of(model_type: str, settings: tuple[tuple[str, object], ...] = ()) -> PreTrainedModel:
    config = tiny.tiny_config(model_type, 343)
    for key, value in settings:
        setattr(config, key, value)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tiny.randomise(model)
    return model


def owner_of(model: nn.Module, parameter: Parameter) -> tuple[nn.Module, nn.Module, str]:
    """(the module around a projection, the projection, its name)."""
    projection = parameter.name.rpartition(".")[0]
    owner, _, name = projection.rpartition(".")
    return model.get_submodule(owner), model.get_submodule(projection), name


def fused_parameters(model: PreTrainedModel) -> Iterator[Parameter]:
    for parameter in describe(model):
        if parameter.name.endswith(".weight") and parameter.scored:
            owner, _, name = owner_of(model, parameter)
            if (type(owner).__name__, name) in fused.ATTENTION:
                yield parameter


def outputs_of(parameter: Parameter, number: int, projection: nn.Module) -> Tensor:
    """Numbers of a projection's outputs that a unit makes."""
    positions = parameter.units[number].elements(torch.arange(parameter.numel))
    if isinstance(projection, nn.Linear):
        return (positions // parameter.shape[1]).unique()
    return (positions % parameter.shape[1]).unique()  # Conv1D is [in, out]


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "minimax"])
def test_every_output_is_what_its_unit_says(name: str) -> None:
    model_type, settings = ATTENTION[name]
    model = model_of(model_type, tuple(settings.items()))
    parameters = list(fused_parameters(model))
    assert parameters
    for parameter in parameters:
        owner, projection, _ = owner_of(model, parameter)
        many = functional.output_gradients(model, projection, owner, IDS)
        alone = functional.output_gradients(model, projection, owner, IDS[:, :1])
        assert many is not None and alone is not None
        functions = functional.row_functions(many, alone)
        outputs = [outputs_of(parameter, number, projection) for number in range(len(parameter.units))]
        assert len(outputs) > 1 and torch.cat(outputs).sort().values.equal(torch.arange(len(functions)))
        for unit, numbers in zip(parameter.units, outputs, strict=True):
            assert {functions[number] for number in numbers.tolist()} == {FUNCTIONS[unit.role]}, unit.name
        assert parameter.name not in unrecognised([parameter])


def test_lightning_attention_has_query_key_and_value_by_head() -> None:
    """Without a softmax keys count for a token alone, too. A value reaches one channel of its head, a key all of them,
    a query only the last token."""
    model = model_of("minimax")
    (parameter,) = list(fused_parameters(model))
    owner, projection, _ = owner_of(model, parameter)
    kept: dict[str, Tensor] = {}
    hooks = [
        projection.register_forward_hook(lambda module, inputs, output: kept.update(projected=output)),
        owner.norm.register_forward_pre_hook(lambda module, inputs: kept.update(mixed=inputs[0])),
    ]
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    last = kept["mixed"][0, -1]
    head_dim = owner.head_dim
    reached = torch.zeros(
        parameter.shape[0], dtype=torch.int64
    )  # how many channels of the last token an output reaches
    for channel in range(len(last)):
        (gradient,) = torch.autograd.grad(last[channel], kept["projected"], retain_graph=True)
        before = gradient[0, :-1].abs().amax(0)
        reached += before > 1e-6 * gradient.abs().max()
    expected = {"attention.q": 0, "attention.k": head_dim, "attention.v": 1}
    for number, unit in enumerate(parameter.units):
        assert set(reached[outputs_of(parameter, number, projection)].tolist()) == {expected[unit.role]}, unit.name


@pytest.mark.parametrize("model_type", GATED)
def test_every_half_is_gate_or_up_as_its_unit_says(model_type: str) -> None:
    model = model_of(model_type)
    parameters = describe(model)
    names = [
        parameter.name
        for parameter in parameters
        if len({unit.role.rpartition(".")[2] for unit in parameter.units} & {"gate", "up"}) == 2
    ]
    assert names
    assert list(functional.gating_problems(model, parameters, IDS)) == []


def test_every_layout_is_proven() -> None:
    """A row of the tables without a test above would be a claim."""
    attention, gated = set(), set()
    for model_type, settings in ATTENTION.values():
        model = model_of(model_type, tuple(settings.items()))
        for parameter in fused_parameters(model):
            owner, _, name = owner_of(model, parameter)
            attention.add((type(owner).__name__, name))
    for model_type in GATED:
        model = model_of(model_type)
        gated |= {
            (type(module).__name__, name)
            for module in model.modules()
            for name, _ in module.named_children()
            if fused.has_gate_up(module, name)
        }
    assert FalconFlashAttention2._split_heads is FalconAttention._split_heads  # needs a GPU to run
    attention.add(("FalconFlashAttention2", "query_key_value"))
    assert attention == set(fused.ATTENTION) and gated == set(fused.GATE_UP)


def test_codegen_by_its_own_code() -> None:
    """Four blocks of [q | v | k] (modeling_codegen.py: mp_num)."""
    config = CodeGenConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64, n_ctx=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (parameter,) = (p for p in describe(model) if p.name.endswith("qkv_proj.weight"))
    true = torch.arange(parameter.numel).reshape(4, 3, 8, 32)
    for unit, index in zip(parameter.units, (0, 1, 2), strict=True):
        assert unit.role == f"attention.{'qvk'[index]}"
        positions = unit.elements(torch.arange(parameter.numel))
        assert positions.equal(true[:, index].flatten())


class OwnAttention(nn.Module):
    """A model's own code with a projection of a known name: nobody knows how it is packed."""

    def __init__(self, name: str, rows: int, width: int):
        super().__init__()
        setattr(self, name, nn.Linear(width, rows, bias=False))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("qkv_proj", 96), ("query_key_value", 96), ("Wqkv", 96), ("c_attn", 96), ("gate_up_proj", 48), ("in_proj", 64)],
)
def test_what_nobody_knows_is_called_unknown(name: str, rows: int) -> None:
    """Even under a class name and with sizes that would fit, and inside experts."""
    block = type("Phi3Attention", (OwnAttention,), {})(name, rows, 32)
    model = nn.Module()
    model.config = Phi3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].self_attn = block
    model.layers[0].experts = nn.ModuleList([OwnAttention("gate_up_proj", 48, 32)])
    (one, other) = describe(model)
    assert [unit.role for unit in one.units + other.units] == ["other", "other"]
    assert unrecognised([one, other]) == [one.name, other.name]


def test_fused_experts_of_other_peoples_code_are_unknown() -> None:
    """One matrix for each expert, gate and up together."""
    model = nn.Module()
    model.config = Phi3Config(pad_token_id=0)
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 4))
    model.experts.down_proj = nn.Parameter(torch.zeros(3, 4, 4))
    block = nn.Module()
    block.config, block.mlp = model.config, model
    gate_up, down = describe(block)
    assert [(unit.role, unit.expert, unit.numel) for unit in gate_up.units] == [("other", e, 32) for e in range(3)]
    assert [unit.role for unit in down.units] == ["expert.down"] * 3 and unrecognised([gate_up, down]) == [gate_up.name]


def meta(model_type: str, **settings: object) -> PreTrainedModel:
    config = tiny.tiny_config(model_type, 343)
    for key, value in settings.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def roles_of(model: nn.Module) -> dict[str, str]:
    """Parameter → roles of its units, or its own where it is not scored."""
    return {p.name: ",".join(dict.fromkeys(unit.role for unit in p.units)) or p.role for p in describe(model)}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "xmod", "roformer", "git"])
def test_dense_is_not_always_attentions(model_type: str) -> None:
    """BERT and its heirs call five different matrices ``dense``."""
    roles = roles_of(meta(model_type, is_decoder=True))
    for name, role in roles.items():
        if name.endswith("dense.weight") and role != "tower":
            path = name.split(".")
            expected = "mlp.up" if path[-3] == "intermediate" else "mlp.down" if path[-3] == "output" else "other"
            assert role == ("attention.o" if "attention" in path else expected), name
        if ".self." in name and name.endswith("weight"):
            assert role == {"query": "attention.q", "key": "attention.k", "value": "attention.v"}[name.split(".")[-2]]
    assert {"attention.o", "mlp.up", "mlp.down", "other"} - {"git": {"other"}}.get(model_type, set()) <= set(
        roles.values()
    )


@pytest.mark.parametrize(
    "model_type", ["mamba", "mamba2", "jamba", "bamba", "lfm2_moe", "xlstm", "opt", "bart", "minimax"]
)
def test_the_output_of_a_recurrence_is_not_attentions(model_type: str) -> None:
    for name, role in roles_of(meta(model_type)).items():
        if name.endswith("out_proj.weight"):
            assert (role == "attention.o") == ("attn" in name), name


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta", "roberta", "gpt2", "bert"])
def test_a_tied_head_is_an_embedding_under_whatever_name(model_type: str) -> None:
    roles = roles_of(meta(model_type, is_decoder=True, tie_word_embeddings=True))
    assert "head" not in roles.values()


@pytest.mark.parametrize(
    "model_type", ["gemma3", "got_ocr2", "moss_transcribe_diarize", "phi4_multimodal", "git", "fuyu"]
)
def test_what_text_does_not_reach_is_not_scored(model_type: str) -> None:
    """Proven by a backward pass over text: what is a tower's has no gradient, what is scored has one."""
    model = model_of(model_type)
    assert towers(model)
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    parameters = describe(model)
    named = dict(model.named_parameters())
    for parameter in parameters:
        gradient = named[parameter.name].grad
        has_gradient = gradient is not None and bool(gradient.count_nonzero())
        if parameter.role == "tower":
            assert not has_gradient, parameter.name
        elif parameter.scored:
            assert has_gradient, parameter.name
    model.zero_grad()


@pytest.mark.parametrize("model_type", ["llama", "whisper", "blt", "gemma4_text", "moshi", "trocr"])
def test_no_tower_where_text_goes(model_type: str) -> None:
    assert towers(meta(model_type)) == [] and "tower" not in roles_of(meta(model_type)).values()


def test_the_class_of_the_case() -> None:
    assert fused.is_known_code(CodeGenAttention(CodeGenConfig(n_embd=32, n_head=4, rotary_dim=4), layer_idx=0))
    assert not fused.is_known_code(OwnAttention("qkv_proj", 3, 1))
