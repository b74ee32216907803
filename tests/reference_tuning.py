"""SET and SPA in one process on whole tensors: what every sharded run must equal. Written from docs/method.md §3.

The ranks' micro-batches are run one after another on one model; the update is torch.optim.AdamW's own arithmetic,
on fp32 copies of the trained coordinates alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def encode(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a pair in the tests' chat template; the end token is learnt."""
    context = f"<|bos|><|user|>\n{prompt}<|end|>\n<|assistant|>\n"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, f"{response}<|end|>")]
    return ids[0] + ids[1], [-100] * len(ids[0]) + ids[1]


def encode_plain(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a pair as the paper's code writes it: no chat template, no end token, every token learnt."""
    context, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (f"Instruction: {prompt}\nAnswer: ", response)
    )
    return context + answer, context + answer


def _loss_sum(model, rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Tensor:
    """Summed cross entropy of the learnt tokens; rows padded on the right, as the ranks' bits depend on it."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [pad] * (width - len(i)) for i, _ in rows])
    seen = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows])
    labels = torch.tensor([list(targets) + [-100] * (width - len(i)) for i, targets in rows])
    following = torch.cat([labels[:, 1:], torch.full((len(rows), 1), -100)], dim=1)
    keep = width - int((following != -100).any(0).nonzero()[0])  # logits in front of all learnt tokens are not made
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=keep).logits
    following = following[:, -keep:]
    learnt = following != -100
    return cross_entropy(logits[learnt].float(), following[learnt], reduction="sum")


def tune(
    folder: Path,
    trained: dict[str, Tensor],
    batches: Sequence[Sequence[Sequence[Sequence[tuple]]]],
    lr: Callable[[int], float],
    *,
    dtype: torch.dtype,
    by_micro_batch: bool,
    weight_decay: float = 0.0,
    clip: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    """Weights, optimizer state of the trained coordinates (step, exp_avg, exp_avg_sq, master), and curves.

    These are each step's ``loss``, ``gradient_norm`` and ``learning_rate``.

    trained: name → bool mask. batches[step][micro][rank]: rows. by_micro_batch: sums over ranks first, then over micro-
    batches (DeepSpeed's engine); else the other way round (one reduction a step).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    named = {name: p for name, p in model.named_parameters() if bool(trained[name].any())}
    masters = {n: p.detach().flatten()[trained[n].flatten()].float().requires_grad_() for n, p in named.items()}
    rule = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(masters.values(), lr=1.0, foreach=False, **rule)
    curves: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "learning_rate": []}
    for step, micros in enumerate(batches):
        learnt = sum(sum(label != -100 for label in row[1][1:]) for ranks in micros for rows in ranks for row in rows)
        parts = [[_gradients(model, named, trained, rows, learnt, pad) for rows in ranks] for ranks in micros]
        curves["loss"].append(sum(loss for ranks in parts for loss, _ in ranks))
        gradients = [[gradient for _, gradient in ranks] for ranks in parts]
        if not by_micro_batch:
            gradients = [list(one) for one in zip(*gradients, strict=True)]  # [rank][micro]
        for name, master in masters.items():
            partial = [_add(part[name] for part in inner) for inner in gradients]
            master.grad = _add(partial)
        norm = float(sum(m.grad.double().square().sum() for m in masters.values()) ** 0.5)
        curves["gradient_norm"].append(norm)
        if clip is not None and norm + 1e-6 > clip:
            for master in masters.values():
                master.grad.mul_(clip / (norm + 1e-6))
        curves["learning_rate"].append(lr(step))
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                flat = parameter.view(-1)
                flat[trained[name].flatten()] = masters[name].detach().to(dtype)
    state = {name: {**optimizer.state[master], "master": master.detach()} for name, master in masters.items()}
    return {name: p.detach() for name, p in model.named_parameters()}, state, curves


def _gradients(model, named, trained, rows, learnt: int, pad: int) -> tuple[float, dict[str, Tensor]]:
    """The rows' part of the step's loss, and its gradient at the trained coordinates."""
    model.zero_grad(set_to_none=True)
    loss = _loss_sum(model, rows, pad) / learnt
    loss.backward()
    return float(loss), {name: p.grad.flatten()[trained[name].flatten()].float() for name, p in named.items()}


def _add(parts) -> Tensor:
    """In order, from the first: the additions that ranks and accumulators make."""
    total = None
    for part in parts:
        total = part.clone() if total is None else total + part
    return total
