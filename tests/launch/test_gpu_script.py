"""benchmarks.gpu on a CPU, all tiny: every step gives its figures, every check can fail, and nothing loses a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, run_ranks
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu, gpu_checks, gpu_end_to_end, gpu_speed, gpu_storage
from benchmarks.gpu_models import SHAPES, random_model, shape
from esi_ds.core.noise import normal
from esi_ds.core.units import Parameter, Unit, whole
from esi_ds.models.folder import ModelSource
from esi_ds.models.meta import meta_model
from esi_ds.zero import runtime

FAKES = """
import os, time

def fine(tiny):
    yield {"part": "one", "passed": True}

def wrong(tiny):
    yield {"part": "one", "passed": False}

def raises(tiny):
    yield {"part": "one", "passed": True}
    raise ValueError("a reason")

def dies(tiny):
    yield {"part": "one", "passed": True}
    print("last words", flush=True)
    os.abort()

def hangs(tiny):
    yield {"part": "one", "passed": True}
    with open(os.environ["TORN"], "a") as opened:
        opened.write('{"part": "half a li')
    time.sleep(1000)
"""

LIGHT = {
    "benchmarks/__init__.py": "from pathlib import Path\nROOT = Path('.')\n",
    "benchmarks/measure.py": "def machine(): return {'device': 'none'}\n",
    "esi_ds/__init__.py": "",
    "esi_ds/zero/__init__.py": "",
    "esi_ds/zero/runtime.py": "def start(): pass\ndef stop(): pass\n",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What all steps write, in one process."""
    file = tmp_path_factory.mktemp("gpu") / "out.jsonl"
    functions = ",".join(step.function for step in gpu.STEPS)
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", functions, "--tiny", "--output", str(file)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, file.read_text()[-3000:] + done.stderr[-3000:]
    return gpu.read(file)


def test_every_step_gives_its_figures_and_every_check_passes(lines: list[dict[str, Any]]) -> None:
    assert {line["step"] for line in lines} == {step.name for step in gpu.STEPS}
    assert not [line for line in lines if line.get("passed") is False]
    for line in lines:
        assert {"part", "seconds_of_part", "date", "device", "python", "torch", "transformers", "deepspeed"} <= set(
            line
        )
    checked = {line["step"] for line in lines if line.get("passed")}
    assert checked == {"versions", "attention", "experts", "neighbours", "end_to_end", "bits", "storage"}
    split = next(line["split_seconds"] for line in lines if line["part"] == "ESI, checkpointing False")
    assert set(split) == {"judge", "forward", "vocabulary product", "backward", "hook"}
    assert all(value > 0 for value in split.values())


TESTS_ON_A_CPU = """
import sys

import pytest

from benchmarks import gpu_checks

experts = gpu_checks.experts
gpu_checks.experts = lambda tiny: experts(tiny=True)


class WithoutGPU:
    def pytest_collection_modifyitems(self, items):
        for module in {item.getparent(pytest.Module) for item in items}:
            module.own_markers = [mark for mark in module.own_markers if mark.name != "skipif"]


chosen = ["-k", "experts or closed", "tests/gpu"]
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *chosen], plugins=[WithoutGPU()]))
"""


def test_the_gpu_tests_that_load_models_run(tmp_path: Path) -> None:
    """What needs no GPU of it: DeepSpeed reads LOCAL_RANK, which every test must find."""
    (tmp_path / "tests_on_a_cpu.py").write_text(TESTS_ON_A_CPU)
    done = run_ranks(1, str(tmp_path / "tests_on_a_cpu.py"))
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_end_of_any_kind_is_told_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without torch and DeepSpeed, which real steps import, a process starts at once.
    for file, text in {**LIGHT, "fakes.py": FAKES, "benchmarks/gpu.py": Path(gpu.__file__).read_text()}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    file = tmp_path / "out.jsonl"
    monkeypatch.setenv("TORN", str(file))
    names = ("fine", "wrong", "raises", "dies", "hangs")
    steps = [gpu.Step(name, f"fakes:{name}", 4.0) for name in names]
    assert gpu.run(steps, 100, file, True, "cpu") == 1
    lines = gpu.read(file)
    ends = {line["step"]: line for line in lines if "status" in line}
    assert {name: ends[name]["status"] for name in names} == {
        "fine": "done",
        "wrong": "done",
        "raises": "failed",
        "dies": "failed",
        "hangs": "timed out",
    }
    assert {line["step"] for line in lines if line.get("part") == "one"} == set(names)
    (error,) = [line for line in lines if line.get("part") == "error"]
    assert error["step"] == "raises" and "ValueError: a reason" in error["traceback"]
    assert ends["dies"]["exit_code"] == -6 and "last words" in ends["dies"]["output"]
    assert "NOT everything has passed" in capsys.readouterr().out
    assert gpu.run(steps[:1], 100, file, True, "cpu") == 0
    assert gpu.run(steps[1:2], 100, file, True, "cpu") == 1  # done, but a check has failed
    assert gpu.run(steps[:1], 0, file, True, "cpu") == 1 and gpu.read(file)[-1]["status"] == "left out"


def test_what_cannot_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--steps", "speed", "--tiny", "--device", "cpu"], "--steps = speed: is not a step; the steps are versions"),
        *([] if torch.cuda.is_available() else [(["--tiny"], "sees no GPU here")]),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.main([*arguments, "--output", str(tmp_path / "out.jsonl")])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def verdicts(parts: Any) -> list[bool | None]:
    return [part.get("passed") for part in parts]


def test_the_check_of_attention_sees_padding_that_is_read_and_values_that_are_not_finite() -> None:
    model = random_model(shape("Llama-3.2-1B", tiny=True), "fp32")
    rows = gpu_checks.random_rows([9, 4, 17], model.config.vocab_size)
    assert gpu_checks.compare_with_rows(model, rows, "right")["distance"] < 1e-5
    norm = model.model.norm
    hook = norm.register_forward_hook(lambda module, arguments, output: output - output.mean((0, 1)))
    assert gpu_checks.compare_with_rows(model, rows, "right")["distance"] > 1e-2
    hook.remove()
    hook = norm.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), torch.nan))
    assert gpu_checks.compare_with_rows(model, rows, "right")["nan"] == 1
    hook.remove()


def test_every_attention_kernel_of_a_gpu_gets_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules of CUDA's kernels: memory-efficient attention has no grouped heads, and flash no mask."""
    product = functional.scaled_dot_product_attention

    def on_a_gpu(*tensors: torch.Tensor, attn_mask: torch.Tensor | None, enable_gqa: bool = False, **rest: Any) -> Any:
        efficient = torch.backends.cuda.mem_efficient_sdp_enabled() and not enable_gqa
        flash = torch.backends.cuda.flash_sdp_enabled() and attn_mask is None
        if not (efficient or flash or torch.backends.cuda.math_sdp_enabled()):
            raise RuntimeError("No available kernel. Aborting execution.")
        with sdpa_kernel([SDPBackend.MATH]):
            return product(*tensors, attn_mask=attn_mask, enable_gqa=enable_gqa, **rest)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", on_a_gpu)
    passed = {part["part"]: part["passed"] for part in gpu_checks.attention(tiny=True)}
    for name in ("shipped", "math", "efficient", "flash"):
        assert passed[f"{name} fp32 padded on the right"] and passed[f"{name} bf16 padded on the right"]


def test_a_kernel_that_fails_or_does_not_run_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception, name: str, dtype: str = "bf16") -> bool | None:
        monkeypatch.setattr(gpu_checks, "compare_with_rows", Mock(side_effect=error))
        return gpu_checks.attention_part(None, [], name, dtype, "right")["passed"]

    missing = RuntimeError("No available kernel. Aborting execution.")
    assert failing(missing, "efficient") is None
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda"))
    assert failing(missing, "efficient") is failing(missing, "flash") is False
    assert failing(missing, "flash", "fp32") is failing(missing, "cudnn") is None
    for name in ("math", "efficient", "shipped"):
        with pytest.raises(torch.AcceleratorError):
            failing(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), name)


def test_the_check_of_experts_sees_a_gradient_that_is_not_zero() -> None:
    units = tuple(Unit(f"expert {i}", "up", 0, i, start=4 * i, length=4) for i in range(3))
    shard = whole(Parameter("experts", (3, 4), 0, "up", units))
    sums = {"experts": torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 4)}
    sound = {"idle": 1, "idle_not_zero": 0, "used_all_zero": 0, "not_finite": 0}
    assert gpu_checks.idle_counts([shard], sums, {0: [3, 0, 2]}) == sound
    sums["experts"][5] = 1e-30
    assert gpu_checks.idle_counts([shard], sums, {0: [3, 0, 2]}) == sound | {"idle_not_zero": 1}
    sums["experts"][5] = torch.nan
    assert gpu_checks.idle_counts([shard], sums, {0: [3, 0, 2]}) == sound | {"idle_not_zero": 1, "not_finite": 1}
    sums["experts"][4:] = 0.0
    assert gpu_checks.idle_counts([shard], sums, {0: [3, 0, 2]}) == sound | {"used_all_zero": 1}


def test_the_checks_of_bits_see_one_other_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(gpu_checks.noise(1000)) == [True, True, None]
    calls: list[int] = []

    def other(key: int, positions: torch.Tensor) -> torch.Tensor:
        values = normal(key, positions)
        calls.append(1)
        if len(calls) % 2 == 0:
            values[7] = values[7].nextafter(torch.tensor(9.0))
        return values

    monkeypatch.setattr(gpu_checks, "normal", other)
    parts = {part["part"]: part for part in gpu_checks.noise(1000)}
    assert [part["passed"] for part in parts.values()] == [True, False, None]
    assert parts["noise, normal"]["different"] == 1

    scores = gpu_checks.made_scores(10_000)
    assert len(scores.unique()) < len(scores) - 1000  # there are ties
    changed = scores.clone()
    largest = int(scores.argmax())
    changed[largest] = 0.0
    assert gpu_checks.selected(scores, "top") != gpu_checks.selected(changed, "top")

    assert gpu_checks.frozen_bits(1000)["passed"]
    update = gpu_checks.masked_adamw
    monkeypatch.setattr(
        gpu_checks, "masked_adamw", lambda weight, g, m, v, trained, **rule: update(weight, g, m, v, None, **rule)
    )
    part = gpu_checks.frozen_bits(1000)
    assert not part["passed"] and part["frozen_changed"] == part["frozen"]


def test_the_check_of_exports_sees_a_frozen_bit_and_a_model_that_nothing_has_changed(tmp_path: Path) -> None:
    from builders import build_mask, build_model, byte_bpe_tokenizer

    base = build_model("llama", tmp_path / "base", byte_bpe_tokenizer(), dtype=torch.bfloat16)
    build_mask(tmp_path / "mask", base, ratio=0.1)
    name, mask = "model.layers.0.mlp.up_proj.weight", gpu_end_to_end.Mask.load(tmp_path / "mask")
    bits = mask.tensor(name)
    for train, wanted in (("selected", bits), ("complement", ~bits)):
        for where, expected in ((wanted, True), (~wanted, False), (torch.zeros_like(bits), False)):
            tensors = load_file(base / "model.safetensors")
            tensors[name][where] += 1.0
            (tmp_path / "tuned").mkdir(exist_ok=True)
            save_file(tensors, tmp_path / "tuned/model.safetensors")
            part = gpu_end_to_end.changed_bits("set", base, tmp_path / "tuned", tmp_path / "mask", train)
            assert part["passed"] is expected, part
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] += 1.0  # the mask does not name it
    tensors[name][bits] += 1.0
    save_file(tensors, tmp_path / "tuned/model.safetensors")
    part = gpu_end_to_end.changed_bits("set", base, tmp_path / "tuned", tmp_path / "mask", "selected")
    assert part["frozen_changed"] == tensors["model.embed_tokens.weight"].shape[1] and not part["passed"]


def test_the_check_of_closing_sees_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, size, freed = 7 << 20, 100 << 20, 0

    def change(by: int) -> None:
        nonlocal held
        held += by

    def load(*arguments: Any) -> Any:
        change(size)
        return SimpleNamespace(close=lambda: change(-freed))

    monkeypatch.setattr(gpu_storage, "load_sharded", load)
    monkeypatch.setattr(gpu_storage, "allocated_bytes", lambda: held)
    monkeypatch.setattr(gpu_storage, "rate", lambda name, folder, elapsed: {"part": name})
    for share, expected in ((1.0, True), (0.98, False), (0.0, False)):
        freed = int(share * size)
        *_, part = gpu_storage.loads(tmp_path)
        assert part["passed"] is expected, part


def test_flops_are_those_of_the_models_weights() -> None:
    """6 FLOPs a weight and token, of what transformers says are the model's weights, and 6 L² a head's width."""
    for name in ("Llama-3.2-1B", "Llama-3.1-8B"):
        config = shape(name, tiny=False)
        weights = {key: p.numel() for key, p in meta_model(config, ModelSource("m")).named_parameters()}
        layers = sum(numel for key, numel in weights.items() if key.endswith("proj.weight"))
        head = weights["model.embed_tokens.weight"]
        attention = 16 * 6 * 7**2 * 2048 if name == "Llama-3.2-1B" else 32 * 6 * 7**2 * 4096
        assert gpu_speed.model_flops(config, 7, 3, True) == 6 * layers * 7 + 6 * head * 3 + attention
        assert gpu_speed.model_flops(config, 7, 3, False) == 6 * layers * 7 + 4 * head * 3 + attention
        assert gpu_speed.judge_flops(config, 7) == 4 * layers * 7 + 4 * head + attention


def test_shapes_have_the_published_numbers_of_weights() -> None:
    numel = {
        name: sum(p.numel() for p in meta_model(shape(name, tiny=False), ModelSource("m")).parameters())
        for name in SHAPES
    }
    assert numel["Llama-3.2-1B"] == 1_235_814_400
    assert numel["Llama-3.1-8B"] == 8_030_261_248


PUBLISHED = {
    "Llama-3.2-1B": "dense/architectures/llama3.2-1b",
    "Llama-3.1-8B": "dense/architectures/llama3-8b",
    "Qwen3-MoE": "moe/architectures/qwen3-30b-a3b",
}
NOT_PUBLISHED = {  # tokens, positions, precision, and what a norm adds
    "architectures", "bos_token_id", "eos_token_id", "max_position_embeddings", "rope_theta", "rope_scaling", "dtype",
    "rms_norm_eps",
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones(name: str) -> None:
    published = json.loads((ROOT / "configs" / PUBLISHED[name] / "config.json").read_text())
    config = shape(name, tiny=False)
    different = {key for key, value in published.items() if getattr(config, key, None) != value}
    assert different - NOT_PUBLISHED == ({"num_hidden_layers"} if name == "Qwen3-MoE" else set())


def test_the_script_takes_all_cores() -> None:
    """The Makefile exports OMP_NUM_THREADS=1, which the launched stages would take for the user's number."""
    recipe = (ROOT / "Makefile").read_text().partition("\ngpu:")[2].partition("\n\n")[0]
    assert "env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.gpu" in recipe
