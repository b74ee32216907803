"""The masked AdamW in one process: torch.optim.AdamW's bits where all trains, nothing moved where nothing does."""

from __future__ import annotations

import copy
import gc
import json
import re
from inspect import signature
from operator import attrgetter
from pathlib import Path
from weakref import ref

import pytest
import torch
from builders import build_mask, build_masked_llama, load_model
from conftest import ROOT
from mask_folders import write_mask
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import esi_ds
from esi_ds import Mask
from esi_ds.core import adamw as rule
from esi_ds.core.mask import pack_bits
from esi_ds.core.schedule import learning_rate
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter, whole
from esi_ds.errors import UserError
from esi_ds.models.roles import describe, tower_names

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_masked_llama(tmp_path_factory.mktemp("adamw"))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def backward(model: nn.Module, generator: torch.Generator | None = None) -> None:
    ids = torch.randint(5, 200, (2, 12), generator=generator or torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        backward(model, generator)
        optimizer.step()
        optimizer.zero_grad()


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
    model, base = load_model(folder, dtype), load_model(folder, dtype)
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
    model, plain = load_model(folder), load_model(folder)
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
    one = load_model(folder, torch.bfloat16)
    optimizer = esi_ds.MaskedAdamW(one, folder / "mask", **OPTIONS)
    train(one, optimizer)
    other = load_model(folder, torch.bfloat16)
    other.load_state_dict(one.state_dict())
    again = esi_ds.MaskedAdamW(other, folder / "mask", **OPTIONS)
    again.load_state_dict(optimizer.state_dict())
    train(one, optimizer, seed=1)
    train(other, again, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_state_of_fp32_goes_on_in_bf16(folder: Path) -> None:
    """As when a resumed script loads the model in another dtype: masters are made of its weights."""
    one, other, base = load_model(folder), load_model(folder, torch.bfloat16), load_model(folder, torch.bfloat16)
    optimizer = esi_ds.MaskedAdamW(one, folder / "mask", **OPTIONS)
    train(one, optimizer)
    again = esi_ds.MaskedAdamW(other, folder / "mask", **OPTIONS)
    again.load_state_dict(optimizer.state_dict())
    train(other, again, seed=1)
    mask = Mask.load(folder / "mask")
    for (name, now), before in zip(other.named_parameters(), base.parameters(), strict=True):
        moved = as_bits(now) != as_bits(before)
        selected = mask.tensor(name) if name in mask.shapes else torch.zeros_like(moved)
        assert not moved[~selected].any() and (not selected.any() or moved[selected].any())


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_coordinates_follow_their_parameter_to_another_device(folder: Path, train_what: str) -> None:
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", train_what)
    weight = model.model.layers[0].self_attn.v_proj.weight
    assert optimizer.coordinates(weight).device.type == "cpu"
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().to("meta")))
    assert optimizer.coordinates(weight).device.type == "meta"
    optimizer.close()  # it would look at these weights before other tests' steps


def test_it_is_not_copied(folder: Path) -> None:
    """A copy would have none of its parameters' hooks."""
    with pytest.raises(UserError, match="cannot be copied or pickled"):
        copy.deepcopy(esi_ds.MaskedAdamW(load_model(folder), folder / "mask"))


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_parameters_that_are_cut_afterwards_are_refused(folder: Path, train_what: str) -> None:
    """As FSDP does with ``use_orig_params``: the same parameters, and in each a piece of the weights, flat."""
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", train_what)
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data.flatten()[8 : 8 + weight.numel() // 2].clone()
    weight.grad, before = torch.ones_like(weight), weight.detach().clone()
    with pytest.raises(UserError, match=r"v_proj\.weight: has shape .*FSDP"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_the_state_of_another_mask_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of the same counts too. A state of before this was saved is accepted."""
    model, mask = load_model(folder), Mask.load(folder / "mask")
    optimizer = esi_ds.MaskedAdamW(model, mask)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    flipped = {name: mask.tensor(name).flip(0, 1) for name in mask.shapes}
    other = write_mask(tmp_path, flipped, **mask.metadata)
    for arguments in ({"mask": other}, {"mask": mask, "train": "complement"}, {"mask": mask, "unscored": "train"}):
        again = esi_ds.MaskedAdamW(model, **arguments)
        with pytest.raises(UserError, match="saved with another mask, train, unscored or router"):
            again.load_state_dict(state)
    for group in state["param_groups"]:
        del group["trained_sha256"]
    again = esi_ds.MaskedAdamW(model, mask)
    again.load_state_dict(state)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_state_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    del state["param_groups"][0]["trained_sha256"]
    build_mask(tmp_path / "mask", folder / "model", ratio=0.3)
    with pytest.raises(UserError, match="was given moments of"):
        esi_ds.MaskedAdamW(load_model(folder), tmp_path / "mask").load_state_dict(state)


def test_frozen_gradients_do_not_count(folder: Path) -> None:
    """In a norm that a training loop clips by: neither those that arrive, here NaN, nor those that were there."""
    name, mask, model = "model.layers.0.self_attn.v_proj.weight", Mask.load(folder / "mask"), load_model(folder)
    backward(model)
    parameter, frozen_here = model.get_parameter(name), ~mask.tensor(name)
    optimizer = esi_ds.MaskedAdamW(model, mask)
    trained = [p.grad[mask.tensor(n)] for n, p in model.named_parameters() if p.grad is not None]
    expected = torch.cat(trained).norm()
    assert torch.allclose(nn.utils.clip_grad_norm_(model.parameters(), 1e9), expected)
    optimizer.zero_grad()
    parameter.register_hook(lambda gradient: gradient.masked_fill(frozen_here, torch.nan))
    backward(model)
    assert torch.allclose(nn.utils.clip_grad_norm_(model.parameters(), 1e9), expected)
    assert not parameter.grad[frozen_here].any()


def test_one_that_has_stepped_and_is_dropped_is_gone(folder: Path) -> None:
    """As in a notebook's second run. One that has not stepped lives on: Trainer drops what it lets step."""
    model, counts = load_model(folder), []
    for _ in range(2):
        optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
        backward(model)
        counts.append(sum(int((p.grad != 0).sum()) for p in model.parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
        dropped = ref(optimizer)
        del optimizer
        gc.collect()
        assert dropped() is None
    assert 0 < counts[0] == counts[1] <= Mask.load(folder / "mask").k
    waiting = ref(esi_ds.MaskedAdamW(model, folder / "mask"))
    gc.collect()
    assert waiting() is not None


def test_two_masks_share_a_model(folder: Path) -> None:
    """One rate for the mask's weights and another for the rest: neither takes the other's gradients."""
    model, base, mask = load_model(folder), load_model(folder), Mask.load(folder / "mask")
    optimizers = [esi_ds.MaskedAdamW(model, mask, what, lr=1e-2) for what in ("selected", "complement")]
    for tensor in model.parameters():
        tensor.requires_grad_(True)
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
    for name in list(mask.shapes)[1:]:
        assert float((model.get_parameter(name) != base.get_parameter(name)).double().mean()) > 0.9


@pytest.mark.parametrize("how", ["load_state_dict", "through data"])
def test_weights_written_between_steps_stay(folder: Path, how: str) -> None:
    """Masters follow: averaged or earlier weights are put back so."""
    model = load_model(folder, torch.bfloat16)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", lr=1e-2)
    train(model, optimizer, 2)
    written = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    if how == "load_state_dict":
        model.load_state_dict(written)
    else:
        for name, tensor in model.named_parameters():
            tensor.data.copy_(written[name])
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(torch.equal(as_bits(now), as_bits(written[name])) for name, now in model.state_dict().items())


def test_masters_keep_what_bf16_cannot_hold(folder: Path) -> None:
    """Nothing was written: many small steps add up."""
    model = load_model(folder, torch.bfloat16)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask", lr=1e-6)
    train(model, optimizer, 2)
    for tensor, state in optimizer.state.items():
        trained = optimizer.coordinates(tensor)
        assert bool((state["master"][trained] != tensor.detach().view(-1)[trained]).any())


def add_adapter(model: nn.Module) -> nn.Parameter:
    """As peft's ``get_peft_model`` does: the base no longer trains."""
    model.requires_grad_(False)
    adapter = model.model.layers[0].self_attn.lora_A = nn.Parameter(torch.zeros(3))
    adapter.grad = torch.ones(3)
    return adapter


def test_an_adapter_that_is_added_afterwards_is_refused(folder: Path) -> None:
    """Whether the loop steps this optimizer, or, as Trainer under DeepSpeed, another one."""
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    other = torch.optim.SGD([add_adapter(model)], lr=0.1)
    for stepped in (optimizer, other):
        with pytest.raises(UserError, match=r"layers\.0\.self_attn\.lora_A.*was added to the model"):
            stepped.step()
    assert not other.param_groups[0]["params"][0].any()
    optimizer.close()


def test_a_step_without_any_gradient_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="none of its parameters has a gradient"):
        esi_ds.MaskedAdamW(load_model(folder), folder / "mask").step()


def test_another_optimizer_of_its_parameters_is_refused_until_it_is_closed(folder: Path) -> None:
    """As at DeepSpeed's stage 0 in fp32: Trainer steps a plain AdamW."""
    model, base = load_model(folder), load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for steps in (0, 1):
        train(model, optimizer, steps)
        backward(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match="is about to be stepped by AdamW"):
            plain.step()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        plain.zero_grad()
    optimizer.close()
    train(model, plain, 1)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert float((model.get_parameter(name) != base.get_parameter(name)).double().mean()) > 0.9


def test_a_wrapper_of_it_may_step(folder: Path) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()

    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    train(model, Wrapper(optimizer), 2)
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


def test_masters_that_another_optimizer_steps_are_refused(folder: Path) -> None:
    """As at DeepSpeed's stage 0 in bf16. Another model's optimizer may step meanwhile."""
    model, elsewhere = load_model(folder, torch.bfloat16), nn.Parameter(torch.ones(3))
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    masters = [tensor.detach().float() for tensor in optimizer.parameters.values()]
    backward(model)
    elsewhere.grad = torch.ones(3)
    torch.optim.SGD([elsewhere], lr=0.1).step()
    backward(model)
    other = torch.optim.SGD(masters, lr=0.1)
    for master, tensor in zip(masters, optimizer.parameters.values(), strict=True):
        master.grad = tensor.grad.float()
    other.step()
    for master, tensor in zip(masters, optimizer.parameters.values(), strict=True):
        tensor.data.copy_(master)
    with pytest.raises(UserError, match="was changed by a step of SGD, not of MaskedAdamW"):
        backward(model)


def test_other_stages_of_zero_are_refused(folder: Path) -> None:
    """By what they leave on parameters, and where they give the optimizer masters of their own."""
    model = load_model(folder)
    optimizer = esi_ds.MaskedAdamW(model, folder / "mask")
    backward(model)
    for tensor in model.parameters():
        tensor._hp_mapping = None
    with pytest.raises(UserError, match="ZeRO stage 1 or 2.*use stage 3"):
        backward(model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(UserError, match="not a parameter of the model.*stage 3"):
        optimizer.step()


def test_groups_with_names(folder: Path) -> None:
    model = load_model(folder)
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


def compiled_inside(model: nn.Module, folder: Path) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def checkpointed(model: nn.Module, folder: Path) -> nn.Module:
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    return model


def parallel(model: nn.Module, folder: Path) -> nn.Module:
    return nn.DataParallel(model)


def reshaped(model: nn.Module, folder: Path) -> nn.Module:
    model.model.layers[0].mlp.up_proj = nn.Linear(24, 14, bias=False)
    return model


def tied(model: nn.Module, folder: Path) -> list[tuple[str, nn.Parameter]]:
    model.lm_head.weight = model.model.embed_tokens.weight
    return list(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, folder: model.parameters(), "without names"),
        (lambda model, folder: [{"params": list(model.parameters())}], "without names"),
        (renamed, "does not name"),
        (without, "names .*, which the model does not have"),
        (wrapped, "wrapped"),
        (compiled, "wrapped, as by torch.compile"),
        (compiled_inside, "wrapped, as by torch.compile"),
        (checkpointed, "wrapped, as by torch.compile, checkpointing"),
        (parallel, "wrapped, as by torch.compile, checkpointing or data parallelism"),
        (reshaped, "has shape"),
        (lambda model, folder: list(model.named_parameters())[:-2], "not among the parameters"),
        (tied, r"= lm_head\.weight: is model\.embed_tokens\.weight by another name; .*named_parameters\(\)"),
    ],
)
def test_refusals(folder: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        esi_ds.MaskedAdamW(change(load_model(folder), folder), folder / "mask")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1e-4),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, float("nan"))),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
    ],
)
def test_a_rule_that_cannot_train_is_refused(folder: Path, key: str, value: object) -> None:
    """As torch's AdamW does; a group's own values too. Nothing of the model has changed then."""
    model = load_model(folder)
    group = {"params": list(model.named_parameters()), key: value}
    for arguments, options in (((model, folder / "mask"), {key: value}), (([group], folder / "mask"), {})):
        with pytest.raises(UserError, match=f"{key} = .*: is not at least 0 and"):
            esi_ds.MaskedAdamW(*arguments, **options)
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_a_rule_of_zeros_and_a_rate_in_a_tensor_are_taken(folder: Path) -> None:
    model, zeros = load_model(folder), {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    for lr in (0, torch.tensor(1e-2)):
        esi_ds.MaskedAdamW(model, folder / "mask", lr=lr, **zeros).close()


def test_the_entry_points_have_the_documented_signatures() -> None:
    """docs/design.md §7, which other people's scripts follow."""
    calls = re.findall(r"`esi_ds\.([\w.]+)\(([^`]*)\)`", (ROOT / "docs/design.md").read_text())
    assert {name for name, _ in calls} == {"Mask.load", "MaskedAdamW", "freeze"}
    for name, arguments in calls:
        documented = [part.partition("=")[0].strip() for part in arguments.split(",") if part.strip() != "..."]
        assert list(signature(attrgetter(name)(esi_ds)).parameters)[: len(documented)] == documented, name


def test_a_mask_of_other_roles_says_so(folder: Path, tmp_path: Path) -> None:
    model, roles = load_model(folder), {"lm_head.weight": "embedding"}
    parameters = describe(model, None, roles)
    bits = {p.name: torch.arange(p.numel).view(p.shape) % 3 == 0 for p in parameters if p.scored}
    mask = write_mask(tmp_path, bits, total_numel=str(sum(p.numel for p in parameters)))
    with pytest.raises(UserError, match=r"does not name lm_head.weight; .* other roles: give its model\.roles"):
        esi_ds.MaskedAdamW(model, mask)
    assert esi_ds.MaskedAdamW(model, mask, roles=roles).trained.total == Mask.load(mask).k


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


class ToyRouter(nn.Linear):
    """A router by its class's name."""


class ToyTower(nn.Linear):
    input_modalities = "image"


class ToyMixture(nn.Module):
    """A matrix, a router and an encoder of images that no text goes through."""

    input_modalities = ("image", "text")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.router, self.vision = nn.Linear(5, 7), ToyRouter(7, 3), ToyTower(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.router(self.up(inputs))


def moved_by(mask: Path, train_what: str, **options: str | None) -> dict[str, int]:
    """Changed weights of each parameter of a ``ToyMixture`` after three steps; a gradient of 0 where text gives none.

    So has every parameter one under ZeRO-3, whose flat tensors decay whatever trains in them.
    """
    model, base = ToyMixture(), dict(ToyMixture().named_parameters())
    optimizer = esi_ds.MaskedAdamW(model, mask, train=train_what, lr=1e-2, weight_decay=0.5, **options)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        for tensor in model.vision.parameters():
            tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
        optimizer.step()
    return {name: int((tensor != base[name]).sum()) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_an_explicit_router_overrules_a_mask_that_names_it(train_what: str, tmp_path: Path) -> None:
    bits = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in ToyMixture().named_parameters()}
    named = ("up.weight", "router.weight")
    total = str(sum(values.numel() for values in bits.values()))
    mask = write_mask(tmp_path, {name: bits[name] for name in named}, total_numel=total)
    half, whole_router = sum(divmod(21, 2)) if train_what == "selected" else 21 // 2, 21
    moved = moved_by(mask, train_what)  # as the mask says
    assert moved["router.weight"] == half and moved["router.bias"] == 0
    moved = moved_by(mask, train_what, router="freeze")
    assert moved["router.weight"] == moved["router.bias"] == 0 < moved["up.weight"]
    moved = moved_by(mask, train_what, router="train")
    assert moved["router.weight"] == whole_router and moved["router.bias"] == 3 and moved["up.bias"] == 0
    digests = {esi_ds.MaskedAdamW(ToyMixture(), mask, train_what, router=r).trained.digest for r in (None, "freeze")}
    assert len(digests) == 2  # the state of one is not the other's


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_no_decay_reaches_what_no_text_trains(train_what: str, tmp_path: Path) -> None:
    """In the stages, whose rows are texts: a training loop of somebody's own may have images."""
    parameters = describe(ToyMixture())
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    total = sum(parameter.numel for parameter in parameters)
    mask = write_mask(tmp_path, {"up.weight": torch.arange(35).view(7, 5) % 2 == 0}, total_numel=str(total))
    towers = tower_names(parameters)
    trained = Trained(Mask.load(mask), train_what, "train", shapes, towers=towers)
    assert towers == ["vision.weight", "vision.bias"] and not any(map(trained.count, towers))
    assert not trained.bits("vision.weight", 0, 16).any() and trained.count("up.bias") == 7
    moved = moved_by(mask, train_what, unscored="train")
    assert moved["router.weight"] == 21 and moved["vision.weight"] == 16


def test_nothing_to_train_is_refused(folder: Path, tmp_path: Path) -> None:
    build_mask(tmp_path / "mask", folder / "model", ratio=0.0)
    with pytest.raises(UserError, match="nothing would train"):
        esi_ds.MaskedAdamW(load_model(folder), tmp_path / "mask")
    with pytest.raises(UserError, match="train = chosen"):
        esi_ds.MaskedAdamW(load_model(folder), folder / "mask", train="chosen")


@pytest.mark.parametrize("train_what", ["selected", "complement"])
def test_counts_of_trained_weights(folder: Path, train_what: str) -> None:
    """On every cut: the positions from a flat index on."""
    mask = Mask.load(folder / "mask")
    trained = Trained(mask, train_what, "freeze", mask.shapes)
    for name in list(mask.shapes)[:4]:
        numel = mask.numel(name)
        bits = trained.bits(name, 0, numel)
        assert trained.count(name) == int(bits.sum())
        for low in (0, 1, 7, 8, 9, numel // 3, numel - 1, numel):
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
    in_part = {"lr": 3.0, "scheduler": "constant", "max_steps": 10, "warmup_ratio": 0.25}  # 2.5 steps
    assert [learning_rate(s, **in_part) for s in range(4)] == [1.0, 2.0, 3.0, 3.0]
