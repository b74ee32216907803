"""Experts without tokens have a gradient of exactly zero, even where the kernel leaves garbage in their rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import NEVER_ROUTED, build_mask, build_model, byte_bpe_tokenizer
from conftest import ROOT
from deepspeed.moe import ep_experts
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import moe

from esi_ds import MaskedAdamW
from esi_ds.errors import UserError
from esi_ds.models.idle_experts import mend_grouped_product
from esi_ds.zero import engine, expert_parallel
from esi_ds.zero.expert_parallel import GROUPED, mend_grouped_experts

sys.path.append(str(ROOT / "tests/dist"))
from idle_kernels import leaves_garbage  # noqa: E402 (beside the workers, which spoil their kernels with it)

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")  # gpt-oss: transposed, gate and up alternate
ROW = torch.tensor([[5, 9, 7, 5, 6, 9]])


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The libraries as installed, before and after each test."""
    monkeypatch.setattr(moe, "_grouped_mm", getattr(moe._grouped_mm, "__wrapped__", moe._grouped_mm))
    for name in GROUPED:
        run_experts = getattr(ep_experts, name)
        monkeypatch.setattr(ep_experts, name, getattr(run_experts, "__wrapped__", run_experts))
    yield


@pytest.mark.parametrize(("size", "expected"), [(2, UserError), (0, ValueError)])
def test_an_error_of_a_library_under_autoep_is_the_users(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: type[ValueError]
) -> None:
    monkeypatch.setattr(expert_parallel, "mend_registry", lambda: None)
    monkeypatch.setattr(engine.deepspeed, "initialize", lambda **settings: int("no number"))
    with pytest.raises(expected) as raised:
        engine._initialize(torch.nn.Module(), None, {"expert_parallel": {"enabled": size > 0, "autoep_size": size}})
    assert type(raised.value) is expected and "no number" in str(raised.value)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ROW).logits.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_garbage_of_transformers_kernel_is_zeroed(
    kind: str, recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(kind, tmp_path, byte_bpe_tokenizer(), leave_out=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    clean = gradients(model)
    experts = [name for name in clean if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    monkeypatch.setattr(torch, "_grouped_mm", leaves_garbage(torch._grouped_mm))
    spoilt = gradients(model)
    assert all(not spoilt[name][NEVER_ROUTED].isfinite().all() for name in experts)  # the garbage does arrive
    mend_grouped_product()
    mend_grouped_product()
    mended = gradients(model)
    assert all(torch.equal(mended[name], clean[name]) for name in clean)
    assert all(not mended[name][NEVER_ROUTED].any() for name in experts)


@pytest.mark.parametrize("gate_up", ["separate", "fused"])
def test_garbage_of_expert_parallel_kernels_is_zeroed(gate_up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    experts = ep_experts.GroupedExperts(16, 8, 4, gate_up_impl=gate_up)
    for weight in experts.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    tokens, counts = torch.randn(12, 16, generator=generator), torch.tensor([5, 0, 7, 0])
    # The fused activations are Triton's, for GPUs.
    monkeypatch.setattr(
        ep_experts, "apply_expert_activation", lambda gate, up, *rest: torch.nn.functional.silu(gate) * up
    )
    monkeypatch.setattr(
        ep_experts,
        "apply_packed_expert_activation",
        lambda both, *rest: torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
    )

    def run() -> list[Tensor]:
        experts.zero_grad(set_to_none=True)
        experts(tokens, counts).square().sum().backward()
        return [weight.grad.clone() for weight in experts.parameters()]

    clean = run()
    monkeypatch.setattr(torch, "_grouped_mm", leaves_garbage(torch._grouped_mm))
    assert all(not gradient[counts == 0].isfinite().all() for gradient in run())
    mend_grouped_experts()
    mend_grouped_experts()
    mended = run()
    assert all(torch.equal(one, other) for one, other in zip(mended, clean, strict=True))
    assert all(not gradient[counts == 0].any() for gradient in mended)


def test_experts_of_different_calls_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight in two products of one graph: an expert that is idle in one of them keeps the other's gradient."""
    monkeypatch.setattr(torch, "_grouped_mm", leaves_garbage(torch._grouped_mm))
    mend_grouped_product()
    weight = torch.randn(3, 8, 8, requires_grad=True)
    tokens = torch.ones(4, 8)
    first, then = torch.tensor([4, 4, 4], dtype=torch.int32), torch.tensor([0, 4, 4], dtype=torch.int32)
    output = moe._grouped_mm(tokens, weight, first) + moe._grouped_mm(tokens, weight, then)
    output.backward(torch.ones(4, 8))
    expected = torch.tensor([4.0, 4.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)
    assert weight.grad is not None and torch.equal(weight.grad, expected)


def test_tuning_leaves_idle_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PyTorch, by the optimizer alone: no weight of an idle expert moves, and its moments are exactly zero."""
    monkeypatch.setattr(torch, "_grouped_mm", leaves_garbage(torch._grouped_mm))
    build_model("mixtral", tmp_path / "model", byte_bpe_tokenizer(), leave_out=True)
    build_mask(tmp_path / "mask", tmp_path / "model", ratio=0.3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MaskedAdamW(model, tmp_path / "mask", train="complement", lr=1e-2)
    for _ in range(3):
        gradients(model)
        optimizer.step()
    experts = [(name, p) for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    for name, parameter in experts:
        assert torch.equal(parameter[NEVER_ROUTED], before[name][NEVER_ROUTED])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[parameter][moment].view(parameter.shape)[NEVER_ROUTED].any()
        assert not torch.equal(parameter[:NEVER_ROUTED], before[name][:NEVER_ROUTED])
