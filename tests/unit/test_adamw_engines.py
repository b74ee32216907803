"""The masked AdamW in the place of an optimizer that DeepSpeed's stage-3 engine was given instead, in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import build_mask, build_masked_llama, load_model
from deepspeed.runtime.lr_schedules import WarmupLR
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import esi_ds
from esi_ds.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_masked_llama(tmp_path_factory.mktemp("takeover"))


def backward(model: nn.Module) -> None:
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()


class Engine:
    """What ``MaskedAdamW`` uses of DeepSpeed's stage-3 optimizer: each parameter has a flat tensor of its own."""

    def __init__(self, own: esi_ds.MaskedAdamW):
        self.fp16_groups = [[tensor] for tensor in own.parameters.values()]
        self.fp32_partitioned_groups_flat = [
            tensor.detach().float().view(-1).clone() for tensor in own.parameters.values()
        ]
        self.optimizer = torch.optim.AdamW(self.fp32_partitioned_groups_flat, lr=0.5)
        for tensor in own.parameters.values():
            tensor._z3_optimizer = self
            tensor.ds_tensor = SimpleNamespace(ds_numel=tensor.numel())

    def step(self) -> None: ...


@pytest.fixture
def on_one_rank(monkeypatch) -> None:
    monkeypatch.setattr("esi_ds.zero.optimizer.local_range", lambda tensor: (0, tensor.numel()))


@pytest.mark.usefixtures("on_one_rank")
def test_an_engine_that_is_made_after_a_gradient_is_taken_over(folder: Path) -> None:
    """By the newest of a model's optimizers, and so is the next engine. The engine's schedule scales its rate."""
    model = load_model(folder)
    old = esi_ds.MaskedAdamW(model, folder / "mask", train="complement")
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", lr=1e-2)
    backward(model)
    for _ in range(2):
        engine = Engine(optimizer)
        backward(model)
        assert engine.optimizer is optimizer and optimizer.zero.optimizer is engine and old.zero is None
        assert [(group["own_lr"], group["lr"]) for group in optimizer.param_groups] == [(1e-2, 0.5)]
    optimizer.param_groups[0]["lr"] = 0.5 / 2
    assert close_to(step_of(optimizer, engine.fp32_partitioned_groups_flat[0]), 1e-2 / 2)


def step_of(optimizer: esi_ds.MaskedAdamW, flat: Tensor) -> Tensor:
    """How far the trained weights of a flat tensor go: under a constant gradient by the learning rate."""
    before, flat.grad = flat.clone(), torch.ones_like(flat)
    for group in optimizer.param_groups:  # as DeepSpeed does for each sub-group
        group["params"] = [flat] if group is optimizer.param_groups[0] else []
    optimizer.step()
    moved = (before - flat)[optimizer.coordinates(flat)]
    assert len(moved)
    return moved


def close_to(moved: Tensor, rate: float) -> bool:
    return torch.allclose(moved, torch.tensor(rate), rtol=1e-4)


def warm_up(step: int) -> float:
    return min(1.0, step / 4)


@pytest.mark.usefixtures("on_one_rank")
def test_a_schedule_that_is_dropped_with_it_leaves_its_rate(folder: Path) -> None:
    """Trainer drops both; a warm-up has set the rate to 0 by then."""
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", lr=1e-2)
    LambdaLR(optimizer, warm_up)
    engine = Engine(optimizer)
    backward(model)
    assert [(group["own_lr"], group["lr"]) for group in optimizer.param_groups] == [(1e-2, 0.5)]
    assert close_to(step_of(optimizer, engine.fp32_partitioned_groups_flat[0]), 1e-2)


SCHEDULES = {
    "torch": lambda engine: LambdaLR(engine.optimizer, warm_up),
    "deepspeed": lambda engine: WarmupLR(engine, 0.0, 0.5, 4, "linear"),
}


@pytest.mark.usefixtures("on_one_rank")
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_of_the_engine_scales_its_rate(folder: Path, kind: str) -> None:
    """It holds the optimizer that was replaced. After a checkpoint was loaded, too."""
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", lr=1e-2)
    engine = Engine(optimizer)
    schedule = SCHEDULES[kind](engine)
    backward(model)
    flat, rates = engine.fp32_partitioned_groups_flat[0], []
    for number in range(4):
        schedule.step()
        rates.append(schedule.get_last_lr()[0] / 0.5)
        assert close_to(step_of(optimizer, flat), 1e-2 * rates[-1])
        if number == 1:
            optimizer.load_state_dict(optimizer.state_dict())
    assert sorted(set(rates)) == rates and rates[-1] > 0.5


@pytest.mark.usefixtures("on_one_rank")
def test_an_engines_optimizer_that_is_made_of_its_groups_has_its_rates(folder: Path) -> None:
    """As accelerate makes a DeepSpeedCPUAdam: schedules write into groups that are this optimizer's."""
    model = load_model(folder)
    named = list(model.named_parameters())
    groups = [{"params": named[:9]}, {"params": named[9:], "weight_decay": 0.5}]
    optimizer = esi_ds.MaskedAdamW(groups, folder / "mask", lr=1e-2)
    engine = Engine(optimizer)
    engine.optimizer = torch.optim.AdamW(optimizer.param_groups, lr=1e-2)
    schedule = WarmupLR(engine, 0.0, 1e-2, 4, "linear")
    backward(model)
    for _ in range(3):
        schedule.step()
    assert close_to(step_of(optimizer, engine.fp32_partitioned_groups_flat[0]), 1e-2 / 2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]


@pytest.mark.usefixtures("on_one_rank")
def test_a_rate_of_0_is_refused(folder: Path) -> None:
    model = load_model(folder)
    Engine(esi_ds.MaskedAdamW(model, folder / "mask")).optimizer.param_groups[0]["initial_lr"] = 0.0
    with pytest.raises(UserError, match="whose learning rate is 0"):
        backward(model)


@pytest.mark.usefixtures("on_one_rank")
def test_a_resumed_engine_keeps_its_moments(folder: Path, tmp_path: Path) -> None:
    """DeepSpeed loads them into the optimizer that it has, before the first gradient."""
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    engine = Engine(optimizer)
    backward(model)
    for flat in engine.fp32_partitioned_groups_flat:
        optimizer.state_of(flat)["step"].fill_(3)
        optimizer.state_of(flat)["exp_avg"].fill_(2.0)
    optimizer.param_groups[0]["params"] = engine.fp32_partitioned_groups_flat
    state = optimizer.state_dict()

    def resumed(mask: Path, **options) -> esi_ds.MaskedAdamW:
        model = load_model(folder)
        again = esi_ds.MaskedAdamW(model, mask, **options)
        Engine(again).optimizer.load_state_dict(state)
        backward(model)
        return again

    again = resumed(folder / "mask")
    assert len(again.state) == len(optimizer.state) > 3
    assert all(int(s["step"]) == 3 and bool((s["exp_avg"] == 2).all()) for s in again.state.values())
    with pytest.raises(UserError, match="saved with another mask"):
        resumed(build_mask(tmp_path / "other", folder / "model", ratio=0.2, seed=1))
    del state["param_groups"][0]["trained_sha256"]
    with pytest.raises(UserError, match="was given moments of"):
        resumed(build_mask(tmp_path / "larger", folder / "model", ratio=0.3))
    for values in state["state"].values():
        del values["exp_avg_sq"]
    with pytest.raises(UserError, match="cannot go on with the state of AdamW"):
        resumed(folder / "mask")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"zenflow": True}, "other processes or threads"),
        ({"swap_optimizer": True}, "nvme: holds weights where the mask cannot reach them"),
        ({"offload_optimizer": True, "partial_offload": 0.3}, r"ratio = 0\.3: .*DeepSpeed's own AdamW"),
        ({"use_muon": True}, "orthogonalised for Muon"),
    ],
)
def test_engines_that_step_otherwise_are_refused(folder: Path, engine: dict, message: str) -> None:
    model = load_model(folder)
    esi_ds.MaskedAdamW(model, folder / "mask")
    for tensor in model.parameters():
        tensor._z3_optimizer = SimpleNamespace(**engine, optimizer=None)
    with pytest.raises(UserError, match=message):
        backward(model)
