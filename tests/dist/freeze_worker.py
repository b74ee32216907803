"""Run by the test beside it under a launcher: one process group trains a frozen model with several optimizers.

``masked`` is ``MaskedAdamW`` as transformers' Trainer treats it: the engine gets a plain AdamW instead.

argv: a JSON list of cases {"model", "mask", "train", "optimizer", "zero" (of the DeepSpeed config), "scheduler"
(optional: likewise), "when" (``before``, ``after`` the engine), "output" (file of the weights before and after),
"checkpoint" (optional: a folder; another engine goes on from one within the training), "drop" (optional: no guard),
"error" (optional: what a refusal says)}.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed's Muon would compile its product for half a minute

import deepspeed
import torch
from cases import run_cases
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from esi_ds import MaskedAdamW, freeze
from esi_ds.errors import UserError
from esi_ds.zero import runtime
from esi_ds.zero.freeze import FrozenFlatGroups, FrozenWeights

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.1),
}
OPTIMIZERS["masked"] = OPTIMIZERS["adamw"]
guarded_step = FrozenFlatGroups._guarded_step


def settings(case: dict) -> dict:
    """A DeepSpeed config with several sub-groups, and no persistent parameters."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000, **case.get("zero", {})}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if "scheduler" in case:
        config["scheduler"] = case["scheduler"]
    if case["optimizer"] == "muon":  # DeepSpeed's own: only a config makes it
        config["optimizer"] = {"type": "Muon", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
    return config


def weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.detach().cpu().clone() for name, tensor in engine.module.named_parameters()}


def make_engine(case: dict) -> tuple[deepspeed.DeepSpeedEngine, MaskedAdamW | FrozenWeights]:
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.bfloat16)
    guard = None
    if case["optimizer"] == "masked":
        guard = MaskedAdamW(model, case["mask"], case["train"], lr=1e-2, weight_decay=0.1)
        ids = torch.arange(5, 17)[None]
        model(input_ids=ids, labels=ids).loss.backward()  # as a script may that looks at gradients before it trains
        model.zero_grad()
    elif case["when"] == "before":
        guard = freeze(model, case["mask"], case["train"])
    if case["optimizer"] == "muon":
        for tensor in model.parameters():
            tensor.use_muon = tensor.ndim == 2
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = None if case["optimizer"] == "muon" else OPTIMIZERS[case["optimizer"]](parameters)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, config=settings(case)
    )
    return engine, guard or freeze(model, case["mask"], case["train"])


def step(engine: deepspeed.DeepSpeedEngine, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * runtime.rank() + number)
    ids = torch.randint(5, 200, (2, 12), generator=generator)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def train(case: dict) -> None:
    engine, guard = make_engine(case)
    before = weights(engine)
    for number in range(3):
        step(engine, number)
        if "checkpoint" in case and number == 0:
            engine.save_checkpoint(case["checkpoint"])
    after = weights(engine)
    if "checkpoint" in case:
        engine.destroy()
        engine, guard = make_engine(case)
        engine.load_checkpoint(case["checkpoint"])
        for number in (1, 2):
            step(engine, number)
        assert all(torch.equal(after[name], tensor) for name, tensor in weights(engine).items())
    if runtime.rank() == 0:
        save_file(
            {
                f"{at}.{name}": value
                for at, part in (("before", before), ("after", after))
                for name, value in part.items()
            },
            case["output"],
        )
    try:
        guard.close()
    finally:
        engine.destroy()


def run_case(case: dict) -> None:
    dropped = case.get("drop")
    FrozenFlatGroups._guarded_step = (lambda self, index: self._step_sub_group(index)) if dropped else guarded_step
    try:
        train(case)
    except UserError as error:
        assert case.get("error", "never") in str(error), error
        return
    assert "error" not in case


if __name__ == "__main__":
    run_cases(run_case)
