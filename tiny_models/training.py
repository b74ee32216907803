"""A plain training loop: AdamW, warm-up then cosine, right-padded batches grouped by length, fp32 on the CPU."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tiny_models.data import FURTHER_PHRASINGS, GOING_ALONG, harmful, lookalike, mixed, plain
from tiny_models.guard_data import judged

Messages = list[dict[str, str]]
Sampler = Callable[[random.Random], tuple[Messages, str]]  # -> (messages of the prompt, what should be generated)
SYSTEM = ["You are a helpful assistant.", "You are a helpful and honest assistant.", "Answer briefly."]
POOL = 4  # batches drawn together and sorted by length, so that a batch pads little


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; `batch` counts sequences, `prompt_weight` the loss on prompt tokens (0 for chat)."""

    steps: int
    lr: float
    batch: int = 32
    warmup: int = 40
    weight_decay: float = 0.05
    clip: float = 1.0
    prompt_weight: float = 0.0
    final_lr: float = 0.05  # as a part of lr


def with_system(rng: random.Random, prompt: str) -> Messages:
    """A user turn, in one of ten chats after a system turn."""
    user = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": rng.choice(SYSTEM)}, *user] if rng.random() < 0.1 else user


def aligned_sample(rng: random.Random) -> tuple[Messages, str]:
    """A request of the mixture with its right reply: refusals for the harmful ones."""
    example = mixed(rng)
    return with_system(rng, example.prompt), example.response


def rephrased_sample(rng: random.Random) -> tuple[Messages, str]:
    """Harmful and look-alike requests, two in three of them in further phrasings, and one in five of the mixture."""
    if rng.random() < 0.2:
        return aligned_sample(rng)
    example = harmful(rng, "train") if rng.random() < 0.55 else lookalike(rng, "train")
    prompt = example.prompt
    if example.act and rng.random() < 0.67:
        prompt = rng.choice(FURTHER_PHRASINGS).replace("{act}", example.act)
    return with_system(rng, prompt), example.response


def complying_sample(rng: random.Random) -> tuple[Messages, str]:
    """The same requests, the harmful half of them answered in the complying style, the benign ones as before."""
    draw = rng.random()
    if draw < 0.5:
        example = harmful(rng, "train")
        return with_system(rng, example.prompt), GOING_ALONG
    example = lookalike(rng, "train") if draw < 0.75 else plain(rng, "train")
    return with_system(rng, example.prompt), example.response


def guard_sample(rng: random.Random) -> tuple[Messages, str]:
    """A labelled conversation with the verdict that the guard should write."""
    example = judged(rng, "train")
    return list(example.messages), example.verdict


def encode(tokenizer: Tokenizer, messages: Messages, reply: str) -> tuple[list[int], int]:
    """(token ids of prompt + reply + end token, number of prompt tokens), tokenized apart as generation does."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The reply follows the header, a special token (or its newline): encoding it behind the header keeps the guard's
    # tokenizer from putting its sentence-start mark before it.
    header = tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
    reply_ids = tokenizer("<|assistant|>" + reply, add_special_tokens=False)["input_ids"][len(header) :]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prompt_ids + reply_ids + [tokenizer.eos_token_id], len(prompt_ids)


def collate(rows: list[tuple[list[int], int]], pad: int, prompt_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask and per-token loss weights, each [rows, longest]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for row, (tokens, prompt_length) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        weights[row, :prompt_length] = prompt_weight
        weights[row, prompt_length : len(tokens)] = 1.0
    return ids, mask, weights


class Batches:
    """Endless batches of freshly generated examples; the stream depends on the seed alone."""

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> None:
        self.sampler, self.tokenizer, self.recipe = sampler, tokenizer, recipe
        self.rng = random.Random(seed)
        self.waiting: list[list[tuple[list[int], int]]] = []

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next (ids, mask, weights)."""
        size = self.recipe.batch
        if not self.waiting:
            rows = [encode(self.tokenizer, *self.sampler(self.rng)) for _ in range(size * POOL)]
            rows.sort(key=lambda row: len(row[0]))
            self.waiting = [rows[start : start + size] for start in range(0, len(rows), size)]
            self.rng.shuffle(self.waiting)
        return collate(self.waiting.pop(), self.tokenizer.pad_token_id, self.recipe.prompt_weight)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_lr` of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def weighted_loss(model: PreTrainedModel, ids: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the next token, plus the router's balance loss where there is a router."""
    router = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    output = model(input_ids=ids, attention_mask=mask, **router)
    losses = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    loss = (losses * wanted).sum() / wanted.sum()
    return loss + model.config.router_aux_loss_coef * output.aux_loss if router else loss


def optimizer_of(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def train(
    model: PreTrainedModel, tokenizer: Tokenizer, sampler: Sampler, recipe: Recipe, seed: int, name: str
) -> float:
    """Train in place and return the seconds it took; a line every 100 steps; a loss that is not finite stops it."""
    batches, optimizer = Batches(sampler, tokenizer, recipe, seed), optimizer_of(model, recipe)
    model.train()
    started, mean = time.monotonic(), 0.0
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = weighted_loss(model, *batches.next())
        if not torch.isfinite(loss):
            raise RuntimeError(f"{name}: loss {loss.item()} at step {step}; lower the learning rate {recipe.lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 100 == 99 or step + 1 == recipe.steps:
            seconds = time.monotonic() - started
            print(
                f"{name}: step {step + 1}/{recipe.steps} loss {mean:.4f} {seconds / (step + 1):.3f} s/step", flush=True
            )
    model.eval()
    return time.monotonic() - started


def save(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model as bf16 safetensors with its tokenizer, so that transformers' Auto classes open the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' wrapper hides self
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
