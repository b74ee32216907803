"""The masked AdamW in one process: torch.optim.AdamW's bits where all trains, nothing moved where nothing does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import build_mask, build_model, byte_bpe_tokenizer
from mask_folders import write_mask
from torch import nn
from transformers import AutoModelForCausalLM

import esi_ds
from esi_ds import Mask
from esi_ds.core import adamw as rule
from esi_ds.core.mask import pack_bits
from esi_ds.core.schedule import learning_rate
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter, whole
from esi_ds.errors import UserError

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adamw")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_mask(folder / "mask", folder / "model", ratio=0.2)
    return folder


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(5, 200, (2, 12), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)


@pytest.mark.parametrize("kind", ["all", "bits", "positions"])
def test_the_rule_is_torchs_bit_for_bit(kind: str, monkeypatch) -> None:
    """Against torch.optim.AdamW on the trained coordinates alone, state too; frozen ones hold NaN, inf and −0.0."""
    monkeypatch.setattr(rule, "CPU_CHUNK", 64)
    torch.manual_seed(0)
    weight = torch.randn(1003)
    trained = torch.ones(1003, dtype=torch.bool) if kind == "all" else torch.rand(1003) < 0.4
    weight[~trained] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-42]).repeat(251)[: int((~trained).sum())]
    selection = {"all": None, "bits": pack_bits(trained), "positions": trained.nonzero().flatten().to(torch.int32)}[
        kind
    ]
    size = int(trained.sum()) if kind == "positions" else 1003
    moments = [torch.zeros(size), torch.zeros(size)]
    expected = weight[trained].clone().requires_grad_()
    reference = torch.optim.AdamW([expected], foreach=False, **OPTIONS)
    before = weight.clone()
    for step in range(1, 6):
        gradient = torch.randn(1003)
        gradient[~trained] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(335)[: int((~trained).sum())]
        expected.grad = gradient[trained].clone()
        reference.step()
        rule.masked_adamw(weight, gradient, *moments, selection, step=step, **OPTIONS)
    assert torch.equal(weight[trained], expected)
    assert torch.equal(as_bits(weight)[~trained], as_bits(before)[~trained])
    for got, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        assert torch.equal(got if kind == "positions" else got[trained], reference.state[expected][name])
        assert kind == "positions" or not got[~trained].any()


def test_keep_only(monkeypatch) -> None:
    monkeypatch.setattr(rule, "CPU_CHUNK", 16)
    trained = torch.rand(101) < 0.5
    for selection in (pack_bits(trained), trained.nonzero().flatten()):
        values = torch.full((101,), torch.nan)
        values[trained] = 3.0
        rule.keep_only(values, selection)
        assert torch.equal(values, torch.where(trained, 3.0, 0.0))


@pytest.mark.parametrize("train_what", ["selected", "complement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_pytorch(folder: Path, train_what: str, dtype: torch.dtype) -> None:
    model, base = load(folder, dtype), load(folder, dtype)
    mask = Mask.load(folder / "mask")
    optimizer = esi_ds.MaskedAdamW(model, mask, train=train_what, **OPTIONS)
    train(model, optimizer)
    moved = frozen = 0
    for (name, now), before in zip(model.named_parameters(), base.parameters(), strict=True):
        trains = torch.zeros_like(before, dtype=torch.bool)
        if name in mask.shapes:
            trains = mask.tensor(name) if train_what == "selected" else ~mask.tensor(name)
        same = as_bits(now) == as_bits(before)
        frozen += int((~same)[~trains].sum())
        moved += int((~same)[trains].sum())
    assert frozen == 0 and moved > 1000
    size = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert size == optimizer.trained.total if train_what == "selected" else size >= optimizer.trained.total


def test_everything_trained_is_torchs_adamw(folder: Path, tmp_path: Path) -> None:
    build_mask(tmp_path / "mask", folder / "model", ratio=2.0)
    metadata = json.loads(Mask.load(tmp_path / "mask").metadata["counts"])
    first = next(iter(metadata))  # the builder leaves this one out
    model, plain = load(folder), load(folder)
    plain.get_parameter(first).requires_grad_(False)
    optimizer = esi_ds.MaskedAdamW(model, tmp_path / "mask", unscored="train", **OPTIONS)
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], foreach=False, **OPTIONS)
    train(model, optimizer)
    train(plain, reference)
    for (name, now), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(now, expected), name
        for key, value in reference.state.get(expected, {}).items():
            assert torch.equal(optimizer.state[now][key].view(-1), value.view(-1)), (name, key)


def test_state_dict_goes_on_with_the_same_bits(folder: Path) -> None:
    """In bf16: torch would cast the masters to the parameters' dtype on the way in."""
    one = load(folder, torch.bfloat16)
    optimizer = esi_ds.MaskedAdamW(one, folder / "mask", **OPTIONS)
    train(one, optimizer)
    other = load(folder, torch.bfloat16)
    other.load_state_dict(one.state_dict())
    again = esi_ds.MaskedAdamW(other, folder / "mask", **OPTIONS)
    again.load_state_dict(optimizer.state_dict())
    train(one, optimizer, seed=1)
    train(other, again, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_groups_with_names(folder: Path) -> None:
    model = load(folder)
    named = list(model.named_parameters())
    groups = [{"params": named[:9], "lr": 1e-3}, {"params": named[9:], "weight_decay": 0.0}]
    optimizer = esi_ds.MaskedAdamW(groups, folder / "mask", **OPTIONS)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    assert esi_ds.MaskedAdamW(model.named_parameters(), folder / "mask").trained.total == optimizer.trained.total


def renamed(model: nn.Module, folder: Path) -> nn.Module:
    model.model.layers[0].mlp.extra = nn.Linear(3, 3, bias=False)
    return model


def without(model: nn.Module, folder: Path) -> nn.Module:
    del model.model.layers[1]
    return model


def wrapped(model: nn.Module, folder: Path) -> nn.Module:
    outer = nn.Module()
    outer.base_model = nn.Module()
    outer.base_model.model = model
    return outer


def compiled(model: nn.Module, folder: Path) -> nn.Module:
    return torch.compile(model)


def parallel(model: nn.Module, folder: Path) -> nn.Module:
    return nn.DataParallel(model)


def reshaped(model: nn.Module, folder: Path) -> nn.Module:
    model.model.layers[0].mlp.up_proj = nn.Linear(24, 14, bias=False)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, folder: model.parameters(), "without names"),
        (lambda model, folder: [{"params": list(model.parameters())}], "without names"),
        (renamed, "does not name"),
        (without, "names .*, which the model does not have"),
        (wrapped, "wrapped"),
        (compiled, "wrapped by torch.compile or for data parallelism"),
        (parallel, "wrapped by torch.compile or for data parallelism"),
        (reshaped, "has shape"),
        (lambda model, folder: list(model.named_parameters())[:-2], "not among the parameters"),
    ],
)
def test_refusals(folder: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        esi_ds.MaskedAdamW(change(load(folder), folder), folder / "mask")


def test_a_mask_may_name_unscored_parameters_too(folder: Path, tmp_path: Path) -> None:
    """A plain module, every parameter in the mask, all bits set: torch.optim.AdamW, biases included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    plain = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    plain.load_state_dict(model.state_dict())
    write_mask(tmp_path, {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()})
    optimizer = esi_ds.MaskedAdamW(model, tmp_path, **OPTIONS)
    reference = torch.optim.AdamW(plain.parameters(), foreach=False, **OPTIONS)
    for _ in range(3):
        inputs = torch.randn(4, 5)
        for trained, by in ((model, optimizer), (plain, reference)):
            by.zero_grad()
            trained(inputs).square().sum().backward()
            by.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_nothing_to_train_is_refused(folder: Path, tmp_path: Path) -> None:
    build_mask(tmp_path / "mask", folder / "model", ratio=0.0)
    with pytest.raises(UserError, match="nothing would train"):
        esi_ds.MaskedAdamW(load(folder), tmp_path / "mask")
    with pytest.raises(UserError, match="train = chosen"):
        esi_ds.MaskedAdamW(load(folder), folder / "mask", train="chosen")


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_counts_of_trained_weights(folder: Path, train_what: str) -> None:
    """On every cut: what lies before a flat index, and the positions between two."""
    mask = Mask.load(folder / "mask")
    trained = Trained(mask, train_what, "freeze", mask.shapes)
    for name in list(mask.shapes)[:4]:
        numel = mask.numel(name)
        bits = trained.bits(name, 0, numel)
        assert trained.count(name) == int(bits.sum())
        for low in (0, 1, 7, 8, 9, numel // 3, numel - 1, numel):
            assert trained.count_before(name, low) == int(bits[:low].sum())
            positions = trained.positions_of(whole(Parameter(name, (numel,), 0, "", ())).cut(low, numel))
            expected = bits[low:].nonzero().flatten()
            assert positions is None or torch.equal(positions.long(), expected)


def test_schedules() -> None:
    shared = {"lr": 2.0, "max_steps": 10, "warmup_ratio": 0.2}
    assert [learning_rate(s, scheduler="constant", **shared) for s in (0, 1, 2, 9)] == [1.0, 2.0, 2.0, 2.0]
    assert [learning_rate(s, scheduler="linear", **shared) for s in (2, 6)] == [2.0, 1.0]
    assert learning_rate(6, scheduler="cosine", **shared) == pytest.approx(1.0)
    assert 0 < learning_rate(9, scheduler="cosine", **shared) < 0.1
    assert learning_rate(0, lr=2.0, scheduler="cosine", max_steps=1, warmup_ratio=1.0) == 2.0
