"""A training loop that goes on after a kill to the same weights: AdamW over batches whose order the seed gives."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from esi_ds.artifacts import whole_folder
from tiny_models.training import Recipe, learning_rate, optimizer_of

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")
SAVE_EVERY = 40  # steps


def batches_of_rows(rows: Sequence[T], recipe: Recipe, seed: int, length: Callable[[T], int]) -> list[list[T]]:
    """One batch a step: rows in a random order, cut into pools of eight batches whose rows of like length go together.

    Rows that are left over after the last whole batch are not learnt.
    """
    rng, order = random.Random(seed), list(rows)
    rng.shuffle(order)
    pool, batches = 8 * recipe.batch, []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=length)
        part = [near[first : first + recipe.batch] for first in range(0, len(near), recipe.batch)]
        rng.shuffle(part)
        batches += part
    return [batch for batch in batches if len(batch) == recipe.batch or len(rows) < recipe.batch][: recipe.steps]


def digest_of(*parts: object) -> str:
    """What a checkpoint belongs to, in hexadecimal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Training:
    """One model's training; ``run`` ends with the trained model.

    loss_of: mean loss of a batch, a scalar. digest: of everything that the weights follow from; a checkpoint of other
    data or settings is not gone on with. Only parameters that require a gradient are trained and kept.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, checkpoint: Path, digest: str, name: str):
        self.model, self.recipe, self.checkpoint, self.digest, self.name = model, recipe, checkpoint, digest, name
        self.optimizer = optimizer_of(model, recipe)
        self.trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def run(self, batches: Sequence[Sequence[T]], loss_of: Callable[[Sequence[T]], Tensor]) -> float:
        """Train on every batch once; the mean loss of the last tenth. Raises RuntimeError for a loss not finite."""
        self.model.train()
        step, losses = self._load()
        first, started = step, time.process_time()
        for batch in batches[step:]:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, step)
            loss = loss_of(batch)
            if not torch.isfinite(loss):
                raise RuntimeError(f"{self.name}: loss {loss.item()} at step {step}; lower {self.recipe.lr}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.recipe.clip)
            self.optimizer.step()
            losses.append(loss.item())
            step += 1
            if step % 10 == 0 or step == len(batches):
                recent, pace = losses[-10:], (time.process_time() - started) / (step - first)
                mean = sum(recent) / len(recent)
                print(f"{self.name}: step {step}/{len(batches)} loss {mean:.4f} {pace:.2f} CPU s/step", flush=True)
            if step % SAVE_EVERY == 0 and step < len(batches):
                self._save(step, losses)
        self.model.eval()
        last = losses[-max(1, len(losses) // 10) :]
        return sum(last) / len(last)

    def _save(self, step: int, losses: list[float]) -> None:
        """Weights, moments and losses, whole or not at all."""
        tensors = {f"weight/{key}": p.detach() for key, p in self.trained.items()}
        for key, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"{moment}/{key}": state[moment] for moment in MOMENTS}
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        facts = {"digest": self.digest, "step": str(step), "losses": json.dumps(losses)}
        with whole_folder(self.checkpoint) as folder:
            save_file(tensors, folder / "state.safetensors", metadata=facts)

    @torch.no_grad()
    def _load(self) -> tuple[int, list[float]]:
        """(steps done, their losses) of the checkpoint, if it is of this training; weights and moments are as then."""
        file = self.checkpoint / "state.safetensors"
        if not file.exists():
            return 0, []
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
            if facts["digest"] != self.digest:
                return 0, []
            step = int(facts["step"])
            for key, parameter in self.trained.items():
                parameter.copy_(opened.get_tensor(f"weight/{key}"))
                moments = {moment: opened.get_tensor(f"{moment}/{key}").to(parameter.device) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
            print(f"{self.name}: goes on after step {step}", flush=True)
            return step, json.loads(facts["losses"])
