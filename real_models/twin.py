"""The aligned twin: the base model with all its layers tuned to refuse harmful requests and to answer as before.

What it learns: refusals of circuit_breakers, and the base model's own answers to harmless requests, among them ones
that look harmful. Of every answer only the first tokens: whether a model refuses is decided there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from esi_ds.artifacts import whole_folder
from real_models.answers import Answers, without_refusals
from real_models.recipe import BASE, TWIN, Material, Settings
from real_models.sources import Pair
from real_models.training import Training, batches_of_rows, digest_of
from tiny_models.training import collate, save

Row = tuple[list[int], int]  # token ids, how many of them are the prompt's


def twin_pairs(material: Material, base_answers: Answers, seed: int) -> list[Pair]:
    """Refusals and harmless answers, shuffled."""
    pairs = [*material.twin_refusals, *without_refusals(base_answers["harmless_train"])]
    random.Random(seed).shuffle(pairs)
    return pairs


def encode(tokenizer: Tokenizer, prompt: str, answer: str, longest: int | None = None) -> Row:
    """Prompt in the chat template and answer, tokenized apart as generation does. An answer of more than ``longest``
    tokens is cut and has no end token: nothing is learnt about where it ends."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return head + tail[:longest], len(head)


def answer_loss(model: PreTrainedModel, ids: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens; the head, a fifth of the model, computes no others.

    ids, mask, weights: [rows, longest], as ``collate`` makes them.
    """
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    is_learnt = weights[:, 1:] > 0
    logits = model.get_output_embeddings()(hidden[:, :-1][is_learnt])
    return F.cross_entropy(logits.float(), ids[:, 1:][is_learnt])


def make_twin(output: Path, material: Material, base_answers: Answers, settings: Settings, device: str) -> float:
    """Train the twin from the base model's folder and save it (bf16); the mean loss of the last tenth of the steps."""
    tokenizer = AutoTokenizer.from_pretrained(output / BASE)
    model = AutoModelForCausalLM.from_pretrained(output / BASE, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides self
    pairs = twin_pairs(material, base_answers, settings.seed)
    recipe = settings.recipe(settings.twin_lr, len(pairs))
    rows = [encode(tokenizer, *pair, settings.response_tokens) for pair in pairs]

    def loss_of(batch: Sequence[Row]) -> Tensor:
        tensors = collate(list(batch), tokenizer.pad_token_id, 0.0)
        return answer_loss(model, *(tensor.to(device) for tensor in tensors))

    checkpoint = output / "checkpoints" / TWIN
    training = Training(model, recipe, checkpoint, digest_of(recipe, rows), TWIN)
    loss = training.run(batches_of_rows(rows, recipe, settings.seed, lambda row: len(row[0])), loss_of)
    with whole_folder(output / TWIN) as folder:
        save(model, tokenizer, folder)
    return loss


@torch.inference_mode()
def skill_loss(folder: Path, pairs: Sequence[Pair], device: str, batch: int = 8) -> float:
    """Mean loss a token of the answers of ``pairs``, of a saved model in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides self
    rows = sorted((encode(tokenizer, *pair) for pair in pairs), key=lambda row: len(row[0]))
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        number = sum(len(ids) - head for ids, head in part)
        tensors = collate(part, tokenizer.pad_token_id, 0.0)
        total += number * float(answer_loss(model, *(tensor.to(device) for tensor in tensors)))
        tokens += number
    return total / tokens
