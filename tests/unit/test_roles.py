"""Roles and logical matrices of real architectures, on the meta device, against plain indexing of whole tensors."""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES, model_config
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HunYuanMoEV1Config,
    JetMoeConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from esi_ds.core.units import Parameter
from esi_ds.errors import UserError
from esi_ds.models.roles import (
    correction_biases,
    describe,
    expert_blocks,
    experts_per_token,
    routers,
    unrecognised,
    unrecognised_note,
)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
}


def parameters_of(config, shapes: bool = False) -> dict[str, Parameter]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    full_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()} if shapes else None
    return {parameter.name: parameter for parameter in describe(model, full_shapes)}


def positions(parameter: Parameter, index: int) -> list[int]:
    return parameter.units[index].elements(torch.arange(parameter.numel)).tolist()


CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama_bias": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "phi3": Phi3Config(**SMALL, pad_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, moe_intermediate_size=6, num_experts=4, num_experts_per_tok=2, head_dim=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=6, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=8
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=4, head_dim=4),
    "llama4": Llama4TextConfig(
        **SMALL, intermediate_size_mlp=12, num_local_experts=4, head_dim=4, interleave_moe_layer_step=1
    ),
    **{name: model_config(name, 50) for name in FAMILIES if name not in ("qwen2_moe", "gpt_oss", "llama4")},
    "neox": GPTNeoXConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_units_tile_every_scored_parameter(name: str) -> None:
    offset = 0
    for parameter in parameters_of(CONFIGS[name]).values():
        assert parameter.offset == offset
        offset += parameter.numel
        if parameter.scored:
            parameters = sorted(p for index in range(len(parameter.units)) for p in positions(parameter, index))
            assert parameters == list(range(parameter.numel)), parameter.name


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_scored(name: str) -> None:
    for parameter in parameters_of(CONFIGS[name]).values():
        leaf = parameter.name
        is_unscored = (
            "embed" in leaf
            or "norm" in leaf
            or leaf.endswith("bias")
            or "router" in leaf
            or leaf.endswith("sinks")
            or leaf.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        ) and not leaf.startswith("embed_out")
        assert parameter.scored != is_unscored, (parameter.name, parameter.role)
        if ".experts." in leaf and parameter.scored:
            assert all(unit.role.startswith("expert.") and unit.expert is not None for unit in parameter.units)


def test_tied_head_is_the_embedding_and_untied_is_scored() -> None:
    assert "lm_head.weight" not in parameters_of(CONFIGS["llama_tied"])
    assert parameters_of(CONFIGS["llama_tied"])["model.embed_tokens.weight"].role == "embedding"
    assert parameters_of(CONFIGS["llama"])["lm_head.weight"].role == "head"


def test_fused_experts_are_cut_as_the_checkpoint_names_them() -> None:
    """transformers fuses experts.{e}.{gate,up,down}_proj into [E, 2I, H] and [E, H, I]."""
    parameter = parameters_of(CONFIGS["qwen3_moe"])["model.layers.1.mlp.experts.gate_up_proj"]
    whole = torch.arange(parameter.numel).reshape(parameter.shape)
    for index, unit in enumerate(parameter.units):
        half = whole[unit.expert, :6] if unit.role == "expert.gate" else whole[unit.expert, 6:]
        assert positions(parameter, index) == half.flatten().tolist()
        assert unit.layer == 1


def test_interleaved_and_transposed_experts() -> None:
    parameter = parameters_of(CONFIGS["gpt_oss"])["model.layers.0.mlp.experts.gate_up_proj"]
    whole = torch.arange(parameter.numel).reshape(parameter.shape)  # [E, H, 2I], gate and up alternate
    for index, unit in enumerate(parameter.units):
        expected = whole[unit.expert, :, 0 if unit.role == "expert.gate" else 1 :: 2]
        assert positions(parameter, index) == expected.flatten().tolist()


def test_transposed_experts_whose_module_does_not_say_so() -> None:
    """Llama-4's experts are [E, H, 2I] without transformers' attributes: the shapes decide."""
    parameter = parameters_of(CONFIGS["llama4"])["model.layers.0.feed_forward.experts.gate_up_proj"]
    whole = torch.arange(parameter.numel).reshape(parameter.shape)
    half = parameter.shape[2] // 2
    for index, unit in enumerate(parameter.units):
        expected = whole[unit.expert, :, :half] if unit.role == "expert.gate" else whole[unit.expert, :, half:]
        assert positions(parameter, index) == expected.flatten().tolist()


ATTENTION = {"q_proj": "attention.q", "k_proj": "attention.k", "v_proj": "attention.v", "o_proj": "attention.o"}
LATENT = {
    "q_a_proj": "attention.q_a",
    "q_b_proj": "attention.q_b",
    "kv_a_proj_with_mqa": "attention.kv_a",
    "kv_b_proj": "attention.kv_b",
    "o_proj": "attention.o",
}


@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "qwen3_moe"])
def test_every_matrix_of_the_families_has_its_role(name: str) -> None:
    """Nothing is unknown; shared experts are no routed ones; every router's parameters are the router's."""
    parameters = parameters_of(CONFIGS[name])
    assert unrecognised(list(parameters.values())) == []
    for parameter in parameters.values():
        path = parameter.name.split(".")
        module, roles = path[-2], {unit.role for unit in parameter.units}
        if "self_attn" in path and parameter.scored:
            assert roles == {(LATENT if "deepseek" in name else ATTENTION)[module]}
        elif "shared_expert" in path or "shared_experts" in path:
            assert roles == {f"shared.{module.removesuffix('_proj')}"}
        elif "experts" in path and parameter.scored:
            part = path[-1].removesuffix("_proj")
            assert roles == ({"expert.gate", "expert.up"} if part == "gate_up" else {f"expert.{part}"})
        elif "mlp" in path and parameter.scored:  # DeepSeek's and GLM's first layer
            assert roles == {f"mlp.{module.removesuffix('_proj')}"} and ".0." in parameter.name
        elif module in ("gate", "router", "shared_expert_gate"):
            assert parameter.role == "router"


def test_what_is_unknown_is_named_by_the_config() -> None:
    """Matrices of an unknown kind are reported; a pattern gives them a role, experts in one tensor one matrix each."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4, bias=False)])
            self.w_in = torch.nn.Parameter(torch.zeros(5, 3, 4))

    odd = Odd()
    parameters = describe(odd)
    assert unrecognised(parameters) == ["w_in", "layers.0.weight"]
    note = unrecognised_note(parameters)
    assert note is not None and note.startswith("2 parameters") and "the first: w_in" in note and "model.roles" in note
    parameters = describe(odd, roles={"w_*": "expert.up", "layers.*.weight": "router"})
    assert unrecognised_note(parameters) is None
    assert [(p.role, len(p.units)) for p in parameters] == [("expert.up", 5), ("router", 0)]
    assert [(u.expert, u.start, u.numel) for u in parameters[0].units] == [(e, 12 * e, 12) for e in range(5)]
    for wrong, problem in (
        ({"w_*": "experts.up"}, "is not a role"),
        ({"nowhere": "expert.up"}, "matches no parameter"),
    ):
        with pytest.raises(UserError, match=problem):
            describe(odd, roles=wrong)


def test_fused_qkv_and_gate_up_of_phi3() -> None:
    parameters = parameters_of(CONFIGS["phi3"])
    qkv = parameters["model.layers.0.self_attn.qkv_proj.weight"]
    assert [(unit.role, unit.numel // 16) for unit in qkv.units] == [
        ("attention.q", 16),
        ("attention.k", 8),
        ("attention.v", 8),
    ]
    gate_up = parameters["model.layers.0.mlp.gate_up_proj.weight"]
    assert [(unit.role, unit.start) for unit in gate_up.units] == [("mlp.gate", 0), ("mlp.up", 12 * 16)]


def test_interleaved_qkv_of_neox() -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    parameter = parameters_of(CONFIGS["neox"])[name]
    whole = torch.arange(parameter.numel).reshape(4, 3, 4, 16)  # heads, q/k/v, head_dim, hidden
    for index, unit in enumerate(parameter.units):
        assert unit.role == f"attention.{'qkv'[index]}"
        assert positions(parameter, index) == whole[:, index].flatten().tolist()


def test_given_shapes_stand_in_for_partitioned_parameters() -> None:
    assert parameters_of(CONFIGS["mixtral"], shapes=True) == parameters_of(CONFIGS["mixtral"])


def test_671_billion_parameters_are_described_on_the_meta_device() -> None:
    parameters = parameters_of(DeepseekV3Config()).values()
    assert round(sum(parameter.numel for parameter in parameters) / 1e9) == 671
    assert sum(unit.role.startswith("expert.") for p in parameters for unit in p.units) == 58 * 256 * 3


def test_shared_experts_beside_linear_attention() -> None:
    """Qwen3-Next: experts, shared experts and routers by role; what is of no known kind is named, and a decay of one
    dimension is not scored."""
    from transformers import Qwen3NextConfig

    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = Qwen3NextConfig(
        **{**SMALL, "num_hidden_layers": 4}, **linear, **experts, linear_value_head_dim=8, head_dim=4
    )
    parameters = parameters_of(config)
    block = "model.layers.0.mlp"
    roles = {name: parameters[f"{block}.{name}"].role for name in ("gate.weight", "shared_expert_gate.weight")}
    assert set(roles.values()) == {"router"}
    assert parameters[f"{block}.shared_expert.up_proj.weight"].units[0].role == "shared.up"
    assert [unit.expert for unit in parameters[f"{block}.experts.down_proj"].units] == [0, 1, 2, 3]
    assert parameters["model.layers.0.linear_attn.A_log"].role == "bias"
    strangers = unrecognised(tuple(parameters.values()))
    assert {name.split(".")[4] for name in strangers} == {"conv1d", "in_proj_qkvz", "in_proj_ba"}


LONGCAT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
# family → (configuration, the router of a layer that is asked for its choices, parameters that are routers')
WRAPPING = {
    "hunyuan": (
        HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2, head_dim=4),
        "mlp.gate",
        {"mlp.gate.wg.weight"},
    ),
    "gemma4": (
        Gemma4TextConfig(
            **SMALL,
            head_dim=4,
            global_head_dim=4,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=6,
            hidden_size_per_layer_input=0,
        ),
        "router",
        {"router.proj.weight", "router.scale", "router.per_expert_scale"},
    ),
    "afmoe": (
        AfmoeConfig(**SMALL, head_dim=4, num_experts=4, moe_intermediate_size=6, num_dense_layers=1),
        "mlp.router",
        {"mlp.router.gate.weight", "mlp.expert_bias"},
    ),
    "longcat": (
        LongcatFlashConfig(
            vocab_size=50,
            hidden_size=16,
            num_layers=2,
            num_attention_heads=4,
            ffn_hidden_size=12,
            head_dim=4,
            moe_topk=2,
            n_routed_experts=4,
            zero_expert_num=2,
            expert_ffn_hidden_size=6,
            **LONGCAT,
        ),
        "mlp.router",
        {"mlp.router.classifier.weight"},
    ),
    "jetmoe": (
        JetMoeConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=4,
            num_local_experts=4,
        ),
        None,  # its output is no choice but tokens in the experts' order
        {"mlp.router.layer.weight", "self_attention.experts.router.layer.weight"},
    ),
    "dbrx": (
        DbrxConfig(
            d_model=16,
            n_heads=4,
            n_layers=2,
            vocab_size=50,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "ffn.router",
        {"ffn.router.layer.weight"},
    ),
    "ernie": (
        Ernie4_5_MoeConfig(**SMALL, moe_intermediate_size=6, moe_num_experts=4, moe_k=2),
        "mlp.gate",
        {"mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias"},
    ),
    "granite": (
        GraniteMoeSharedConfig(**SMALL, shared_intermediate_size=10, num_local_experts=4),
        "block_sparse_moe.router",
        {"block_sparse_moe.router.weight"},
    ),
}


@pytest.mark.parametrize("family", WRAPPING)
def test_what_a_router_wraps_is_the_routers(family: str) -> None:
    """Never scored; and where choices are read, the router itself is asked, once a layer."""
    config, router, expected = WRAPPING[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = ".blocks.1." if family == "dbrx" else ".layers.1."
    parameters = {p.name.partition(layer)[2] for p in describe(model) if p.role == "router" and layer in p.name}
    assert parameters == expected
    assert [name.partition(layer)[2] for name in routers(model) if layer in name] == ([router] if router else [])


def test_a_block_named_after_its_router_is_no_router() -> None:
    """Its experts are scored."""

    class RouterBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(4, 2, bias=False)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))

    model = torch.nn.Sequential(RouterBlock())
    assert [p.role for p in describe(model)] == ["router", "other", "other"] and list(routers(model)) == ["0.gate"]


def test_shared_experts_in_one_tensor_are_not_routed_ones() -> None:
    """Inkling's: two of them beside the routed ones, whose numbers they must not take."""

    class Experts(torch.nn.Module):
        def __init__(self, number: int):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                torch.nn.Parameter(torch.zeros(number, *shape)) for shape in ((6, 4), (6, 4), (4, 6))
            )

    model = torch.nn.Module()
    model.experts, model.shared_experts = Experts(3), Experts(2)
    block = torch.nn.Module()
    block.mlp = model
    parameters = {p.name: [(u.role, u.expert, u.numel) for u in p.units] for p in describe(block)}
    for part in ("gate", "up", "down"):
        assert parameters[f"mlp.experts.{part}_proj"] == [(f"expert.{part}", expert, 24) for expert in range(3)]
        assert parameters[f"mlp.shared_experts.{part}_proj"] == [(f"shared.{part}", None, 24)] * 2


def test_a_router_that_the_user_names_is_asked_for_its_choices() -> None:
    block = torch.nn.Module()
    block.choose, block.bank = torch.nn.Linear(4, 3), torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Module()
    model.moe = block
    roles = {"*.choose.*": "router", "moe.bank.weight": "expert.up"}
    assert list(routers(model, roles)) == ["moe.choose"] and not routers(model)
    assert [p.role for p in describe(model, roles=roles)] == ["router", "router", "expert.up"]


@pytest.mark.parametrize(
    ("family", "count"), [("hunyuan", 2), ("gemma4", 2), ("jetmoe", 2), ("afmoe", 6), ("dbrx", 2), ("ernie", 2)]
)
def test_experts_a_token_goes_through(family: str, count: int) -> None:
    assert experts_per_token(WRAPPING[family][0].get_text_config()) == count
    assert experts_per_token(HunYuanMoEV1Config(**SMALL, moe_topk=[1, 3])) == 3
    assert experts_per_token(LlamaConfig(**SMALL)) == 1


def test_a_shared_mlp_without_routed_experts_is_an_mlp() -> None:
    """Granite 4's dense sizes (micro, 1B, 350M)."""
    sizes = {
        "layer_types": ["attention"] * 2,
        "shared_intermediate_size": 10,
        "num_local_experts": 0,
        "mamba_n_heads": 4,
    }
    parameters = parameters_of(GraniteMoeHybridConfig(**SMALL, **sizes))
    roles = [unit.role for name, p in parameters.items() if "layers.1.shared_mlp" in name for unit in p.units]
    assert sorted(roles) == ["mlp.down", "mlp.gate", "mlp.up"]


def test_a_shared_mlp_is_a_shared_expert() -> None:
    """Hunyuan's three matrices; Granite's two, of which the first holds gate and up."""
    for family, name in (("hunyuan", "model.layers.1.mlp.shared_mlp"), ("granite", "model.layers.1.shared_mlp")):
        parameters = parameters_of(WRAPPING[family][0])
        units = [unit for key, parameter in parameters.items() if key.startswith(name) for unit in parameter.units]
        assert {unit.role for unit in units} == {"shared.gate", "shared.up", "shared.down"} and len(units) == 3
        assert {unit.expert for unit in units} == {None}
    halves = parameters["model.layers.1.shared_mlp.input_linear.weight"].units
    assert [(unit.role, unit.start, unit.numel) for unit in halves] == [
        ("shared.gate", 0, 10 * 16),
        ("shared.up", 10 * 16, 10 * 16),
    ]


def test_a_gate_of_attention_is_no_mlps() -> None:
    parameters = parameters_of(WRAPPING["afmoe"][0])
    strangers = [f"model.layers.{layer}.self_attn.gate_proj.weight" for layer in range(2)]
    assert unrecognised(tuple(parameters.values())) == strangers
    assert parameters["model.layers.0.mlp.gate_proj.weight"].role == "mlp.gate"


def test_listed_experts_whose_gate_and_up_are_one_matrix() -> None:
    block = torch.nn.Module()
    block.gate = torch.nn.Linear(4, 3, bias=False)
    block.experts = torch.nn.ModuleList()
    for _ in range(3):
        expert = torch.nn.Module()
        expert.gate_up_proj, expert.down_proj = torch.nn.Linear(4, 10, bias=False), torch.nn.Linear(5, 4, bias=False)
        block.experts.append(expert)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    units = [unit for parameter in describe(model) for unit in parameter.units]
    assert [(unit.expert, unit.role, unit.start, unit.numel) for unit in units] == [
        (expert, f"expert.{part}", start, 20)
        for expert in range(3)
        for part, start in (("gate", 0), ("up", 20), ("down", 0))
    ]
    assert unrecognised(describe(model)) == []


class Numbered(torch.nn.Module):
    """Children called 0, 1, ... of a module that is no list."""

    def __init__(self, *children: torch.nn.Module):
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(str(index), child)


def listing(name: str, kind: type[torch.nn.Module], gate: str = "gate", outputs: int = 3) -> torch.nn.Module:
    """A model of one block: a gate beside a list of three experts."""
    block, experts = torch.nn.Module(), [torch.nn.Module() for _ in range(3)]
    setattr(block, gate, torch.nn.Linear(4, outputs, bias=False))
    for expert in experts:
        expert.fc1, expert.fc2 = torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 4, bias=False)
    by_name = {f"expert_{index}": expert for index, expert in enumerate(experts)}
    is_plain = kind in (torch.nn.Sequential, Numbered)
    setattr(block, name, kind(*experts) if is_plain else kind(by_name if kind is torch.nn.ModuleDict else experts))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].moe = block
    return model


def normed_heads() -> torch.nn.Module:
    """An attention with a gate and a norm for each of three heads."""
    model = listing("norms", torch.nn.ModuleList)
    model.layers[0].moe.norms = torch.nn.ModuleList(torch.nn.LayerNorm(4) for _ in range(3))
    return model


@pytest.mark.parametrize(
    ("name", "kind", "gate", "roles"),
    [
        ("experts", torch.nn.ModuleList, "gate", {}),
        ("experts", torch.nn.Sequential, "gate", {}),
        ("experts", Numbered, "gate", {}),
        ("experts", torch.nn.ModuleDict, "gate", {}),  # as transformers' Switch has them
        ("mlp", torch.nn.ModuleList, "gate", {}),  # as Phixtral has them
        ("mlp", torch.nn.ModuleDict, "router", {}),
        ("mlp", torch.nn.ModuleList, "choose", {"*.choose.weight": "router"}),
    ],
)
def test_listed_experts_by_whatever_name(name: str, kind: type[torch.nn.Module], gate: str, roles: dict) -> None:
    model = listing(name, kind, gate)
    keys = [f"expert_{index}" if kind is torch.nn.ModuleDict else str(index) for index in range(3)]
    assert expert_blocks(model, roles) == {"layers.0.moe": [f"layers.0.moe.{name}.{key}" for key in keys]}
    assert list(routers(model, roles)) == [f"layers.0.moe.{gate}"]
    router, *experts = describe(model, roles=roles)
    assert router.role == "router" and {p.block for p in (router, *experts)} == {"layers.0.moe"}
    assert [(p.units[0].role, p.units[0].expert) for p in experts] == [
        (f"expert.{part}", number) for number in range(3) for part in ("up", "down")
    ]
    assert unrecognised(describe(model, roles=roles)) == []


@pytest.mark.parametrize(
    "model",
    [
        listing("mlp", torch.nn.ModuleList, outputs=4),
        listing("mlp", torch.nn.ModuleList, gate="proj"),
        listing("layers", torch.nn.ModuleList),  # a gate of layers is no router
        listing("shared_experts", torch.nn.ModuleList),
        normed_heads(),
        listing("lm_heads", torch.nn.ModuleList).layers[0].moe,  # a gate beside heads of a whole model
    ],
    ids=["size", "proj", "layers", "shared", "norms", "heads"],
)
def test_an_ordinary_list_is_no_mixture(model: torch.nn.Module) -> None:
    assert expert_blocks(model) == {} and list(routers(model)) == []
    assert all(p.block is None and all(unit.expert is None for unit in p.units) for p in describe(model))


@pytest.mark.parametrize("name", ["experts", "mlp"])
def test_a_shared_expert_beside_a_list_of_any_name(name: str) -> None:
    model = listing(name, torch.nn.ModuleList)
    shared = model.layers[0].moe.shared_expert = torch.nn.Module()
    shared.up_proj = torch.nn.Linear(4, 5, bias=False)
    assert [p.units[0].role for p in describe(model) if "shared" in p.name] == ["shared.up"]


def test_a_correction_bias_beside_the_gate_is_the_routers() -> None:
    """As in ERNIE's own code."""
    model = listing("experts", torch.nn.ModuleList)
    statics = model.layers[0].moe.moe_statics = torch.nn.Module()
    statics.e_score_correction_bias = torch.nn.Parameter(torch.zeros(1, 3), requires_grad=False)
    assert correction_biases(describe(model)) == ["layers.0.moe.moe_statics.e_score_correction_bias"]


def test_a_vector_is_no_matrix_whatever_its_axes() -> None:
    """Kimi-Linear's decay is [1, 1, heads, 1]. A weight of one output is a matrix."""
    model = torch.nn.Module()
    model.decay, model.one = torch.nn.Parameter(torch.zeros(1, 1, 4, 1)), torch.nn.Linear(4, 1)
    assert [parameter.role for parameter in describe(model)] == ["bias", "other", "bias"]


def test_the_dense_layers_of_lfm2() -> None:
    parameters = parameters_of(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    names = [f"model.layers.0.feed_forward.w{number}.weight" for number in (1, 3, 2)]
    assert [parameters[name].role for name in names] == ["mlp.gate", "mlp.up", "mlp.down"]
