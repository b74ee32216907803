"""SET and SPA on ZeRO-3 partitions against one process: trained weights, moments and masters, and frozen bits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import NEVER_ROUTED, PAIRS, build_mask, build_model, byte_bpe_tokenizer, claim_tied
from conftest import ROOT, run_ranks
from quantised_models import write_dequantised, write_fp8
from reference_tuning import encode, encode_plain, tune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from esi_ds import Mask
from esi_ds.artifacts import read_metrics
from esi_ds.config import Tune
from esi_ds.core.schedule import learning_rate
from esi_ds.data.conversations import DataOrder
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.patch import apply, revert

logging.set_verbosity_error()
KINDS = ("llama", "llama_tied", "qwen3_moe", "mixtral")
WHOLE = "model.layers.1.self_attn.o_proj.weight"  # every weight of it is in the mask
RULE = {"lr": 1e-2, "scheduler": "cosine", "warmup_ratio": 0.4}
OTHER_RULE = {"weight_decay": 0.1, "clip": 0.05, "betas": (0.5, 0.9), "eps": 1e-4, "scheduler": "linear"}
STEPS, BATCH, MICROS = 5, 2, 2
PLAIN = {
    "chat_template": "{% for m in messages %}{% if m.role == 'user' %}Instruction: {{ m.content }}\nAnswer: "
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "learn": "all",
    "end_token": False,
}
BENIGN = [("Hello", "Hi there!"), ("How is the weather?", "Sunny, I think.")]
FRACTION = 0.25  # of benign rows
CUT = 40  # tokens, of which most rows have more
LONG = {1: 100, 2: 1000, 3: 100}  # ranks → steps over which frozen bits are watched


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    for kind in KINDS:
        leave_out = kind == "mixtral"  # an expert that no token chooses
        build_model(kind, folder / kind, byte_bpe_tokenizer(), dtype=torch.bfloat16, leave_out=leave_out)
        build_mask(folder / f"{kind}-mask", folder / kind, whole=WHOLE)
    file = folder / "llama_tied/config.json"  # names no class, as the text part of a composite model's
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "architectures"}))
    claim_tied(build_model("llama", folder / "twice", byte_bpe_tokenizer(), dtype=torch.bfloat16), "same")
    build_mask(folder / "twice-mask", folder / "twice")
    # One layer: a thousand steps of it cost little, and it has every kind of parameter.
    build_model("needle", folder / "needle", byte_bpe_tokenizer(), dtype=torch.bfloat16, layers=1)
    spoil_zeros(folder / "needle")
    build_mask(folder / "needle-mask", folder / "needle", ratio=0.3)
    write_fp8(folder / "qwen3_moe", folder / "fp8", (4, 8))
    write_dequantised(folder / "fp8", folder / "fp8-plain", torch.bfloat16)
    for kind in ("fp8", "fp8-plain"):
        build_mask(folder / f"{kind}-mask", folder / kind, whole=WHOLE)
    for file, pairs in (("rows.jsonl", PAIRS), ("benign.jsonl", BENIGN)):
        rows = ({"prompt": prompt, "response": response.strip()} for prompt, response in pairs)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spoil_zeros(folder: Path) -> None:
    """Some −0.0 among the weights: arithmetic would turn them into +0.0."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = -0.0
    model.save_pretrained(folder)


def case(folder: Path, name: str, kind: str, stage: str, dtype: str = "bf16", zero: dict | None = None, **tune) -> dict:
    settings = {
        "mask": str(folder / f"{kind}-mask"),
        "data": {"path": str(folder / "rows.jsonl")},
        "max_steps": STEPS,
        "batch_size": BATCH,
        "gradient_accumulation": MICROS,
        "clip": None,
        "patch": False,
        **RULE,
        **tune,
    }
    return {
        "stage": stage,
        "config": {
            "run": {"output_dir": str(folder / name), "tensorboard": False, "seed": 5},
            "model": {"path": str(folder / kind), "dtype": dtype},
            "tune": settings,
            "deepspeed": {
                "zero_optimization": {
                    "stage": 3,
                    "stage3_param_persistence_threshold": 0,
                    "sub_group_size": 3000,  # several sub-groups: DeepSpeed steps once for each
                    **(zero or {}),
                }
            },
        },
    }


OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
PERSIST = {"stage3_param_persistence_threshold": 100}
HPZ = {"zero_hpz_partition_size": 2}


def cases(folder: Path, ranks: int) -> list[dict]:
    """Everything one launch runs."""
    tag = f"w{ranks}"
    make = partial(case, folder)
    listed = [make(f"{tag}-{kind}-{stage}", kind, stage) for kind in KINDS for stage in ("set", "spa")]
    mixed = {"path": str(folder / "rows.jsonl")}
    mixed["benign"] = {"path": str(folder / "benign.jsonl"), "fraction": FRACTION}
    listed += [
        make(f"{tag}-scatter", "qwen3_moe", "set", reduction="scatter", **OTHER_RULE),
        make(f"{tag}-clip-set", "llama", "set", **OTHER_RULE),
        make(f"{tag}-clip-spa", "llama", "spa", **OTHER_RULE),
        make(f"{tag}-unscored", "llama_tied", "set", unscored="train", data=mixed),
        make(f"{tag}-router-train", "mixtral", "set", router="train"),
        make(f"{tag}-router-freeze", "qwen3_moe", "spa", unscored="train", router="freeze"),
        {**make(f"{tag}-fp32", "mixtral", "spa", dtype="fp32"), "frees": True},
        {**make(f"{tag}-persist-set", "llama", "set", zero=PERSIST), "frees": True},
        make(f"{tag}-offload-set", "llama", "set", zero=OFFLOAD),
        {**make(f"{tag}-offload-spa", "llama", "spa", zero=OFFLOAD, **OTHER_RULE), "frees": True},
        make(f"{tag}-nothing-frozen", "llama", "spa", mask="none"),
        make(f"{tag}-plain", "llama", "set", max_length=CUT, data={"path": str(folder / "rows.jsonl"), **PLAIN}),
        make(f"{tag}-recompute-set", "qwen3_moe", "set"),
        make(f"{tag}-recompute-spa", "qwen3_moe", "spa"),
    ]
    for recomputing in listed[-2:]:
        recomputing["config"]["model"]["gradient_checkpointing"] = True
    for stage in ("set", "spa"):
        listed.append(make(f"{tag}-fp8-{stage}", "fp8", stage, patch=True))
        listed.append(make(f"{tag}-fp8-plain-{stage}", "fp8-plain", stage, patch=True, export=False))
    if ranks == 2:
        listed.append(make(f"{tag}-twice", "twice", "spa", unscored="train", patch=True))
        listed.append({**make(f"{tag}-hpz-set", "llama", "set", zero=HPZ), "frees": True})
        for name, zero in {"release": PERSIST, "publish": HPZ, "zero": None}.items():
            listed.append({**make(f"{tag}-drop-{name}", "llama", "set", zero=zero), "drop": name})
    long = {"max_steps": LONG[ranks], "gradient_accumulation": 1, "batch_size": 1, "weight_decay": 0.1, "clip": 1.0}
    long |= {"data": {"path": str(folder / "rows.jsonl"), "limit": 2}, "save_every": LONG[ranks]}
    # Nearly all of a thousand steps would go into gathers of a few weights each, which the hundred steps have.
    zero = PERSIST if ranks == 2 else None
    for stage in ("set", "spa"):
        listed.append({**make(f"{tag}-long-{stage}", "needle", stage, zero=zero, **long), "poison": "frozen"})
    return listed + (failing_cases(folder, tag) if ranks == 2 else [])


def failing_cases(folder: Path, tag: str) -> list[dict]:
    """Runs that end with an error."""
    make = partial(case, folder)
    no_gradient = {"detached": True, "error": "has no gradient: none reaches its embeddings"}
    named = "is not finite (rank 1: row "
    nan = {"poison": "trained", "error": f"gradient of step 1 {named}"}
    drop = {"drop": "mask", "poison": "frozen", "error": "the gradient of step 1 is not finite"}
    return [
        *({**make(f"{tag}-nan-{stage}", "llama", stage), **nan} for stage in ("set", "spa")),
        {
            **make(f"{tag}-loss", "llama", "set", save_every=1),
            "poison": "loss",
            "error": f"the loss of step 3 {named}",
        },
        {**make(f"{tag}-drop-mask", "llama", "spa", clip=0.05), **drop},
        *({**make(f"{tag}-detached-{stage}", "llama", stage), **no_gradient} for stage in ("set", "spa")),
    ]


def test_every_key_has_another_value_in_some_case(tmp_path: Path) -> None:
    """A key that no case sets could be ignored without a test that notices."""
    sections = [listed["config"]["tune"] for listed in cases(tmp_path, 2)]
    fields = Tune.model_fields.items()
    unset = {name for name, field in fields if all(tune.get(name, field.default) == field.default for tune in sections)}
    assert not unset


@pytest.fixture(scope="module", params=[1, 2, 3])
def tuned(request, folder: Path) -> tuple[int, Path]:
    """One launch per world size runs everything."""
    ranks = request.param
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps(cases(folder, ranks)))
    done = run_ranks(ranks, str(ROOT / "tests/dist/tune_worker.py"), str(listing))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return ranks, folder


def trained_bits(
    folder: Path,
    kind: str,
    stage: str,
    unscored: str = "freeze",
    router: str | None = None,
    nothing_frozen: bool = False,
) -> dict[str, torch.Tensor]:
    mask = Mask.load(folder / f"{kind}-mask")
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    trained = {}
    for name, parameter in model.named_parameters():
        if name in mask.shapes and nothing_frozen:
            trained[name] = torch.ones(parameter.shape, dtype=torch.bool)
        elif name in mask.shapes:
            trained[name] = mask.tensor(name) if stage == "set" else ~mask.tensor(name)
        else:
            is_router = name.endswith("mlp.gate.weight")
            trained[name] = torch.full(parameter.shape, ((is_router and router) or unscored) == "train")
    return trained


def batches(folder: Path, kind: str, ranks: int, plain: bool, mixed: bool, max_length: int) -> list:
    """[step][micro][rank] rows, as the data's order gives them. mixed: with benign ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)

    def write(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        ids, labels = (encode_plain if plain else encode)(tokenizer, prompt, answer.strip())
        return ids[:max_length], labels[:max_length]

    rows, benign = ([write(*pair) for pair in pairs] for pairs in (PAIRS, BENIGN))
    order = DataOrder(len(rows), len(benign), FRACTION if mixed else 0.0, 5)
    places = (order[position] for position in range(STEPS * MICROS * ranks * BATCH))
    stream = ((benign if is_benign else rows)[number] for is_benign, number in places)
    return [[[[next(stream) for _ in range(BATCH)] for _ in range(ranks)] for _ in range(MICROS)] for _ in range(STEPS)]


_references: dict[tuple, tuple] = {}


def reference(
    folder: Path,
    kind: str,
    stage: str,
    ranks: int,
    *,
    unscored="freeze",
    router=None,
    dtype=torch.bfloat16,
    plain=False,
    mixed=False,
    max_length=1024,
    nothing_frozen=False,
    scheduler=RULE["scheduler"],
    **options,
):
    rows, schedule = (plain, mixed, max_length), {**RULE, "scheduler": scheduler}
    key = (kind, stage, ranks, unscored, router, dtype, rows, nothing_frozen, scheduler, *sorted(options.items()))
    if key not in _references:
        options.setdefault("by_micro_batch", stage == "spa")
        _references[key] = tune(
            folder / kind,
            trained_bits(folder, kind, stage, unscored, router, nothing_frozen),
            batches(folder, kind, ranks, *rows),
            lambda step: learning_rate(step, max_steps=STEPS, **schedule),
            dtype=dtype,
            **options,
        )
    return _references[key]


def state_of(run: Path, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """Whole flat tensors: the ranks' parts one behind another."""
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(ranks):
        for key, tensor in load_file(run / f"state-{rank}.safetensors").items():
            parts.setdefault(key, []).append(tensor)
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensors in parts.items():
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = torch.cat(tensors)
    return state


def weights_of(run: Path, dtype: torch.dtype = torch.bfloat16, name: str = "model") -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run / name, dtype=dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def frozen_changes(
    folder: Path,
    kind: str,
    stage: str,
    run: Path,
    unscored="freeze",
    router=None,
    dtype=torch.bfloat16,
    nothing_frozen=False,
) -> int:
    """Frozen weights of the exported model that are not the base's bits."""
    base = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=dtype)
    trained, now = trained_bits(folder, kind, stage, unscored, router, nothing_frozen), weights_of(run, dtype)
    return sum(
        int((as_bits(p.detach()) != as_bits(now[name]))[~trained[name]].sum()) for name, p in base.named_parameters()
    )


def trained_differences(
    folder: Path, run: Path, ranks: int, kind: str, stage: str, **options
) -> tuple[float, float, int]:
    """(largest relative L2 difference of a parameter's masters, of its moments, model weights that differ)."""
    expected, state, _ = reference(folder, kind, stage, ranks, **options)
    now = weights_of(run, options.get("dtype", torch.bfloat16))
    differ = sum(int((as_bits(expected[name]) != as_bits(now[name])).sum()) for name in expected)
    got = state_of(run, ranks)
    assert set(got) == set(state)
    kept = {key: options[key] for key in ("unscored", "router", "nothing_frozen") if key in options}
    trained = trained_bits(folder, kind, stage, **kept)
    worst = {True: 0.0, False: 0.0}
    for name, tensors in state.items():
        for what in ("master", "exp_avg", "exp_avg_sq"):
            values = got[name][what]
            if stage == "spa":  # dense: frozen coordinates hold the base's masters and no moments
                if what != "master":
                    assert not values[~trained[name].flatten()].any()
                values = values[trained[name].flatten()]
            assert values.shape == tensors[what].shape
            difference = float((values - tensors[what]).norm() / tensors[what].norm().clamp(min=1e-30))
            worst[what == "master"] = max(worst[what == "master"], difference)
    return worst[True], worst[False], differ


# Three ranks' sums of three numbers may be associated in another order than the reference's: a rounding of fp32 a
# step. Sooner or later that puts a master on the other side of a bf16 boundary, and from there on gradients differ by
# bf16's precision (4e-3), so masters and curves only are compared, after bits have been seen to agree on one and two
# ranks; masters measured 1.3e-3. In fp32 nothing is blown up so: masters and moments, measured 2e-6.
BF16_THREE_RANKS, BF16_CURVES, FP32 = 5e-3, 1e-2, 2e-5


def check(folder: Path, run: Path, ranks: int, kind: str, stage: str, **options) -> None:
    """Weights, masters, moments and curves against the reference: bits, or within what is said above."""
    masters, moments, differ = trained_differences(folder, run, ranks, kind, stage, **options)
    of_curves = 1e-5
    if options.get("dtype") == torch.float32:
        # The matrix products' order of summation depends on the buffers' alignment, on one rank too; bf16 rounds it
        # away.
        assert max(masters, moments) <= FP32
    elif ranks == 3 or (stage == "spa" and "clip" in options):
        # DeepSpeed takes the norm in fp32 and divides by it otherwise than torch: the last bits of a clipped gradient.
        assert masters <= BF16_THREE_RANKS
        of_curves = BF16_CURVES
    else:
        assert (masters, moments, differ) == (0.0, 0.0, 0)
    _, _, curves = reference(folder, kind, stage, ranks, **options)
    for what, expected in curves.items():
        measured = [row[what] for row in read_metrics(run)]
        assert measured == pytest.approx(expected, rel=of_curves)
        assert measured[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["set", "spa"])
def test_trained_weights_equal_one_process(tuned: tuple[int, Path], kind: str, stage: str) -> None:
    ranks, folder = tuned
    run = folder / f"w{ranks}-{kind}-{stage}"
    check(folder, run, ranks, kind, stage)
    assert frozen_changes(folder, kind, stage, run) == 0
    expected, _, _ = reference(folder, kind, stage, ranks)
    base = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.bfloat16)
    assert any(not torch.equal(p, expected[name]) for name, p in base.named_parameters())  # something did train
    assert json.loads((run / "model/config.json").read_text())["architectures"] == [type(base).__name__]


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_an_expert_without_tokens_stays_as_it_is(tuned: tuple[int, Path], stage: str) -> None:
    """Whatever the kernels leave in its gradient: not a bit of its weights moves, and its moments are exactly zero."""
    ranks, folder = tuned
    run, trained = folder / f"w{ranks}-mixtral-{stage}", trained_bits(folder, "mixtral", stage)
    base, now, state = weights_of(run.parent, name="mixtral"), weights_of(run), state_of(run, ranks)
    experts = [name for name in base if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    for name in experts:
        assert trained[name][NEVER_ROUTED].any()
        assert torch.equal(as_bits(base[name][NEVER_ROUTED]), as_bits(now[name][NEVER_ROUTED]))
        is_idle = torch.zeros_like(trained[name])
        is_idle[NEVER_ROUTED] = True
        where = is_idle.flatten() if stage == "spa" else is_idle[trained[name]]
        for what in ("exp_avg", "exp_avg_sq"):
            assert not state[name][what][where].any() and state[name][what][~where].any()
    num_moved = sum(int((base[name] != now[name])[bits].sum()) for name, bits in trained.items())
    share = num_moved / sum(int(bits.sum()) for bits in trained.values())
    assert share < 1 and read_metrics(run)[-1]["share_moved"] == pytest.approx(share)  # so few weights: all are watched


VARIANTS = {
    "scatter": ("qwen3_moe", "set", {**OTHER_RULE, "by_micro_batch": True}),
    "clip-set": ("llama", "set", OTHER_RULE),
    "clip-spa": ("llama", "spa", OTHER_RULE),
    "unscored": ("llama_tied", "set", {"unscored": "train", "mixed": True}),
    "router-train": ("mixtral", "set", {"router": "train"}),
    "router-freeze": ("qwen3_moe", "spa", {"unscored": "train", "router": "freeze"}),
    "fp32": ("mixtral", "spa", {"dtype": torch.float32}),
    "persist-set": ("llama", "set", {}),
    "offload-set": ("llama", "set", {}),
    "offload-spa": ("llama", "spa", OTHER_RULE),
    "hpz-set": ("llama", "set", {}),
    "plain": ("llama", "set", {"plain": True, "max_length": CUT}),
    "nothing-frozen": ("llama", "spa", {"nothing_frozen": True}),
    "recompute-set": ("qwen3_moe", "set", {}),
    "recompute-spa": ("qwen3_moe", "spa", {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_one_process(tuned: tuple[int, Path], name: str) -> None:
    ranks, folder = tuned
    kind, stage, options = VARIANTS[name]
    run = folder / f"w{ranks}-{name}"
    if name.startswith("hpz") and ranks != 2:
        pytest.skip("secondary partitions of two ranks need two ranks")
    check(folder, run, ranks, kind, stage, **options)
    frozen = {key: options[key] for key in ("unscored", "router", "dtype", "nothing_frozen") if key in options}
    assert frozen_changes(folder, kind, stage, run, **frozen) == 0


def test_the_patch_of_a_tied_head_that_the_base_stores_twice(tuned: tuple[int, Path]) -> None:
    """The embedding trains: base + patch is the exported model, which stores it once, and reverting is the base."""
    ranks, folder = tuned
    if ranks != 2:
        pytest.skip("run on two ranks")
    run, base = folder / "w2-twice", folder / "twice"
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(weights_of(run)["model.embed_tokens.weight"], embedding)
    apply(base, run / "patch", run / "again")
    assert tensor_digests(run / "again") == tensor_digests(run / "model") != tensor_digests(base)
    revert(run / "model", run / "patch", run / "back")
    assert tensor_digests(run / "back") == tensor_digests(base)


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_a_quantised_base_is_tuned_and_exported_as_its_dequantised_weights(tuned: tuple[int, Path], stage: str) -> None:
    """To the bit; the patch belongs to the quantised base and to the dequantised one, which exports a patch alone."""
    ranks, folder = tuned
    run, plain = folder / f"w{ranks}-fp8-{stage}", folder / f"w{ranks}-fp8-plain-{stage}"
    assert not list(plain.glob("*model*"))
    apply(folder / "fp8-plain", plain / "patch", plain / "again")
    assert tensor_digests(run / "model") == tensor_digests(plain / "again")
    assert "quantization_config" not in json.loads((run / "model/config.json").read_text())
    for file in (run / "model/README.md", run / "manifest.json"):
        assert "dequantised from FP8 with a scale for each block of 4" in file.read_text()
    for file in (folder / f"w{ranks}-llama-{stage}/model/README.md", plain / "manifest.json"):
        assert "dequantised" not in file.read_text()
    for number, base in enumerate((folder / "fp8", folder / "fp8-plain")):
        apply(base, run / "patch", run / f"again{number}")
        assert tensor_digests(run / f"again{number}") == tensor_digests(run / "model")
    revert(run / "model", run / "patch", run / "back")
    assert tensor_digests(run / "back") == tensor_digests(folder / "fp8-plain")


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_frozen_bits_over_many_steps(tuned: tuple[int, Path], stage: str) -> None:
    """Weight decay, clipping, −0.0, NaN and inf in frozen coordinates' gradients; masters too."""
    ranks, folder = tuned
    run = folder / f"w{ranks}-long-{stage}"
    assert frozen_changes(folder, "needle", stage, run) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == LONG[ranks] and all(row["gradient_norm"] is not None for row in rows)
    assert rows[-1]["share_moved"] > 0.5
    base = AutoModelForCausalLM.from_pretrained(folder / "needle", dtype=torch.bfloat16)
    trained = trained_bits(folder, "needle", stage)
    if stage == "spa":
        for name, state in state_of(run, ranks).items():
            frozen = ~trained[name].flatten()
            masters = dict(base.named_parameters())[name].detach().float().flatten()
            assert torch.equal(as_bits(state["master"])[frozen], as_bits(masters)[frozen])


def test_not_finite_stops_before_the_update(tuned: tuple[int, Path]) -> None:
    ranks, folder = tuned
    if ranks != 2:
        pytest.skip("run on two ranks")
    for name in ("nan-set", "nan-spa", "loss"):
        run = folder / f"w2-{name}"
        assert json.loads((run / "manifest.json").read_text())["exit_state"] == "failed"
        assert not (run / "model").exists()
    assert (folder / "w2-loss/checkpoint/position-2/state.json").is_file()  # the last one stands


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_a_model_without_a_gradient_is_refused_before_the_first_step(tuned: tuple[int, Path], stage: str) -> None:
    """With SPA's engine too, whose experts have hooks of their own; elsewhere these find their buckets as they were."""
    ranks, folder = tuned
    if ranks != 2:
        pytest.skip("run on two ranks")
    run = folder / f"w2-detached-{stage}"
    assert (run / "config.yaml").is_file()
    assert not any((run / name).exists() for name in ("model", "metrics.jsonl", "checkpoint"))


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_tokens_a_second_are_those_of_all_ranks(tuned: tuple[int, Path], stage: str) -> None:
    """A step takes a second in the worker."""
    ranks, folder = tuned
    steps = batches(folder, "llama", ranks, plain=False, mixed=False, max_length=1024)
    expected = [sum(len(ids) for micro in step for rows in micro for ids, _ in rows) for step in steps]
    shown = [row["tokens_per_second"] for row in read_metrics(folder / f"w{ranks}-llama-{stage}")]
    assert shown == expected and len(set(expected)) > 1


@pytest.mark.parametrize("obligation", ["release", "publish", "zero"])
def test_every_obligation_is_needed(tuned: tuple[int, Path], obligation: str) -> None:
    """Dropped, the weights are not the reference's: the tests above would notice. (Without the mask the run fails.)"""
    ranks, folder = tuned
    if ranks != 2:
        pytest.skip("run on two ranks")
    run = folder / f"w2-drop-{obligation}"
    masters, _, differ = trained_differences(folder, run, ranks, "llama", "set")
    assert masters > BF16_THREE_RANKS and differ > 0
