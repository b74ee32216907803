"""Run by the tests beside it under a launcher: one process group disturbs many models and restores them.

argv: a JSON list of cases {"model", "mask", "dtype", "zero", "noise", "seed", "out", "drop" (optional), "settings"
(more of the DeepSpeed mapping, optional)}. Rank 0 writes the logits before the block, inside and after it, and the
whole weights inside and after, where experts are not on different ranks.
"""

from __future__ import annotations

import torch
from cases import run_cases
from safetensors.torch import save_file

from esi_ds import Mask
from esi_ds.models.folder import ModelSource
from esi_ds.zero import perturb, runtime
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.score import unit_sigmas

IDS = [[7, 30, 41, 52, 9, 33, 78]]


def logits(model: ShardedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=torch.tensor(IDS), use_cache=False).logits.float()


def whole(model: ShardedModel) -> dict[str, torch.Tensor]:
    """Every weight as a gather gives it."""
    model.release()
    if model.expert_parallel:
        return {}
    with model.gathered(list(model.by_name.values())):
        return {name: tensor.detach().clone() for name, tensor in model.by_name.items()}


def run_case(case: dict) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **case["zero"]}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **case.get("settings", {})}
    if case["dtype"] == "bf16":
        settings["bf16"] = {"enabled": True}
    model = load_sharded(ModelSource(case["model"]), case["dtype"], settings)
    mask, sigma = Mask.load(case["mask"]), unit_sigmas(model)
    selected = perturb.positions(model, {shard.name: mask.bits_of(shard) for shard in model.scored})
    kept = ShardedModel.publish
    if case.get("drop") == "publish":
        ShardedModel.publish = lambda self: None
    tensors = {"before": logits(model)}
    digest = perturb.partitioned_bits_digest(model)
    with perturb.perturbed(model, selected, sigma, case["noise"], case["seed"]):
        tensors["inside"] = logits(model)
        ShardedModel.publish = kept
        tensors |= {f"inside/{name}": values for name, values in whole(model).items()}
        assert perturb.partitioned_bits_digest(model) != digest
    assert perturb.partitioned_bits_digest(model) == digest
    try:
        with perturb.perturbed(model, selected, sigma, 7.0, 1):
            raise KeyError("an error inside")
    except KeyError:
        pass
    assert perturb.partitioned_bits_digest(model) == digest
    tensors["after"] = logits(model)
    tensors |= {f"after/{name}": values for name, values in whole(model).items()}
    if runtime.is_main():
        save_file(tensors, case["out"])


def main() -> None:
    run_cases(run_case)


if __name__ == "__main__":
    main()
