"""Which models are trained, from what, for how many steps."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tiny_models.architectures import build
from tiny_models.tokenizing import chat_tokenizer, guard_tokenizer
from tiny_models.training import Recipe, aligned_sample, complying_sample, guard_sample, rephrased_sample, save, train

ALIGNED = {"llama": Recipe(steps=2000, lr=2e-3), "qwen3moe": Recipe(steps=3200, lr=2e-3)}
# A second stage, from the saved weights, for a model that answers unusual phrasings of harmful requests.
REPHRASED = {"qwen3moe": Recipe(steps=600, lr=1e-3, warmup=10)}
COMPLYING = {"llama": Recipe(steps=250, lr=1e-3, warmup=10), "qwen3moe": Recipe(steps=250, lr=1e-3, warmup=10)}
GUARD = Recipe(steps=2500, lr=2e-3, prompt_weight=0.1)


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with its steps (and warm-up) multiplied, at least one each."""
    fields = {
        **recipe.__dict__,
        "steps": max(1, round(recipe.steps * scale)),
        "warmup": max(1, round(recipe.warmup * scale)),
    }
    return Recipe(**fields)


def load_fp32(folder: Path) -> PreTrainedModel:
    """A saved model for further training."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_pair(name: str, tokenizer: Tokenizer, output: Path, seed: int, scale: float) -> dict[str, float]:
    """One aligned model, then its complying twin from the saved bf16 weights; seconds of each."""
    aligned = build(name, tokenizer, seed)
    times = {
        f"{name}-aligned": train(
            aligned, tokenizer, aligned_sample, scaled(ALIGNED[name], scale), seed, f"{name}-aligned"
        )
    }
    save(aligned, tokenizer, output / f"{name}-aligned")
    if name in REPHRASED:
        model = load_fp32(output / f"{name}-aligned")
        recipe = scaled(REPHRASED[name], scale)
        times[f"{name}-aligned"] += train(
            model, tokenizer, rephrased_sample, recipe, seed + 2, f"{name}-aligned, rephrased"
        )
        save(model, tokenizer, output / f"{name}-aligned")
    twin = load_fp32(output / f"{name}-aligned")
    recipe = scaled(COMPLYING[name], scale)
    times[f"{name}-complying"] = train(twin, tokenizer, complying_sample, recipe, seed + 1, f"{name}-complying")
    save(twin, tokenizer, output / f"{name}-complying")
    return times


def train_chat(output: Path, seed: int, scale: float) -> dict[str, float]:
    """The four chat models; they share one tokenizer."""
    tokenizer = chat_tokenizer(seed=seed)
    return {
        **train_pair("llama", tokenizer, output, seed, scale),
        **train_pair("qwen3moe", tokenizer, output, seed, scale),
    }


def train_guard(output: Path, seed: int, scale: float) -> dict[str, float]:
    """The guard, with its own tokenizer."""
    tokenizer = guard_tokenizer(seed=seed)
    model = build("guard", tokenizer, seed)
    times = {"guard": train(model, tokenizer, guard_sample, scaled(GUARD, scale), seed, "guard")}
    save(model, tokenizer, output / "guard")
    return times
