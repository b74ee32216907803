"""esi_ds.freeze in plain PyTorch: no frozen bit moves under any optimizer, and what it cannot keep is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import build_mask, build_masked_llama, build_model, byte_bpe_tokenizer, load_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from esi_ds import Mask, freeze
from esi_ds.errors import UserError
from esi_ds.zero.freeze import FrozenFlatGroups

Maker = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_masked_llama(tmp_path_factory.mktemp("freeze"))


def backward(model: nn.Module, seed: int = 0) -> None:
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def changes(model: nn.Module, base: nn.Module, mask: Mask, train_what: str) -> tuple[int, int]:
    """Numbers of changed weights, by bits: (frozen, trained)."""
    frozen = trained = 0
    for (name, now), before in zip(model.named_parameters(), base.parameters(), strict=True):
        width = torch.int32 if now.element_size() == 4 else torch.int16
        changed = now.detach().contiguous().view(width) != before.detach().contiguous().view(width)
        trains = torch.zeros_like(changed)
        if name in mask.shapes:
            trains = mask.tensor(name) if train_what == "selected" else ~mask.tensor(name)
        frozen += int(changed[~trains].sum())
        trained += int(changed[trains].sum())
    return frozen, trained


class SignDescent(torch.optim.Optimizer):
    """A rule of someone's own that decays, jitters and writes through ``.data``, by which autograd counts no change."""

    def __init__(self, params: Iterable[nn.Parameter]):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.data.mul_(0.99)
                tensor.data = tensor.data + 1e-3 * torch.randn_like(tensor)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [tensor for tensor in model.parameters() if tensor.requires_grad and tensor.ndim == 2]


OPTIMIZERS: dict[str, Maker] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "adamw-one-by-one": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "muon": lambda model: torch.optim.Muon(matrices(model), lr=1e-2, weight_decay=0.1),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.1),
    "own": lambda model: SignDescent(model.parameters()),
}


@pytest.mark.parametrize("train_what", ["selected", "complement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_frozen_bit_moves(folder: Path, name: str, dtype: torch.dtype, train_what: str) -> None:
    model, base = load_model(folder, dtype), load_model(folder, dtype)
    with freeze(model, folder / "mask", train_what):
        train(model, OPTIMIZERS[name](model))
    frozen, trained = changes(model, base, Mask.load(folder / "mask"), train_what)
    assert frozen == 0 and trained > 1000


def test_eight_bit_adamw(folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, base = load_model(folder), load_model(folder)
    with freeze(model, folder / "mask"):
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.1, min_8bit_size=1)
        train(model, optimizer)
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    frozen, trained = changes(model, base, Mask.load(folder / "mask"), "selected")
    assert frozen == 0 and trained > 1000


def test_an_optimizer_that_was_made_before(folder: Path) -> None:
    """It holds momentum and gradients of what is then frozen."""
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer)
    backward(model)
    base = copy.deepcopy(model)
    with freeze(model, folder / "mask"):
        optimizer.step()
        train(model, optimizer)
    frozen, trained = changes(model, base, Mask.load(folder / "mask"), "selected")
    assert frozen == 0 and trained > 1000


def test_frozen_gradients_reach_no_trained_weight(folder: Path) -> None:
    """Muon mixes all gradients of a matrix, and clipping all of the model: frozen ones, here NaN, count as 0."""
    name = "model.layers.0.self_attn.v_proj.weight"
    mask = Mask.load(folder / "mask")
    model = load_model(folder)
    parameter = model.get_parameter(name)
    frozen_here = ~mask.tensor(name)
    parameter.register_hook(lambda gradient: gradient.masked_fill(frozen_here, torch.nan))
    with freeze(model, mask):
        optimizer = torch.optim.Muon(matrices(model), lr=1e-2)
        backward(model)
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        assert not parameter.grad[frozen_here].any()
        optimizer.step()
    assert all(bool(tensor.isfinite().all()) for tensor in model.parameters())


def test_a_step_that_fails_is_undone_where_frozen(folder: Path) -> None:
    class Failing(torch.optim.Optimizer):
        def step(self, closure=None):
            for tensor in self.param_groups[0]["params"]:
                tensor.data.mul_(0.99)
            raise MemoryError

    model, base, mask = load_model(folder), load_model(folder), Mask.load(folder / "mask")
    frozen = freeze(model, mask)
    optimizer = Failing(model.parameters(), {})
    backward(model)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert changes(model, base, mask, "selected")[0] > 0
    frozen.close()
    assert changes(model, base, mask, "selected")[0] == 0


def test_a_step_that_calls_its_base_classs(folder: Path) -> None:
    """torch calls the hooks of both, once the base class has an instance."""

    class Decayed(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for tensor in self.param_groups[0]["params"]:
                tensor.data.mul_(0.99)

    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    model, base, mask = load_model(folder), load_model(folder), Mask.load(folder / "mask")
    with freeze(model, mask) as frozen:
        train(model, Decayed(model.parameters(), lr=0.1))
        assert not frozen._open_steps  # copies
    assert changes(model, base, mask, "selected")[0] == 0 < changes(model, base, mask, "selected")[1]


def test_close_removes_all(folder: Path) -> None:
    model, base, mask = load_model(folder), load_model(folder), Mask.load(folder / "mask")
    model.model.norm.weight.requires_grad_(False)
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    frozen = freeze(model, mask)
    assert not model.model.embed_tokens.weight.requires_grad
    frozen.close()
    frozen.close()
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == hooks
    assert model.model.embed_tokens.weight.requires_grad and not model.model.norm.weight.requires_grad
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert changes(model, base, mask, "selected")[0] > 1000


def test_the_model_of_another_optimizer_is_left_alone(folder: Path) -> None:
    """Two models train, one of them frozen."""
    model, other, base, mask = load_model(folder), load_model(folder), load_model(folder), Mask.load(folder / "mask")
    with freeze(model, mask):
        for _ in range(2):
            train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), 1)
            train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    assert changes(model, base, mask, "selected")[0] == 0
    assert changes(other, base, mask, "selected")[0] > 1000


@pytest.mark.parametrize("how", ["in place", "through data"])
def test_a_change_from_outside_is_noticed(folder: Path, how: str) -> None:
    model = load_model(folder)
    frozen = freeze(model, folder / "mask")
    weight = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        (weight if how == "in place" else weight.data).mul_(1.5)
    with pytest.raises(UserError, match="layers.0.self_attn.v_proj.weight.*other than an optimizer's step"):
        backward(model) if how == "in place" else frozen.check()
    with pytest.raises(UserError, match="changed by"):
        frozen.close()


def test_a_conversion_afterwards_is_refused_before_training(folder: Path) -> None:
    """It has other bits, whatever trains: at the end of the training the message would be late."""
    model = load_model(folder)
    frozen = freeze(model, folder / "mask")
    model.to(torch.bfloat16)
    with pytest.raises(UserError, match="was converted from torch.float32 to torch.bfloat16 after it was frozen"):
        backward(model)
    with pytest.raises(UserError, match="was converted"):
        frozen.close()


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_parameters_that_are_cut_afterwards_are_refused(folder: Path, train_what: str) -> None:
    """As FSDP does with ``use_orig_params``: the same parameters, and in each a piece of the weights, flat."""
    model = load_model(folder)
    frozen = freeze(model, folder / "mask", train_what)
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data.flatten()[8 : 8 + weight.numel() // 2].clone()
    weight.grad, before = torch.ones_like(weight), weight.detach().clone()
    with pytest.raises(UserError, match=r"v_proj\.weight: has shape .*FSDP"):
        torch.optim.SGD([weight], lr=0.1).step()
    assert torch.equal(weight, before)
    with pytest.raises(UserError, match="has shape"):
        frozen.close()


def test_parameters_that_are_replaced_afterwards_are_noticed_before_they_train(folder: Path) -> None:
    """As ``load_state_dict(assign=True)`` and FSDP2 do: nothing watches the new tensors."""
    model, base = load_model(folder), load_model(folder)
    frozen = freeze(model, folder / "mask")
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    for tensor in model.parameters():
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model)
    with pytest.raises(UserError, match="was replaced by another tensor"):
        optimizer.step()
    assert changes(model, base, Mask.load(folder / "mask"), "selected") == (0, 0)
    with pytest.raises(UserError, match="was replaced by another tensor"):
        frozen.close()


def test_an_adapter_that_is_added_afterwards_is_noticed_before_it_trains(folder: Path) -> None:
    """As peft's ``get_peft_model`` and TRL's ``peft_config`` add one: merged, it would change frozen weights."""
    model = load_model(folder)
    frozen = freeze(model, folder / "mask")
    model.requires_grad_(False)
    adapter = model.model.layers[0].self_attn.lora_A = nn.Parameter(torch.zeros(3))
    adapter.grad = torch.ones(3)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.lora_A.*was added to the model"):
        torch.optim.SGD([adapter], lr=0.1).step()
    assert not adapter.any()
    with pytest.raises(UserError, match="was added to the model"):
        frozen.close()


def test_a_second_mask_on_one_engine_is_refused(folder: Path) -> None:
    """Closing the first would take the second's guard off."""
    model = load_model(folder)
    frozen = freeze(model, folder / "mask")
    guard = FrozenFlatGroups.__new__(FrozenFlatGroups)
    for tensor in model.parameters():
        tensor._z3_optimizer = SimpleNamespace(_optimizer_step=guard._guarded_step)
    with pytest.raises(UserError, match="frozen by another mask already"):
        backward(model)
    frozen.close()


@pytest.mark.parametrize("steps_at_0", [0, 1])
def test_masters_outside_of_the_model_are_refused(folder: Path, steps_at_0: int) -> None:
    """As DeepSpeed's bf16 optimizer, apex's O2 and others do: they step fp32 copies, and copy these back.

    A warm-up may begin at 0, and small steps round to the same bits.
    """
    model = load_model(folder, torch.bfloat16)
    frozen = freeze(model, folder / "mask")
    masters = [tensor.detach().float() for tensor in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1, weight_decay=0.1)
    for number in range(steps_at_0 + 1):
        optimizer.param_groups[0]["lr"] = 0.0 if number < steps_at_0 else 0.1
        backward(model)
        for master, tensor in zip(masters, model.parameters(), strict=True):
            master.grad = None if tensor.grad is None else tensor.grad.float()
        optimizer.step()
        for master, tensor in zip(masters, model.parameters(), strict=True):
            tensor.data.copy_(master)
    with pytest.raises(UserError, match="changed by a step of SGD"):
        backward(model)
    with pytest.raises(UserError):
        frozen.close()


def test_wrong_use(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    with pytest.raises(UserError, match="is unknown"):
        freeze(model, folder / "mask", "unselected")
    build_model("qwen3_moe", tmp_path / "other", byte_bpe_tokenizer())
    build_mask(tmp_path / "mask", tmp_path / "other")
    with pytest.raises(UserError):
        freeze(model, tmp_path / "mask")
    assert all(tensor.requires_grad for tensor in model.parameters())


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (SimpleNamespace(zenflow=True), "other processes or threads"),
        (type("SuperOffloadOptimizer_Stage3", (), {})(), "other processes or threads"),
        (SimpleNamespace(swap_optimizer=True), "nvme: holds weights where the mask cannot reach them"),
    ],
)
def test_engines_that_step_elsewhere_are_refused(folder: Path, engine: object, message: str) -> None:
    model = load_model(folder)
    frozen = freeze(model, folder / "mask")
    for tensor in model.parameters():
        tensor._z3_optimizer = engine
    with pytest.raises(UserError, match=message):
        backward(model)
    frozen.close()


def test_dtensors_are_refused(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = load_model(folder)
        projection = model.model.layers[0].self_attn.v_proj
        projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh))
        with pytest.raises(UserError, match="v_proj.weight.*is a DTensor"):
            freeze(model, folder / "mask")
    finally:
        torch.distributed.destroy_process_group()
