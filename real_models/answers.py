"""Greedy answers of a model to named sets of prompts, kept as they come: a start after a kill asks the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esi_ds.artifacts import append_jsonl, read_jsonl
from esi_ds.eval.refusals import is_refusal
from esi_ds.models.decoding import greedy_ids

Answers = dict[str, list[tuple[str, str]]]  # set -> (prompt, answer) in the order of the prompts
Question = tuple[str, str]  # set, prompt
MAX_NEW_TOKENS = 48
BATCH_SIZE = 128  # a CPU multiplies 128 rows in hardly more time than 32


def batches_of(prompts: Mapping[str, Sequence[str]], batch_size: int) -> list[list[Question]]:
    """Prompts of all sets in batches of like length. The same after a kill, so that padding, and with it every bit of
    an answer, is the same too."""
    questions = [(name, prompt) for name, listed in prompts.items() for prompt in dict.fromkeys(listed)]
    questions.sort(key=lambda question: (len(question[1]), question))
    return [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]


def read_answers(file: Path) -> dict[Question, str]:
    """What a file of answers holds so far; of two answers to one prompt the later one."""
    rows = read_jsonl(file) if file.exists() else []
    return {(row["set"], row["prompt"]): row["response"] for row in rows}


def answers_in(kept: Mapping[Question, str], prompts: Mapping[str, Sequence[str]]) -> Answers | None:
    """The answers to every set; None while one is missing."""
    questions = {name: list(dict.fromkeys(listed)) for name, listed in prompts.items()}
    if any((name, prompt) not in kept for name, listed in questions.items() for prompt in listed):
        return None
    return {name: [(prompt, kept[name, prompt]) for prompt in listed] for name, listed in questions.items()}


def without_refusals(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(prompt, answer) pairs but for those whose answer is empty or reads as a refusal."""
    return [(prompt, answer) for prompt, answer in pairs if answer and not is_refusal(answer)]


def answer_all(
    model_folder: Path,
    file: Path,
    prompts: Mapping[str, Sequence[str]],
    device: str,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answers:
    """The model's answers to every set, in fp32 on ``device``; those in ``file`` are not asked again.

    A batch of which a kill has left only a part is asked whole again.
    """
    kept = read_answers(file)
    waiting = [batch for batch in batches_of(prompts, batch_size) if any(question not in kept for question in batch)]
    if waiting:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides self
    for number, batch in enumerate(waiting, start=1):
        chats = [[{"role": "user", "content": prompt}] for _, prompt in batch]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        wanted = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = greedy_ids(
                model,
                wanted,
                end_ids=[tokenizer.eos_token_id],
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
            )
        replies = [reply.strip() for reply in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        rows = [
            {"set": name, "prompt": prompt, "response": reply}
            for (name, prompt), reply in zip(batch, replies, strict=True)
        ]
        append_jsonl(file, rows)
        kept |= {(row["set"], row["prompt"]): row["response"] for row in rows}
        print(f"{file.stem}: {number} of {len(waiting)} batches answered", flush=True)
    answers = answers_in(kept, prompts)
    assert answers is not None
    return answers
