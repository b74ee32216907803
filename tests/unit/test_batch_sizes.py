"""Batch sizes that ``auto`` chooses: how many rows fit, the same on every rank, kept for a restart."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import FAMILIES, model_config
from conftest import ROOT
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    DynamicCache,
    Gemma4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from esi_ds.artifacts import RunFolder
from esi_ds.cli import main
from esi_ds.config import validate
from esi_ds.core.batch_size import Widths, generation_bytes, rows_that_fit, scoring_bytes
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import UserError
from esi_ds.models.roles import experts_per_token
from esi_ds.models.widths import widths
from esi_ds.options import Options
from esi_ds.stages.batch_sizes import GenerationBatch, changed_batch_sizes, generation_setting, longest_prompt
from esi_ds.stages.esi.work import EsiRun
from esi_ds.tracking import Tracker
from esi_ds.zero import batching, memory, runtime
from esi_ds.zero.engine import checkpointed_layers, recompute_activations

GIB, FP32 = 2**30, 4
SIZES = {"vocab_size": 600, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
SCORED: dict[str, PretrainedConfig] = {  # Qwen3-MoE in the proportions of Qwen3-30B-A3B
    "llama": LlamaConfig(**SIZES, hidden_size=96, intermediate_size=256),
    "mixtral": MixtralConfig(**SIZES, hidden_size=96, intermediate_size=336, num_local_experts=8),
    "qwen3_moe": Qwen3MoeConfig(
        **{**SIZES, "num_attention_heads": 16}, hidden_size=256, head_dim=32, intermediate_size=768,
        moe_intermediate_size=96, num_experts=16, num_experts_per_tok=8,
    ),
}  # fmt: skip
CONFIG = {"run": {"output_dir": "runs/x"}, "model": {"path": "m"}}


@pytest.mark.parametrize(
    ("free", "rows"), [(800, 64), (799, 32), (400, 32), (399, 16), (25, 2), (24, 1), (1, 1), (-5, 1), (10**9, 64)]
)
def test_rows_that_fit(free: float, rows: int) -> None:
    """Rows of 10 bytes in 80 % of what is free."""
    assert rows_that_fit(free, 10) == rows
    assert rows_that_fit(free + 1000, 10, fixed=800) == rows


def test_the_widths_of_published_architectures() -> None:
    """As their config.json files say; DeepSeek-V3 keeps 512 latent values and 64 of the keys."""
    folder = ROOT / "configs/moe/architectures"
    found = {name: widths(AutoConfig.from_pretrained(folder / name)) for name in ("mixtral-8x22b", "deepseek-v3")}
    assert found["mixtral-8x22b"] == Widths(56, 6144, 2 * 16384, 8 * 2 * 128, 32768, experts=2)
    assert found["deepseek-v3"] == Widths(61, 7168, max(18432, (8 + 1) * 2048), 512 + 64, 129280, experts=8)


def test_where_layers_differ_the_widest_counts() -> None:
    """Gemma 4's layers with full attention have heads of 512, the others of 256; in its larger sizes fewer of them."""
    sizes = {"num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512}
    few = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
    assert widths(Gemma4TextConfig(**sizes)).cache == 2 * 8 * 512
    assert widths(Gemma4TextConfig(**sizes, **few)).cache == 2 * 8 * 256
    several = Gemma4TextConfig(**sizes, num_experts=8, top_k_experts=2, per_layer_config={1: {"top_k_experts": 3}})
    assert experts_per_token(several) == 3


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral", "phi3", *FAMILIES])
def test_a_cache_is_as_large_as_counted(kind: str) -> None:
    config = model_config(kind, 60)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache, tokens = DynamicCache(config=config), 15
    with torch.no_grad():
        model(torch.randint(5, 60, (1, tokens)), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    sizes = widths(config)
    counted = FP32 * sizes.layers * sizes.cache * tokens
    assert held == counted or kind == "gpt_oss" and held <= counted  # half of its layers keep a window
    assert generation_bytes(sizes, FP32, tokens - 5, 5) > counted


def saved_bytes(model: PreTrainedModel, rows: int, tokens: int, learnt: int) -> int:
    """Bytes that autograd keeps of a forward pass, but for the weights, with the logits and their gradient."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.randint(5, 60, (rows, tokens))
        logits = model(ids, use_cache=False, logits_to_keep=learnt).logits
    assert logits.requires_grad
    return 2 * logits.nbytes + sum(
        tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SCORED)
def test_scoring_takes_no_more_than_counted(kind: str, dtype: torch.dtype, recompute: bool, attention: str) -> None:
    """What one more row takes, counted against what autograd keeps; a layer that is recomputed comes on top."""
    config = copy.deepcopy(SCORED[kind])
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row = saved_bytes(model, 3, 40, 20) - saved_bytes(model, 2, 40, 20)
    counted = scoring_bytes(widths(config), dtype.itemsize, 40, 20, recompute)
    layer = (scoring_bytes(widths(config), dtype.itemsize, 40, 20, False) - counted) / 3 if recompute else 0
    assert row <= counted <= 2 * row + 2 * layer


def test_the_tightest_rank_decides(monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 800)
    monkeypatch.setattr(runtime, "all_reduce_max", lambda tensor: torch.maximum(tensor, torch.tensor([-100.0])))
    assert batching.fitting_rows(10, 0) == 8


def test_what_null_means(monkeypatch) -> None:
    assert [generation_setting(setting, 8) for setting in (None, "auto", 5)] == [8, "auto", 5]
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda:0"))
    assert [generation_setting(setting, 8) for setting in (None, "auto", 5)] == ["auto", "auto", 5]


def test_the_longest_prompt_that_can_be_answered() -> None:
    assert longest_prompt([[1, 2], "too long", [1, 2, 3], [1] * 9], limit=9) == 3
    assert longest_prompt([], None) == 1


def esi_run(folder: Path, free: int, monkeypatch, **esi) -> EsiRun:
    """A run whose manifest has been read, in a process whose rank has ``free`` bytes."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: free)
    config = validate({**CONFIG, "run": {"output_dir": str(folder)}, "esi": {"max_new_tokens": 5, **esi}})
    run = EsiRun(config, Options(), None, RunFolder(str(folder)), {}, {})
    run.tracker = Tracker(folder, enabled=False, tensorboard=False, stage="esi")
    run._fingerprint = "a:b"
    folder.mkdir(exist_ok=True)
    run.batch_sizes = run._recorded_batch_sizes()
    return run


def fake_model(passing: float = 0.0) -> SimpleNamespace:
    module = SimpleNamespace(config=model_config("llama", 60))
    return SimpleNamespace(module=module, weight_bytes=4, passing_bytes=lambda backward, recompute=False: passing)


def generated(run: EsiRun, mode: str = "gathered", passing: float = 0.0) -> int:
    batch: GenerationBatch = run.generation_batch(run.config.esi, longest=10)
    return batch.rows(fake_model(passing), mode, run.config.esi.max_new_tokens)


def test_a_restart_takes_what_was_chosen(tmp_path: Path, monkeypatch) -> None:
    row = generation_bytes(widths(model_config("llama", 60)), 4, 10, 5)
    run = esi_run(tmp_path / "run", 20 * row, monkeypatch, generation_batch_size="auto")
    assert generated(run) == 16 and generated(esi_run(tmp_path / "other", row, monkeypatch)) == 8  # null on a CPU
    assert json.loads((tmp_path / "run/manifest.json").read_text())["batch_sizes"] == {"generation": 16}
    again = esi_run(tmp_path / "run", 10**12, monkeypatch, generation_batch_size="auto")
    again.record("running")  # as a start does, before anything is chosen
    assert generated(again) == 16
    assert generated(esi_run(tmp_path / "new", 10**12, monkeypatch, generation_batch_size="auto")) == 64
    tokens = esi_run(tmp_path / "per-token", 20 * row, monkeypatch, generation_batch_size="auto")
    assert generated(tokens, "per_token", passing=8 * row) == 8
    assert generated(esi_run(tmp_path / "number", row, monkeypatch, generation_batch_size=3)) == 3


def test_a_number_takes_the_place_of_what_was_chosen(tmp_path: Path, monkeypatch) -> None:
    """Else a run that is out of memory with what auto chose would be so for ever."""
    folder = tmp_path / "run"
    before = esi_run(folder, 10**12, monkeypatch, generation_batch_size="auto")
    before.folder.write_config(before.config)
    (folder / "responses.partial.jsonl").touch()
    assert generated(before) == 64 and changed_batch_sizes(folder, before.config) == []
    before.record("failed")
    again = esi_run(folder, 10**12, monkeypatch, generation_batch_size=8, batch_size=2)
    again.folder.check(again.config)
    assert generated(again) == 8
    again.record("running")
    assert "batch_sizes" not in json.loads((folder / "manifest.json").read_text())
    lines = changed_batch_sizes(folder, again.config)
    assert [line.partition(" before")[0] for line in lines] == [
        "esi.batch_size is 2 from this start on, and was 8",
        "esi.generation_batch_size is 8 from this start on, and was auto",
    ]
    assert changed_batch_sizes(tmp_path, again.config) == []


def test_attention_without_a_kernel_counts_its_matrices() -> None:
    """gpt-oss-20b's widths: torch's eager attention holds three matrices of a layer's heads at once."""
    folder, prompt, bf16 = ROOT / "configs/moe/architectures", 1300, 2
    config = AutoConfig.from_pretrained(folder / "gpt-oss-20b")
    kernel = widths(config)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)  # which settles the attention
    sizes, matrices = widths(config), 64 * prompt**2
    assert (kernel.written_heads, sizes.written_heads) == (0, 64)
    new = generation_bytes(sizes, bf16, prompt, 256) - generation_bytes(kernel, bf16, prompt, 256)
    assert new == (2 * bf16 + FP32) * matrices >= 3 * bf16 * matrices
    for recompute in (False, True):
        new = scoring_bytes(sizes, bf16, prompt, 256, recompute) - scoring_bytes(kernel, bf16, prompt, 256, recompute)
        assert new == (1 if recompute else sizes.layers) * (2 * bf16 + FP32) * matrices


def test_scoring_by_memory(tmp_path: Path, monkeypatch) -> None:
    row = scoring_bytes(widths(model_config("llama", 60)), 4, 20, 10, False)
    run = esi_run(tmp_path / "run", 12 * row, monkeypatch, batch_size="auto")
    assert run._scoring_batch("safety", fake_model(4 * row), 20, 10) == 4
    assert run._scoring_batch("tuning", fake_model(), 20, 10) == 8
    assert json.loads((tmp_path / "run/manifest.json").read_text())["batch_sizes"] == {"safety": 4, "tuning": 8}
    number = esi_run(tmp_path / "number", 0, monkeypatch, batch_size=5)
    assert number._scoring_batch("safety", fake_model(), 20, 10) == 5


@pytest.mark.parametrize("recorded", ['"many"', '{"generation": "many"}', "[3]"])
def test_a_damaged_record_is_refused(tmp_path: Path, monkeypatch, recorded: str) -> None:
    (tmp_path / "manifest.json").write_text(f'{{"batch_sizes": {recorded}}}')
    with pytest.raises(UserError, match=r"run.output_dir = .*manifest.json"):
        esi_run(tmp_path, 0, monkeypatch)


@pytest.mark.parametrize("section", ["esi", "eval"])
def test_what_the_config_takes(section: str) -> None:
    for value in (None, "auto", 1, 64, 1000):
        config = validate({**CONFIG, section: {"generation_batch_size": value}})
        assert getattr(config, section).generation_batch_size == value
    for value in (0, -1, True, "many", 2.5):
        with pytest.raises(UserError, match=f"{section}.generation_batch_size"):
            validate({**CONFIG, section: {"generation_batch_size": value}})


def test_auto_leaves_deepspeed_a_batch_of_one() -> None:
    config = validate({**CONFIG, "esi": {"batch_size": "auto"}, "deepspeed": {"zero_optimization": {"stage": 3}}})
    settings = resolve_deepspeed(config, 4)
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (1, 4)
    wrong = config.model_copy(update={"deepspeed": {**config.deepspeed, "train_micro_batch_size_per_gpu": 8}})
    with pytest.raises(UserError, match="esi.batch_size, which is auto"):
        resolve_deepspeed(wrong, 4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--gpu-memory-gib", "80", "esi.batch_size=auto"], ("1 of 64 (auto)", "64 prompts per rank (auto")),
        (["--gpu-memory-gib", "80"], ("of 8 prompts", "free memory); without GPUs 8\n")),
        (["esi.generation_batch_size=auto"], ("of 8 prompts", "free memory)\n")),
        (["--gpu-memory-gib", "0.05", "esi.batch_size=auto"], (" of 1 (auto)", "32 prompts per rank (auto")),
        (["esi.generation_batch_size=5"], ("8 of 8 prompts", "5 prompts per rank\n")),
    ],
)
def test_a_dry_run_says_what_auto_would_be(
    overrides: list[str], expected: tuple[str, str], monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    assert main("esi", ["--config", "configs/demo/esi.yaml", "--dry-run", *overrides]) == 0
    shown = capsys.readouterr().out
    facts = {line.split("  ")[0]: f"{line}\n" for line in shown.splitlines()}
    assert expected[0] in facts["passes"] and expected[1] in facts["answered at a time"]
    assert ("; without GPUs " in facts["batches to generate"]) == ("; without GPUs " in expected[1])


def test_bars_show_tokens_a_second(tmp_path: Path, capsys) -> None:
    curves: dict[str, float] = {}
    monitor = SimpleNamespace(write=lambda step, values: curves.update(values), close=lambda: None)
    for enabled in (True, False):
        with Tracker(tmp_path, enabled=enabled, tensorboard=False, stage="esi", monitor=monitor) as tracker:
            bar = tracker.progress(total=4, initial=0, unit="prompt", description="generate")
            with bar:
                bar.start_t = getattr(bar, "start_t", 0.0) - 10  # ten seconds ago
                bar.advance(1, 300)
                bar.advance(3, 700)
            assert bar.num_tokens == 1000
    assert curves["tokens_per_second/generate"] == pytest.approx(100, rel=0.1)
    assert "100 tokens/s" in capsys.readouterr().err


def test_recomputed_activations_have_no_dropout() -> None:
    """OPT's layer itself applies dropout where it is in training mode, which transformers' checkpointing asks for."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.5,
    )  # fmt: skip
    model, ids = OPTForCausalLM(config).eval(), torch.arange(12).view(2, 6)

    def gradients(model: PreTrainedModel) -> list[Tensor]:
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with pytest.raises(UserError, match=r"model\.gradient_checkpointing = True: is not supported by CTRLLMHeadModel"):
        recompute_activations(CTRLLMHeadModel(CTRLConfig(vocab_size=9, n_embd=4, dff=4, n_layer=1, n_head=1)))
    expected, plain = gradients(model), copy.deepcopy(model)
    recompute_activations(model)
    assert all(layer.training for layer in checkpointed_layers(model)) and len(checkpointed_layers(model)) == 2
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in checkpointed_layers(plain):
        layer.training = True
    assert not all(torch.equal(one, other) for one, other in zip(gradients(plain), expected, strict=True))
