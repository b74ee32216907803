"""Bytes and traffic of a dry run against arithmetic on the architectures' own numbers, and the recommended configs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS
from deepspeed.moe.ep_repack import repack_expert_weights
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2MoeConfig

from esi_ds.cli import main
from esi_ds.config import load_config
from esi_ds.core.footprint import (
    GatheredTensor,
    Topology,
    gather_traffic,
    gathered_tensors,
    in_flight_bytes,
    reduce_traffic,
    set_resident,
    spa_resident,
    takeover_bytes,
    token_traffic,
    transient,
)
from esi_ds.core.units import Parameter
from esi_ds.deepspeed_config import check_experts, expert_parallel_size, resolve_deepspeed
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import meta_parameters
from esi_ds.models.roles import describe
from esi_ds.stages.plan.footprints import AUTOEP_MODEL_TYPES, USABLE, Memory, footprint, nodes_needed, recommend, zero3
from esi_ds.stages.plan.memory import describe_work, expected_trained

ARCHITECTURES = ROOT / "configs/moe/architectures"
MODELS = {  # experts, expert width, hidden, MoE layers, nodes that the YAML names
    "mixtral-8x22b": (8, 16384, 6144, 56, 2),
    "qwen3-235b-a22b": (128, 1536, 4096, 94, 4),
    "deepseek-v3": (256, 2048, 7168, 58, 16),
    "kimi-k2": (384, 2048, 7168, 60, 32),
}
TOTALS = {"mixtral-8x22b": 141e9, "qwen3-235b-a22b": 235e9, "deepseek-v3": 671e9, "kimi-k2": 1.03e12}  # as published
MEMORY = Memory(80 * 2**30, 2048 * 2**30)


@pytest.fixture(scope="module")
def described() -> dict:
    """(model configuration, parameters) of each architecture."""
    architectures = {}
    for name in MODELS:
        source = ModelSource(str(ARCHITECTURES / name))
        config = load_model_config(source)
        architectures[name] = config, meta_parameters(config, source)
    return architectures


def work_of(name: str, described: dict, stage: str = "esi"):
    suffix = "" if stage == "esi" else f"-{stage}"
    config = load_config(str(ROOT / f"configs/moe/{name}{suffix}.yaml"), [])
    model_config, parameters = described[name]
    config = config.model_copy(update={"judge": None})  # its configuration is not here
    work = describe_work(config, stage, model_config, parameters, expected_trained(config, parameters), 8)
    return config, work, model_config


@pytest.mark.parametrize("name", MODELS)
def test_resident_bytes_and_transient(name: str, described: dict) -> None:
    experts, width, hidden, layers, nodes = MODELS[name]
    parameters, ranks = described[name][1], 8 * nodes
    total = sum(parameter.numel for parameter in parameters)
    assert total == pytest.approx(TOTALS[name], rel=0.01)
    scored = {parameter.name: parameter.numel for parameter in parameters if parameter.scored}
    one = experts * width * hidden  # all gate, or up, or down projections of a layer
    for size in (None, 8):
        cut = gathered_tensors(parameters, ranks, size)
        # Resident bytes do not depend on expert parallelism, but for padding: fewer ranks, each of fewer experts.
        assert sum(piece.shard for piece in cut) == pytest.approx(total / ranks, rel=1e-6)
        assert sum(piece.numel * piece.copies for piece in cut) == total
        experts_only = [p for p in cut if ".experts." in p.name]
        moment = transient(experts_only, 2, scored, "set", compact=False)
        divisor, largest = (1, 2 * one) if size is None else (size, one)
        group = ranks // (size or 1)  # 3 copies of gate, up and down; bf16 and fp32 while it is cast
        assert moment.weights == 3 * 2 * 3 * one // divisor
        assert largest // divisor % group == 0 and group >= 2  # nothing to pad, and the reduced slice is no more
        assert moment.gradient == pytest.approx((2 + 4) * largest / divisor)
        assert transient(experts_only, 2, scored, "set", compact=True).gradient == 2 * largest // divisor
        longer = transient(experts_only, 2, scored, "set", recompute=False)  # experts of all layers stay
        assert longer.weights == (layers + 2) * 2 * 3 * one // divisor
        routed = [piece for piece in cut if ".experts." in piece.name]
        assert len(routed) == layers * (2 if size is None else 3)
        assert {piece.ranks for piece in routed} == {ranks // (size or 1)}


def test_stages_by_hand(described: dict) -> None:
    """docs/design.md §6's formulas, at a density of 1 %."""
    parameters = described["qwen3-235b-a22b"][1]
    total, ranks = sum(parameter.numel for parameter in parameters), 64
    scored = {parameter.name: parameter.numel for parameter in parameters if parameter.scored}
    trained = {name: numel // 100 for name, numel in scored.items()}
    cut, density = gathered_tensors(parameters, ranks), sum(trained.values()) / total
    scatter = set_resident(cut, 2, trained, compact=False).total
    assert scatter == pytest.approx((2 + 20 * density) * total / ranks, rel=1e-3)
    compact = set_resident(cut, 2, trained, compact=True).total
    assert compact == pytest.approx((2 + 12 * density) * total / ranks + 8 * density * total, rel=1e-3)
    spa = spa_resident(cut, 2, scored)
    assert spa.total == pytest.approx((2 * total + 16.125 * sum(scored.values())) / ranks, rel=1e-3)


@pytest.mark.parametrize(("size", "share"), [("auto", 0), (1, 0), (8, 1 / 8), (256, 1 / 128)])
def test_a_second_copy_of_the_weights(size: int | str, share: float, described: dict) -> None:
    """hpZ cuts it over ``size`` ranks; it lies where the first copy does."""
    _, work, _ = work_of("deepseek-v3", described)
    copies, cluster = share * 2 * sum(parameter.numel for parameter in work.parameters), Topology(16, 8)
    for stage in ("esi", "set", "spa"):
        for offload, held in (((), "together"), (("offload_param",), "host")):
            plain = zero3(offload=offload)
            hpz = {**plain, "zero_optimization": {**plain["zero_optimization"], "zero_hpz_partition_size": size}}
            before, after = (getattr(footprint(work, stage, cluster, config), held) for config in (plain, hpz))
            assert after - before == pytest.approx(copies, rel=1e-6), (stage, held)


def test_what_a_save_copies_to_the_host(described: dict) -> None:
    """A pass's sums, or masters and moments, unless they lie there already."""
    _, work, _ = work_of("deepseek-v3", described)
    cluster, several = Topology(16, 8), replace(work, num_sums=3)
    num_scored = sum(parameter.numel for parameter in work.parameters if parameter.scored)
    assert footprint(several, "esi", cluster, zero3()).saving == pytest.approx(4 * num_scored / 128, rel=1e-3)
    assert footprint(replace(work, sums_on_host=True), "esi", cluster, zero3()).saving == 0
    trained = sum(work.trained["set"].values())
    assert footprint(work, "set", cluster, zero3()).saving == pytest.approx(12 * trained / 128, rel=1e-3)
    touched = sum(parameter.numel for parameter in work.parameters if work.trained["spa"].get(parameter.name))
    assert footprint(work, "spa", cluster, zero3()).saving == pytest.approx(12 * touched / 128, rel=1e-3)
    assert footprint(work, "spa", cluster, zero3(offload=["offload_optimizer"])).saving == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_start_of_expert_parallelism(name: str, described: dict) -> None:
    """DeepSpeed gathers a block's experts whole and copies this rank's out of them, gate and up twice (ep_repack);
    SPA keeps the experts that its optimizer was made for until the last one is replaced."""
    experts, width, hidden, layers, nodes = MODELS[name]
    one, ranks = experts * width * hidden, 8 * nodes
    block = 3 * one + (2 * one + one + one + one) / 8
    total = sum(parameter.numel for parameter in described[name][1])
    assert takeover_bytes(described[name][1], 2, ranks, 8) == pytest.approx(2 * block)
    assert takeover_bytes(described[name][1], 2, 1, 1) == 2 * 5 * one  # one rank alone gathers nothing
    for stage in ("esi", "set", "spa"):
        work, where = work_of(name, described, stage)[1], Topology(nodes, 8)
        needed = footprint(work, stage, where, zero3(8))
        kept = 3 * one * layers / ranks if stage == "spa" else 0
        assert needed.start == pytest.approx(2 * (total / ranks + kept + block), rel=1e-6)
        assert needed.together >= needed.start and footprint(work, stage, where, zero3()).start == 0
        on_host = footprint(work, stage, where, zero3(8, ("offload_param", "offload_optimizer")))
        assert on_host.start == pytest.approx(2 * block)
    with_judge = footprint(replace(work, judge=1e9), "esi", Topology(nodes, 8), zero3(8))
    assert with_judge.start == pytest.approx(1e9 + 2 * (total / ranks + block), rel=1e-6)


def test_what_deepspeed_copies_of_a_block() -> None:
    """Measured on the CPU: the most that is allocated at once while a rank's experts are taken out of whole tensors."""
    experts, hidden, width, size = 8, 32, 48, 4
    source = torch.nn.Module()
    source.gate_up_proj = torch.nn.Parameter(torch.zeros(experts, 2 * width, hidden))
    source.down_proj = torch.nn.Parameter(torch.zeros(experts, hidden, width))
    names = {"expert_w1_name": "gate_up_proj", "expert_w2_name": "down_proj", "expert_w3_name": None}
    spec = SimpleNamespace(num_experts=experts, expert_storage="fused_3d", **names)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        repacked = repack_expert_weights(source, spec, ep_rank=1, ep_size=size)
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    assert [tuple(tensor.shape) for tensor in repacked][0] == (experts // size, width, hidden)
    block = torch.nn.Module()
    block.experts = source
    assert max(held) == takeover_bytes(describe(block), 4, 1, size)


def test_the_start_can_be_the_most(described: dict) -> None:
    """SET of a trillion weights, an expert group over all ranks: a step gathers little, the start a whole block."""
    work = work_of("kimi-k2", described, "set")[1]
    needed = footprint(work, "set", Topology(16, 8), zero3(128))
    assert (
        needed.together
        == needed.start
        > needed.resident.total + needed.transient.total + needed.in_flight + needed.window
    )


def test_gradients_in_flight() -> None:
    """Two at most, 2 GiB at most, fp32 sent and received; none of frozen weights, or with experts on other ranks."""
    sizes = {"a": 1 << 20, "b": 1 << 22, "c": 1 << 21, "frozen": 1 << 24, "huge": 1 << 29, "d": 1 << 28, "e": 1 << 28}

    def in_flight(*names: str, ranks: int = 2, stage: str = "esi", compact: bool = False, copies: int = 1) -> float:
        parameters = [Parameter(name, (sizes[name],), 0, "other", ()) for name in names]
        tensors = [GatheredTensor(parameter, parameter.numel, ranks, copies) for parameter in parameters]
        return in_flight_bytes(tensors, {name: 1 for name in names if name != "frozen"}, stage, compact)

    assert in_flight("a", "b", "c", "frozen") == 4 * 1.5 * (sizes["b"] + sizes["c"])
    assert in_flight("a", "frozen", ranks=4, stage="set") == 4 * 1.25 * sizes["a"]
    assert in_flight("a", "huge") == 4 * 1.5 * sizes["a"]  # the huge one is waited for
    assert in_flight("d", "e") == 2 << 30
    nothing = [in_flight("a", ranks=1), in_flight("a", stage="spa"), in_flight("a", stage="set", compact=True)]
    assert [*nothing, in_flight("a", copies=2)] == [0, 0, 0, 0]


def test_experts_wider_than_the_shared_one_are_not_all_that_is_gathered() -> None:
    """The probe gathers the first block whole: where a group is wide and the shared expert large, that is more."""
    experts = meta_parameters(
        Qwen2MoeConfig(num_hidden_layers=1, num_experts=60, shared_expert_intermediate_size=1408 * 16),
        ModelSource("qwen2-moe"),
    )
    routed = sum(p.numel for p in experts if ".experts." in p.name)
    block = sum(p.numel for p in experts if ".mlp." in p.name)
    assert takeover_bytes(experts, 2, 60, 60) == 2 * block > 2 * routed * (1 + 5 / 180)
    assert takeover_bytes(experts, 2, 60, 2) == pytest.approx(2 * routed * (1 + 5 / 6))


def test_listed_experts_are_gathered_and_reduced_as_one(described: dict) -> None:
    """A block of remote code is one leaf of ZeRO-3, and all of its gradients wait for the last (zero/gradients.py)."""
    block, width, hidden, experts, ranks = "model.layers.1.mlp", 6, 4, 5, 2
    shapes = {f"{block}.gate.weight": (experts, hidden), "model.layers.1.self_attn.q_proj.weight": (hidden, hidden)}
    shapes |= {
        f"{block}.experts.{expert}.{name}_proj.weight": (hidden, width) if name == "down" else (width, hidden)
        for expert in range(experts)
        for name in ("gate", "up", "down")
    }
    shapes[f"{block}.shared_experts.up_proj.weight"] = (2 * width, hidden)
    parameters = [
        Parameter(name, shape, 0, "mlp.up", (), block if name.startswith(f"{block}.") else None)
        for name, shape in shapes.items()
    ]
    tensors = gathered_tensors(parameters, ranks)
    trained = {parameter.name: parameter.numel for parameter in parameters}
    inside = [parameter.numel for parameter in parameters if parameter.name.startswith(f"{block}.")]
    total, largest = sum(inside), 2 * width * hidden
    for stage in ("esi", "set"):
        moment = transient(tensors, 2, trained, stage)
        assert (moment.module, moment.weights) == (block, 2 * 2 * total)
        assert moment.gradient == 4 * total + max(2 * largest, 4 * largest / ranks)
    assert transient(tensors, 2, trained, "set", compact=True).gradient == 2 * largest
    assert transient(tensors, 2, trained, "spa").gradient == 2 * total + 8 * largest + 4 * largest / ranks


def test_traffic_by_hand(described: dict) -> None:
    """Two nodes of four, eight experts a layer: without expert parallelism, and shared by two, four and eight ranks."""
    parameters, where = described["mixtral-8x22b"][1], Topology(2, 4)
    routed = [parameter for parameter in parameters if ".experts." in parameter.name]
    numel = sum(parameter.numel for parameter in routed)
    scored = {parameter.name: parameter.numel for parameter in routed}
    for size, ranks, rings in ((None, 8, 1), (2, 4, 2), (4, 2, 4), (8, 1, 4)):
        cut, arriving = gathered_tensors(routed, 8, size), (ranks - 1) / ranks / (size or 1)
        gathers = gather_traffic(cut, 2, where)
        assert gathers.rank == pytest.approx(4 * numel * arriving) and gathers.node == pytest.approx(
            rings * gathers.rank
        )
        assert reduce_traffic(cut, scored, where).rank == pytest.approx(4 * numel * arriving)
    assert gather_traffic(gathered_tensors(routed, 4), 2, Topology(1, 4)).node == 0
    # 56 layers, 100 tokens to 2 experts each, 6144 bf16 numbers there and back, forward and backward.
    tokens = 4 * 56 * 100 * 2 * 6144 * 2
    within = token_traffic(56, 100, 2, 6144, 2, 4, where)
    assert within.rank == pytest.approx(tokens * 3 / 4) and within.node == 0
    across = token_traffic(56, 100, 2, 6144, 2, 8, where)
    assert across.rank == pytest.approx(tokens * 7 / 8) and across.node == pytest.approx(4 * tokens * 4 / 8)


@pytest.mark.parametrize(
    ("nodes", "per_node", "size", "abroad"),
    [
        (3, 4, 3, 4 / 3),  # ranks 0-2 3-5 6-8 9-11: of the middle node's four ranks each has one of three elsewhere
        (2, 6, 4, 1.0),  # ranks 4 to 7 are one group: two of a node's ranks have two of four elsewhere
        (2, 4, 2, 0.0),
        (1, 12, 4, 0.0),
        (4, 4, 8, 4 * 4 / 8),
    ],
)
def test_groups_that_cross_nodes(nodes: int, per_node: int, size: int, abroad: float) -> None:
    """Groups are ranks one behind another: only a size that divides a node's ranks keeps tokens on the node."""
    where = Topology(nodes, per_node)
    assert where.holds(size) == (abroad == 0)
    sent = 4 * 5 * 100 * 2 * 64 * 2
    traffic = token_traffic(5, 100, 2, 64, 2, size, where)
    assert traffic.node == pytest.approx(sent * abroad) and traffic.rank == pytest.approx(sent * (size - 1) / size)


def test_a_group_within_a_node_is_preferred(described: dict) -> None:
    """Nodes of six GPUs: less would arrive at a rank in groups of four, but they cross nodes; those of two do not."""
    _, work, _ = work_of("mixtral-8x22b", described)
    best = recommend(work, "esi", Topology(4, 6), MEMORY)
    assert best.fits and expert_parallel_size(best.settings) == 2


@pytest.mark.parametrize("stage", ["esi", "set", "spa"])
@pytest.mark.parametrize("name", MODELS)
def test_shipped_configs_fit_the_nodes_they_name(name: str, stage: str, described: dict) -> None:
    nodes = MODELS[name][4]
    config, work, _ = work_of(name, described, stage)
    where = Topology(nodes, 8)
    settings = resolve_deepspeed(config, where.ranks, stage)
    check_experts(settings, work.experts())
    needed = footprint(work, stage, where, settings)
    assert needed.together <= USABLE * MEMORY.gpu and 8 * needed.host <= USABLE * MEMORY.node
    file = ROOT / f"configs/moe/{name}{'' if stage == 'esi' else '-' + stage}.yaml"
    number = {2: "Two", 4: "Four"}.get(nodes, str(nodes))
    assert f"{number} nodes of eight 80 GB" in file.read_text()


@pytest.mark.parametrize("name", MODELS)
def test_recommendations_divide_and_fit(name: str, described: dict) -> None:
    _, work, _ = work_of(name, described)
    for stage in ("esi", "set", "spa"):
        for nodes, per_node in ((1, 8), (3, 4), (16, 8), (64, 8)):
            where = Topology(nodes, per_node)
            best = recommend(work, stage, where, MEMORY)
            size = expert_parallel_size(best.settings) or 1
            assert where.ranks % size == 0 and MODELS[name][0] % size == 0
            again = footprint(work, stage, where, best.settings)
            if best.override is None:
                assert again == best.footprint
            assert best.fits == (
                best.footprint.together <= 64 * 2**30 and per_node * best.footprint.host <= 0.8 * 2**41
            )
    needed = nodes_needed(work, "spa", Topology(1, 8), MEMORY)
    assert needed and recommend(work, "spa", Topology(needed, 8), MEMORY).fits
    assert not recommend(work, "spa", Topology(needed // 2, 8), MEMORY).fits or needed == 1


def test_families_are_deepspeeds() -> None:
    assert {name for preset in PRESET_MODELS.values() for name in preset.hf_model_types} == AUTOEP_MODEL_TYPES


def plan(tmp_path: Path, architecture: str, *arguments: str) -> tuple[int, float]:
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    overrides = [f"model.path={ARCHITECTURES / architecture}", f"data.responses={tmp_path / 'r.jsonl'}"]
    overrides += [f"judge.path={ROOT / 'examples/models/guard'}", *arguments]
    started = time.monotonic()
    return main("esi", ["--config", str(ROOT / f"configs/moe/{architecture}.yaml"), "--dry-run", *overrides]), (
        time.monotonic() - started
    )


def test_dry_run_of_a_trillion_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three stages, both ways; the printed configuration is one that the tool takes."""
    code, seconds = plan(tmp_path, "kimi-k2", "--nodes", "32")
    shown = capsys.readouterr().out
    assert code == 0 and seconds < 60
    assert "1,026,408,209,408" in shown and "32 nodes of 8 GPUs" in shown
    tables = [
        part.splitlines() for part in shown.split("\n\n") if part.split("\n")[0].split()[-3:] == ["ESI", "SET", "SPA"]
    ]
    assert [table[0].split("  ")[0] for table in tables] == ["without expert parallelism", "autoep_size 8"]
    for table in tables:
        weights = next(line for line in table if line.startswith("weights per rank"))
        assert weights.split("  ")[-1].strip() == f"{2 * 1026408209408 / 256 / 2**30:.4g} GiB"
    file = tmp_path / "recommended.json"
    file.write_text(shown[shown.index("\n{") :])
    assert json.loads(file.read_text())["expert_parallel"] == {"enabled": True, "autoep_size": 8}
    assert plan(tmp_path, "kimi-k2", "--nodes", "32", "--deepspeed_config", str(file))[0] == 0


def with_autoep(*keys: str) -> str:
    section = ", ".join(("enabled: true", "autoep_size: 8", *keys))
    return f"deepspeed={{zero_optimization: {{stage: 3}}, expert_parallel: {{{section}}}}}"


def test_a_family_without_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan says what a run needs, and recommends expert parallelism where the config names it."""
    assert plan(tmp_path, "gpt-oss-20b", "--nodes", "1", with_autoep())[0] == 0
    shown = capsys.readouterr().out
    assert "NOTE: DeepSpeed 0.19.8's AutoEP has no preset for gpt_oss (name the preset_model or the patterns" in shown
    assert plan(tmp_path, "olmoe-1b-7b", "--nodes", "1")[0] == 0
    assert "has no preset for olmoe (name preset_model: qwen3_moe)" in capsys.readouterr().out
    assert plan(tmp_path, "olmoe-1b-7b", "--nodes", "1", with_autoep("preset_model: qwen3_moe"))[0] == 0
    assert "no preset" not in capsys.readouterr().out


def test_a_recommendation_keeps_the_named_preset(described: dict) -> None:
    _, work, _ = work_of("mixtral-8x22b", described)
    section = {"preset_model": "qwen3_moe"}
    assert work.autoep == {}
    best = recommend(replace(work, autoep=section), "esi", Topology(4, 8), MEMORY)
    assert best.settings["expert_parallel"] == {"enabled": True, "autoep_size": 8, **section}
    assert "expert_parallel" not in recommend(replace(work, autoep=None), "esi", Topology(4, 8), MEMORY).settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2", with_autoep("moe_layer_pattern: '*.mlp'")], "moe_layer_pattern = *.mlp: is not a regular"),
        (["--nodes", "2", with_autoep("moe_layer_pattern: 5")], "moe_layer_pattern = 5: is not a regular expression"),
        (["--nodes", "2", "--gpus-per-node", "6"], "autoep_size = 8: does not divide 12 ranks"),
        (
            [
                "--nodes",
                "2",
                "deepspeed={zero_optimization: {stage: 3}, expert_parallel: {enabled: true, autoep_size: 16}}",
            ],
            "autoep_size = 16: does not divide 8 experts a layer; use one of 1, 2, 4, 8",
        ),
    ],
)
def test_sizes_that_do_not_divide(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, "mixtral-8x22b", *arguments)[0] == 2
    assert words in capsys.readouterr().err


def test_no_recipe_is_planned_beyond_the_share_of_a_gpu_that_is_usable() -> None:
    """docs/recipes.md has what ``--dry-run`` counts for every recipe that is shipped."""
    rows = [line.split("|") for line in (ROOT / "docs/recipes.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for row in rows:
        assert max(float(cell) for cell in row[5:8]) <= USABLE * MEMORY.gpu / 2**30, row[1]
