"""Experts on different ranks (AutoEP) against one process and against the same ranks without it.

2 ranks that share the experts, 4 ranks that share them, and 2 × 2: scores, masks, σ, tuned weights, noise, answers,
export, and checkpoints that go on with the experts laid otherwise.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import PAIRS, build_guard, build_mask, build_model, byte_bpe_tokenizer
from conftest import ROOT, run_ranks
from reference import control_scores, esi_scores, num_selected, units
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from esi_ds import Mask
from esi_ds.stages.plan.footprints import BORROWED_PRESETS
from esi_ds.zero.expert_parallel import mend_registry

sys.path.append(str(ROOT / "tests/sweep"))
import tiny  # noqa: E402

logging.set_verbosity_error()
KINDS = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe")
BENIGN = [("Tell me a story.", "Once upon a time there was a girl."), ("Write a list", "1. First"), ("What?", "Yes")]
EXPERTS = 8
LAYOUTS = {2: (0, 2), 4: (4, 2)}  # ranks → sizes of expert parallelism tried there; 0: without it
STEPS = 4
# fp32 sums in another order: AutoEP's router normalises in its own order, and tokens of several ranks meet in one
# product. Measured: scores at most 5.5e-6; tuned weights 2.6e-7, and their way from the base 8.8e-6.
TOLERANCE = 1e-5


def settings(size: int, preset: str | None = None) -> dict:
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}}
    named = {"preset_model": preset} if preset else {}
    return zero | ({"expert_parallel": {"enabled": True, "autoep_size": size, **named}} if size else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for kind in KINDS:
        build_model(kind, folder / kind, byte_bpe_tokenizer(), experts=EXPERTS)
        build_mask(folder / f"{kind}-mask", folder / kind, ratio=0.2)
    build_mask(folder / "experts-mask", folder / "qwen3_moe", ratio=0.2, part=".experts.")
    for kind in ("gpt_oss", "llama"):
        build_model(kind, folder / kind, byte_bpe_tokenizer(), experts=EXPERTS)
    for kind in OTHER_BLOCKS:
        config = tiny.tiny_config(kind, 343)
        config.num_experts = EXPERTS
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    build_guard(folder / "guard", byte_bpe_tokenizer())
    rows = [{"prompt": prompt, "response": response.strip()} for prompt, response in PAIRS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "benign.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in BENIGN))
    return folder


def score_case(folder: Path, tag: str, size: int, kind: str, name: str = "esi", **select) -> dict:
    data = {"responses": str(folder / "rows.jsonl")}
    if "contrastive" in select:
        data["benign"] = {"path": str(folder / "rows.jsonl")}
    return {
        "export": name == "esi",
        "config": {
            "run": {"output_dir": str(folder / f"{tag}-{name}-{kind}"), "tensorboard": False},
            "model": {"path": str(folder / kind), "dtype": "fp32", "gradient_checkpointing": kind in RECOMPUTED},
            "judge": {"path": str(folder / "guard"), "placement": "replicated"},
            "data": data,
            "esi": {"batch_size": 2},
            "select": {"ratio": 0.03, **select},
            "deepspeed": settings(size, BORROWED_PRESETS.get(kind)),
        },
    }


def control_case(folder: Path, tag: str, size: int) -> dict:
    """The criteria with a control, of rows here, and their report of every matrix."""
    case = score_case(folder, tag, size, "qwen3_moe", "control", criterion=list(CONTROLLED))
    case["config"]["control"] = {"rows": {"path": str(folder / "benign.jsonl")}}
    case["config"]["data"]["tuning"] = {"path": str(folder / "rows.jsonl")}
    return case


def tune_case(folder: Path, tag: str, size: int, stage: str, name: str, kind: str = "qwen3_moe", **tune) -> dict:
    deepspeed = settings(size)
    deepspeed["zero_optimization"] |= OFFLOAD if name.startswith("offload") else {}
    return {
        "stage": stage,
        "config": {
            "run": {"output_dir": str(folder / f"{tag}-{name}"), "tensorboard": False, "seed": 5},
            "model": {"path": str(folder / kind), "dtype": "fp32", "gradient_checkpointing": name in RECOMPUTED},
            "tune": {
                "mask": str(folder / f"{kind}-mask"),
                "data": {"path": str(folder / "rows.jsonl")},
                "max_steps": STEPS,
                "batch_size": 2,
                "lr": 1e-2,
                "weight_decay": 0.1,
                "clip": 0.5,
                "patch": False,
                **tune,
            },
            "deepspeed": deepspeed,
        },
    }


OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# name → (stage, model, more of the tune section)
TUNED = {
    "compact": ("set", "qwen3_moe", {"reduction": "compact"}),
    "scatter": ("set", "mixtral", {"reduction": "scatter"}),
    "unscored": ("set", "qwen2_moe", {"unscored": "train"}),
    "experts": ("set", "qwen3_moe", {"reduction": "compact"}),  # by a mask that lies in routed experts only
    "spa": ("spa", "qwen3_moe", {}),
    "router": ("spa", "deepseek_v2", {"router": "train"}),
    "offload-set": ("set", "qwen3_moe", {}),
    "offload-spa": ("spa", "mixtral", {}),
}
RECOMPUTED = ("mixtral", "scatter", "spa")  # models scored, and runs, with ``model.gradient_checkpointing``
# (model, size, preset) → what it is told. The second routes by softmax what the model routes by sigmoid: no error
# anywhere else, and answers that look like answers.
REFUSED = {
    ("olmoe", 2, None): "multiple replacement specs",
    ("deepseek_v3", 2, "qwen3_moe"): "does not compute what the model's model.layers.1.mlp computes",
    ("gpt_oss", 2, None): "finds no expert block that it supports",
    ("llama", 2, None): "the model has no routed experts",
    ("mixtral", 3, None): "autoep_size = 3: does not divide 8 experts",
    ("gemma4_text", 2, None): "model.layers.0 does not run on hidden states alone (",
    ("hunyuan_v1_moe", 2, "qwen3_moe"): "has no attribute 'weight'",
}
OTHER_BLOCKS = ("gemma4_text", "hunyuan_v1_moe")  # a router in the layer itself; a linear layer within the router
SELECTED = {
    "matrix": {"scope": "matrix", "of": "scored"},
    "random": {"order": "random"},
    "contrastive": {"contrastive": True},
    "noise": {"criterion": "random"},
}
CONTROLLED = ("specific", "excess", "exclusive")


def kinds_of(ranks: int) -> tuple[str, ...]:
    """Four ranks take turns on two cores: fewer models there."""
    return KINDS if ranks == 2 else ("mixtral", "deepseek_v3")


def tuned_on(ranks: int) -> tuple[str, ...]:
    return tuple(TUNED) if ranks == 2 else ("compact", "scatter", "spa")


def mask_of(folder: Path, name: str) -> Path:
    return folder / ("experts-mask" if name == "experts" else f"{TUNED[name][1]}-mask")


def moved_on(ranks: int) -> tuple[str, ...]:
    return ("set", "spa") if ranks == 2 else ("set",)


def skip_unless(is_run: bool) -> None:
    if not is_run:
        pytest.skip("run on two ranks")


def cases(folder: Path, ranks: int) -> dict[str, list]:
    listed: dict[str, list] = {"scores": [], "tuned": [], "perturbed": [], "answered": [], "refused": []}
    for (kind, size, preset), error in REFUSED.items() if ranks == 2 else ():
        listed["refused"].append({"model": str(folder / kind), "deepspeed": settings(size, preset), "error": error})
    for size in LAYOUTS[ranks]:
        tag = f"w{ranks}-{size}"
        listed["scores"] += [score_case(folder, tag, size, kind) for kind in (kinds_of(ranks) if size else ())]
        if ranks == 2:
            listed["scores"] += [
                score_case(folder, tag, size, "qwen3_moe", name, **how) for name, how in SELECTED.items()
            ]
            listed["scores"].append(control_case(folder, tag, size))
        for name in tuned_on(ranks):
            stage, kind, more = TUNED[name]
            more = {**more, "mask": str(mask_of(folder, name))}
            listed["tuned"].append(tune_case(folder, tag, size, stage, name, kind, **more))
        paths = {"model": str(folder / "mixtral"), "mask": str(folder / "mixtral-mask")}
        zero = settings(size)["zero_optimization"]
        more = {"noise": 1.5, "seed": 3, "dtype": "fp32", "zero": zero, "settings": settings(size)}
        listed["perturbed"].append({**paths, **more, "out": str(folder / f"{tag}-noise.safetensors")})
        paths = {"model": str(folder / "qwen3_moe"), "out": str(folder / f"{tag}-answers.json")}
        listed["answered"].append({**paths, "prompts": [p for p, _ in PAIRS[:5]], "deepspeed": settings(size)})
    first, then = LAYOUTS[ranks]
    for stage in moved_on(ranks):
        # Broken off in step 3, and gone on with where the experts lie otherwise.
        make = partial(tune_case, folder, f"w{ranks}", stage=stage, save_every=1)
        broken = {"poison": "loss", "error": "the loss of step 3 is not finite"}
        for one, other in ((first, then), (then, first)):
            name = f"moved-{stage}-{one}-{other}"
            listed["tuned"] += [{**make(size=one, name=name), **broken}, make(size=other, name=name)]
        listed["tuned"].append(make(size=first, name=f"undisturbed-{stage}"))
    return listed


@pytest.fixture(scope="module", params=list(LAYOUTS))
def done(request, folder: Path) -> tuple[int, Path]:
    """One launch per number of ranks does everything."""
    ranks = request.param
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps(cases(folder, ranks)))
    done = run_ranks(ranks, str(ROOT / "tests/dist/expert_parallel_worker.py"), str(listing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return ranks, folder


def each(ranks: int) -> list[str]:
    """Tags of the layouts that do have experts on different ranks."""
    return [f"w{ranks}-{size}" for size in LAYOUTS[ranks] if size]


def distance(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2."""
    assert {name: v.shape for name, v in got.items()} == {name: v.shape for name, v in expected.items()}
    square = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (square / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5


def scores_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "scores/model-00001-of-00001.safetensors")


_oracle: dict[str, dict[str, torch.Tensor]] = {}


def oracle(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    if kind not in _oracle:
        pairs = [(prompt, response.strip()) for prompt, response in PAIRS]
        _oracle[kind] = esi_scores(folder / kind, folder / "guard", pairs)[0]
    return _oracle[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_sigma_names_and_an_idle_expert(done: tuple[int, Path], kind: str) -> None:
    ranks, folder = done
    skip_unless(kind in kinds_of(ranks))
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    for tag in each(ranks):
        run, expected = folder / f"{tag}-esi-{kind}", oracle(folder, kind)
        assert distance(scores_of(run), expected) <= TOLERANCE
        rows = json.loads((run / "report.json").read_text())["units"]
        for name in expected:
            wanted = sorted(unit.sigma for unit in units(model) if unit.parameter_name == name)
            assert sorted(row["sigma"] for row in rows if row["parameter"] == name) == pytest.approx(wanted, rel=1e-9)
        mask = Mask.load(run / "mask")
        assert not mask.problems() and set(mask.names) == set(expected)
        assert mask.k == num_selected(model, 0.03) == sum(row["selected"] for row in rows)
        if kind not in ("mixtral", "qwen3_moe"):  # whose routers were made to leave the last expert out
            idle = [row for row in rows if row["expert"] == EXPERTS - 1]
            assert idle and all(row["sigma"] > 0 and row["max_score"] == 0 and row["selected"] == 0 for row in idle)


def test_masks_equal_but_for_ties(done: tuple[int, Path]) -> None:
    """Against the oracle's scores: what is selected on one side only lies within the scores' tolerance of the cut."""
    ranks, folder = done
    for tag in each(ranks):
        for kind in kinds_of(ranks):
            mask, expected = Mask.load(folder / f"{tag}-esi-{kind}" / "mask"), oracle(folder, kind)
            flat = torch.cat([expected[name].flatten() for name in mask.names])
            bits = torch.cat([mask.bits(name) for name in mask.names])
            cut = flat.sort(descending=True).values[mask.k - 1]
            wrong = bits != (flat >= cut)
            assert int(wrong.sum()) <= 2 and bool(((flat[wrong] - cut).abs() <= TOLERANCE * cut).all()), (tag, kind)


@pytest.mark.parametrize("name", SELECTED)
def test_other_selections_equal(done: tuple[int, Path], name: str) -> None:
    """Random orders and scores are functions of a weight's place: equal to the bit. Others as the scores allow."""
    ranks, folder = done
    skip_unless(ranks == 2)
    one, other = (Mask.load(folder / f"w2-{size}-{name}-qwen3_moe" / "mask") for size in (0, 2))
    differ = sum(int((one.bits(key) != other.bits(key)).sum()) for key in one.names)
    assert differ <= (2 if name in ("matrix", "contrastive") else 0)
    scores = [scores_of(folder / f"w2-{size}-{name}-qwen3_moe") for size in (2, 0)]
    assert distance(*scores) <= TOLERANCE


def test_criteria_with_a_control_equal_the_oracle(done: tuple[int, Path]) -> None:
    """Routed experts' gradients of both passes lie on the rank that has the expert; so does what is between them."""
    ranks, folder = done
    skip_unless(ranks == 2)
    shared, alone = (folder / f"w2-{size}-control-qwen3_moe" for size in (2, 0))
    pairs = [(prompt, response.strip()) for prompt, response in PAIRS]
    worst = {}
    for criterion in CONTROLLED:
        model, guard = folder / "qwen3_moe", folder / "guard"
        expected = control_scores(model, guard, pairs, BENIGN, criterion, True, pairs)
        file = f"scores/{criterion}/model-00001-of-00001.safetensors"
        worst[criterion] = (
            distance(load_file(shared / file), expected),
            distance(*(load_file(run / file) for run in (shared, alone))),
        )
        one, other = (Mask.load(run / "mask" / criterion) for run in (shared, alone))
        assert one.k == other.k and sum(int((one.bits(name) != other.bits(name)).sum()) for name in one.names) <= 2
    assert max(max(pair) for pair in worst.values()) <= TOLERANCE, worst
    rows, plain = (
        {row["name"]: row for row in json.loads((run / "report.json").read_text())["units"]} for run in (shared, alone)
    )
    assert rows.keys() == plain.keys() and sum(row["control_selected"] for row in rows.values()) > 0
    for name, row in rows.items():
        assert row["control_mean_score"] == pytest.approx(plain[name]["control_mean_score"], rel=TOLERANCE), name
        assert abs(row["control_selected"] - plain[name]["control_selected"]) <= 2, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_folder_is_the_model(done: tuple[int, Path], kind: str) -> None:
    ranks, folder = done
    skip_unless(kind in kinds_of(ranks))
    ids = torch.arange(3, 40).view(1, -1)
    for tag in each(ranks):
        (file,) = (folder / f"{tag}-esi-{kind}" / "model").glob("*.safetensors")
        assert file.read_bytes() == (folder / kind / "model.safetensors").read_bytes()
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
            for path in (folder / kind, folder / f"{tag}-esi-{kind}" / "model")
        ]
        assert torch.equal(*logits)


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    stage, kind, more = TUNED[name]
    mask, base = Mask.load(mask_of(folder, name)), weights(folder / kind)
    trained = {}
    for key, values in base.items():
        if key in mask.shapes:
            trained[key] = mask.tensor(key) if stage == "set" else ~mask.tensor(key)
        else:
            router = key.endswith("mlp.gate.weight") and more.get("router")
            trained[key] = torch.full(values.shape, (router or more.get("unscored", "freeze")) == "train")
    return trained


@pytest.mark.parametrize("name", TUNED)
def test_tuned_weights_and_frozen_bits(done: tuple[int, Path], name: str) -> None:
    """2 ranks: as without expert parallelism. 4 ranks: one group of four as two groups of two."""
    ranks, folder = done
    skip_unless(name in tuned_on(ranks))
    first, then = (weights(folder / f"w{ranks}-{size}-{name}" / "model") for size in LAYOUTS[ranks])
    base, trained = weights(folder / TUNED[name][1]), trained_of(folder, name)
    moved = {key: then[key] - base[key] for key in base}
    assert distance(then, first) <= TOLERANCE
    # Beside the weights the steps themselves: a step that is missing would hide among them.
    assert distance(moved, {key: first[key] - base[key] for key in base}) <= 10 * TOLERANCE
    for key, values in base.items():
        assert torch.equal(then[key].view(torch.int32)[~trained[key]], values.view(torch.int32)[~trained[key]]), key
    first_steps = [
        json.loads((folder / f"w{ranks}-{size}-{name}" / "metrics.jsonl").read_text().splitlines()[0])
        for size in LAYOUTS[ranks]
    ]
    norms = [step["gradient_norm"] for step in first_steps]
    assert norms[0] == pytest.approx(norms[1], rel=TOLERANCE)  # of the trained weights, wherever the experts lie


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_goes_on_where_the_experts_lie_otherwise(done: tuple[int, Path], stage: str) -> None:
    ranks, folder = done
    skip_unless(stage in moved_on(ranks))
    one, other = LAYOUTS[ranks]
    expected = weights(folder / f"w{ranks}-undisturbed-{stage}" / "model")
    for first, then in ((one, other), (other, one)):
        run = folder / f"w{ranks}-moved-{stage}-{first}-{then}"
        assert json.loads((run / "manifest.json").read_text())["exit_state"] == "done"
        assert distance(weights(run / "model"), expected) <= TOLERANCE
        assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS  # nothing twice


def test_noise_is_the_same_and_gone_to_the_bit(done: tuple[int, Path]) -> None:
    """The worker compares digests after the block and after an exception in it; here the answers to one prompt."""
    ranks, folder = done
    by_layout = [load_file(folder / f"w{ranks}-{size}-noise.safetensors") for size in LAYOUTS[ranks]]
    for tensors in by_layout:
        assert torch.equal(tensors["before"], tensors["after"])
        assert (tensors["inside"] - tensors["before"]).abs().max() > 0.3
    for moment in ("before", "inside"):
        torch.testing.assert_close(by_layout[0][moment], by_layout[1][moment], rtol=1e-4, atol=1e-4)


def test_answers_are_the_same(done: tuple[int, Path]) -> None:
    """Gathered and token by token (the worker compares), on ranks that have run out of prompts too."""
    ranks, folder = done
    said = [json.loads((folder / f"w{ranks}-{size}-answers.json").read_text()) for size in LAYOUTS[ranks]]
    assert len(said[0]) == 5 and said[0] == said[1] and any(said[0])


def test_what_does_not_fit_is_refused(done: tuple[int, Path]) -> None:
    """The worker fails where one of ``REFUSED`` is not."""
    ranks, folder = done
    assert len(json.loads((folder / f"cases-{ranks}.json").read_text())["refused"]) == (
        len(REFUSED) if ranks == 2 else 0
    )


def test_the_mended_registry() -> None:
    """What DeepSpeed 0.19.8 does with transformers 5.23's registry fails, works once mended, and models' keys stay."""

    class Registry(dict):
        def __setitem__(self, model, value):
            super().__setitem__(str(type(model)), value)

        def get(self, model):
            return super().get(str(type(model))) or {}

    registry = Registry()
    with pytest.raises(TypeError):
        registry.get("<class 'a'>", None)
    assert mend_registry(Registry) and not mend_registry(Registry)  # the second time it takes a default already
    model = torch.nn.Linear(1, 1)
    registry[model] = {"router_logits": 1}
    registry["<class 'b'>"] = {"router_logits": 2}
    assert registry.get(model) == {"router_logits": 1} == registry.get(str(type(model)), "nothing")
    assert registry.get("<class 'b'>", None) == {"router_logits": 2} and registry.get("<class 'c'>", 7) == 7


def test_the_registry_that_is_right_is_left_alone() -> None:
    class Right(dict):
        def get(self, key, default=None):
            return super().get(key, default)

    kept = Right.get
    assert not mend_registry(Right) and Right.get is kept and not mend_registry(dict)
