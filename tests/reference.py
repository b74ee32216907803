"""The slow oracle: METHOD §1 and §2 with whole tensors, one process, loops over prompts and tokens.

Written to be checked against the paper by eye, not to be fast. It shares no code with the package but the parsing of
a chat template (Hugging Face's own). Everything is float32, sums of small numbers float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def token_text(tokenizer, token: int) -> str | None:
    """Text of one token in the middle of a text; None if it has none of its own."""
    if token >= len(tokenizer) or token in tokenizer.all_special_ids:
        return None
    before = tokenizer("a", add_special_tokens=False).input_ids
    text = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
    return None if text == "" or "\ufffd" in text else text


def guard_ids_mid_text(guard_tokenizer, text: str) -> list[int]:
    """The guard's tokens of a text that follows other text."""
    for anchor in ("\n", "a", " ", "0"):
        encoded = guard_tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded.offset_mapping
        kept = [i for i, (start, _) in zip(encoded.input_ids, spans, strict=True) if start >= len(anchor)]
        if kept and not any(start < len(anchor) < end for start, end in spans):
            return kept
    return guard_tokenizer(text, add_special_tokens=False).input_ids


def vocabulary_map(tokenizer, guard_tokenizer, embedding: Tensor, num_logits: int) -> Tensor:
    """A [V, d]: row v is the mean guard embedding of token v's text; the mean of such rows where it has none."""
    if tokenizer.get_vocab() == guard_tokenizer.get_vocab():
        missing = num_logits - len(embedding)
        return torch.cat([embedding, embedding.mean(0, keepdim=True).expand(max(missing, 0), -1)])[:num_logits]
    rows = {}
    for token in range(num_logits):
        text = token_text(tokenizer, token)
        if text is not None:
            rows[token] = embedding[guard_ids_mid_text(guard_tokenizer, text)].mean(0)
    mean = torch.stack(list(rows.values())).mean(0)
    return torch.stack([rows.get(token, mean) for token in range(num_logits)])


def guard_text(guard_tokenizer, prompt: str, response: str, template: str | None, prefix: str) -> tuple[str, int]:
    """The guard's prompt and where the (stripped) response begins in it."""
    if template is None:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = guard_tokenizer.apply_chat_template(chat, tokenize=False)
        return text + prefix, text.rindex(response.strip())
    before, after = template.split("{response}")
    before = before.replace("{prompt}", prompt)
    return before + response + after + prefix, len(before)


def score_of(kind: str, logits: Tensor, safe: int, unsafe: int) -> Tensor:
    probability = logits.log_softmax(-1)
    return {
        "margin": probability[safe] - probability[unsafe],
        "logit": logits[safe],
        "logprob": probability[safe],
        "prob": probability[safe].exp(),
    }[kind]


def judge(guard, guard_tokenizer, text: str, words: tuple[str, str], add_special: bool, kind: str):
    """Score, ∂J/∂e [tokens, d], and the character spans of the tokens that were read."""
    safe = guard_tokenizer(text + words[0], add_special_tokens=add_special, return_offsets_mapping=True)
    unsafe = guard_tokenizer(text + words[1], add_special_tokens=add_special)
    first = next(i for i, (a, b) in enumerate(zip(safe.input_ids, unsafe.input_ids, strict=False)) if a != b)
    embedded = guard.get_input_embeddings()(torch.tensor([safe.input_ids[:first]])).detach().requires_grad_()
    logits = guard(inputs_embeds=embedded).logits[0, -1]
    score = score_of(kind, logits, safe.input_ids[first], unsafe.input_ids[first])
    score.backward()
    return float(score.detach()), embedded.grad[0], safe.offset_mapping[:first]


def prompt_gradient(
    model,
    tokenizer,
    guard,
    guard_tokenizer,
    prompt: str,
    response: str,
    *,
    estimator: str = "soft",
    noise: Sequence[Callable[[int, int], Tensor]] = (),
    temperature: float = 0.3,
    kind: str = "margin",
    template: str | None = None,
    prefix: str = "\n\n",
    words: tuple[str, str] = ("safe", "unsafe"),
):
    """∇θ of one prompt's surrogate, left in ``.grad`` of the model's parameters (added); returns the judge score.

    noise: for the gumbel estimator, one callable (tokens, logits) → g per draw.
    """
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(chat, add_special_tokens=False).input_ids
    encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded.input_ids
    text, start = guard_text(guard_tokenizer, prompt, response, template, prefix)
    stripped = 0 if template is not None else len(response) - len(response.lstrip())
    score, gradient, spans = judge(guard, guard_tokenizer, text, words, template is not None, kind)

    all_logits = model(torch.tensor([prompt_ids + ids])).logits[0]
    embedding = guard.get_input_embeddings().weight.detach()
    table = vocabulary_map(tokenizer, guard_tokenizer, embedding, all_logits.shape[-1])
    length = len(response.strip()) if template is None else len(response)
    surrogate = torch.zeros(())
    for t, token in enumerate(ids):
        if token_text(tokenizer, token) is None:
            continue
        aligned = torch.zeros(table.shape[1])
        low, high = encoded.offset_mapping[t]
        if t + 1 < len(ids):
            high = min(
                high, encoded.offset_mapping[t + 1][0]
            )  # spans are disjoint: SentencePiece's first mark has none
        low, high = (position - stripped + start for position in (low, high))  # in the guard's text
        low, high = max(low, start), min(high, start + length)  # what a template trims off is not there
        for j, (a, b) in enumerate(spans):
            inside = b > start and a < start + length  # guard tokens that touch the response at all
            overlap = max(0, min(high, b) - max(low, a))
            if inside and b > a:
                aligned += overlap / (b - a) * gradient[j]
        contraction = table @ aligned
        logits = all_logits[len(prompt_ids) + t - 1]
        surrogate = surrogate + _token_term(estimator, logits, contraction, token, temperature, noise, t)
    surrogate.backward()
    return score


def _token_term(estimator: str, logits: Tensor, contraction: Tensor, token: int, temperature: float, noise, t: int):
    if estimator == "soft":
        return (logits / temperature).softmax(-1) @ contraction
    if estimator == "gumbel":
        draws = [((logits + draw(t, len(logits))) / temperature).softmax(-1) @ contraction for draw in noise]
        return torch.stack(draws).mean(0)
    hard = torch.full((len(logits),), -17.0, dtype=torch.float64)
    hard[token] = 0.0
    q, c = hard.softmax(-1), contraction.double()
    at_hard = q * torch.stack([q @ (value - c) for value in c])  # q(v) (c(v) − ⟨q, c⟩) without cancellation
    return at_hard.float() @ logits


def logical_matrices(model) -> dict[str, list[Tensor]]:
    """Scored parameters' names → index tensors (flat) of the matrices they pack."""
    config, found = model.config, {}
    for name, parameter in model.named_parameters():
        flat = torch.arange(parameter.numel()).reshape(parameter.shape)
        skip = "embed_tokens" in name or "norm" in name or name.endswith("bias") or name.endswith("mlp.gate.weight")
        if skip:
            continue
        if name.endswith("experts.gate_up_proj"):
            half = parameter.shape[1] // 2
            found[name] = [part.flatten() for expert in flat for part in (expert[:half], expert[half:])]
        elif name.endswith("experts.down_proj"):
            found[name] = [expert.flatten() for expert in flat]
        elif name.endswith("qkv_proj.weight"):
            dim = config.hidden_size // config.num_attention_heads
            sizes = [config.num_attention_heads * dim] + 2 * [config.num_key_value_heads * dim]
            found[name] = [part.flatten() for part in flat.split(sizes)]
        elif name.endswith("gate_up_proj.weight"):
            found[name] = [part.flatten() for part in flat.chunk(2)]
        else:
            found[name] = [flat.flatten()]
    return found


def esi_scores(
    model_folder,
    guard_folder,
    pairs: Sequence[tuple[str, str]],
    criterion: str = "esi",
    noise_of: Callable[[int], Sequence] | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
):
    """{name: float32 scores} and the judge's scores, from whole tensors."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()
    guard = AutoModelForCausalLM.from_pretrained(guard_folder, dtype=dtype).eval().requires_grad_(False)
    tokenizers = AutoTokenizer.from_pretrained(model_folder), AutoTokenizer.from_pretrained(guard_folder)
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    judged = []
    for index, (prompt, response) in enumerate(pairs):
        model.zero_grad()
        noise = noise_of(index) if noise_of is not None else ()
        judged.append(
            prompt_gradient(model, tokenizers[0], guard, tokenizers[1], prompt, response, noise=noise, **options)
        )
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.double() / len(pairs)
    scores = {}
    weights = dict(model.named_parameters())
    for name, matrices in logical_matrices(model).items():
        weight, gradient = weights[name].detach().double().flatten(), total[name].flatten()
        values = {"grad": gradient, "snip": gradient * weight, "esi": gradient.clone(), "magnitude": weight}[criterion]
        if criterion == "esi":
            for positions in matrices:
                values[positions] *= weight[positions].std() if len(positions) > 1 else 0.0
        scores[name] = values.abs().float().reshape(weights[name].shape)
    return scores, judged


def sorted_selection(scores: dict[str, Tensor], k: int, order: str = "top") -> dict[str, Tensor]:
    """Bool masks: sort the whole vector, ties by (parameter order, flat index)."""
    flat = torch.cat([values.flatten() for values in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.sort(flat, descending=order == "top", stable=True).indices[:k]] = True
    parts = chosen.split([values.numel() for values in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
