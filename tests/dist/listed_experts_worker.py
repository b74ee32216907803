"""Run by test_listed_experts.py under a launcher: gradients of a model with lists of experts.

argv: a folder. Every rank reads other tokens, so other experts run; one expert never does. Writes the sum of the
gradients over ranks, and what one whole model has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from esi_ds.cli import leave
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import GradientShards, ReducedGradients

EXPERTS = 5
TOKENS = ([5, 6, 7, 8], [20, 21, 22])  # of rank 0 and rank 1
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class ListedExperts(nn.Module):
    """As older and remote models have them: each token goes through the expert of its parity and size, only those
    run. name, kind: of the list."""

    def __init__(self, hidden: int, name: str, kind: type[nn.ModuleList | nn.ModuleDict]):
        super().__init__()
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.gate.e_score_correction_bias = nn.Parameter(torch.zeros(EXPERTS))  # only orders: it gets no gradient
        experts = [nn.Module() for _ in range(EXPERTS)]
        for expert in experts:
            expert.w1, expert.w2, expert.w3 = (
                nn.Linear(*sizes, bias=False) for sizes in ((hidden, 6), (6, hidden), (hidden, 6))
            )
        self.name = name
        listed = {f"expert_{index}": expert for index, expert in enumerate(experts)}
        setattr(self, name, kind(listed if kind is nn.ModuleDict else experts))
        with torch.no_grad():
            self.gate.weight[EXPERTS - 1] = 0
            self.gate.weight[1] = -self.gate.weight[0]  # one of the two is above the last one's 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.view(-1, hidden.shape[-1])
        weights = self.gate(flat).softmax(-1)
        chosen = (weights + self.gate.e_score_correction_bias).argmax(-1)
        weight = weights.gather(-1, chosen[:, None])[:, 0]
        result, experts = torch.zeros_like(flat), list(getattr(self, self.name).children())
        for index in chosen.unique().tolist():
            where, expert = (chosen == index).nonzero().flatten(), experts[index]
            rows = flat[where]
            outputs = expert.w2(torch.nn.functional.silu(expert.w1(rows)) * expert.w3(rows))
            result = result.index_add(0, where, outputs * weight[where, None])
        return result.view_as(hidden)


class AllGradients(GradientShards):
    """Of the scored parameters and of all others, as where ``tune.unscored`` is ``train``."""

    def __init__(self, model: ShardedModel):
        super().__init__(model, torch.device("cpu"))
        ReducedGradients.__init__(self, model, model.shards)
        self.sums = {shard.name: torch.zeros(shard.numel) for shard in model.shards}


def build(folder: Path) -> nn.Module:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).eval()
    kinds = (("experts", nn.ModuleList), ("mlp", nn.ModuleDict))
    for layer, (name, kind) in zip(model.model.layers, kinds, strict=True):
        layer.mlp = ListedExperts(model.config.hidden_size, name, kind)
    return model


def loss_of(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits.log_softmax(-1).square().mean()


def main() -> None:
    folder = Path(sys.argv[-1])
    runtime.start()
    model = ShardedModel(build(folder), SETTINGS)
    shards = AllGradients(model)
    with shards.collecting():
        loss_of(model.module, TOKENS[runtime.rank()]).backward()
        shards.flush()
        model.release()
    parts = runtime.gather_objects(shards.sums)
    if runtime.is_main():
        shapes = {parameter.name: parameter.shape for parameter in model.parameters}
        summed = {name: torch.cat([part[name] for part in parts]).view(shapes[name]) for name in shards.sums}
        save_file({name: tensor.contiguous() for name, tensor in summed.items()}, folder / "sharded.safetensors")
        whole = build(folder)
        for tokens in TOKENS[: runtime.world_size()]:
            loss_of(whole, tokens).backward()
        expected = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in whole.named_parameters()}
        save_file({name: expected[name] for name in summed}, folder / "whole.safetensors")
    runtime.stop()
    leave(0)


if __name__ == "__main__":
    main()
