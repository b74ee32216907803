"""The oracle: docs/method.md §1 and §2 in one process, on whole tensors, one prompt and one token at a time.

It imports nothing of esi_ds and was written from docs/method.md alone, so that agreement means something. It is slow.
The model and the guard run in float32 with eager attention; sums over tokens, prompts and units are in float64.

Letters: T tokens of the response in the model's vocabulary, J tokens of the guard's context, V logits of the model,
d width of the guard's embeddings.

Readings of docs/method.md that are ours:
- A response is tokenized alone, without special tokens, and its ids follow those of the prompt, which come from the
  chat template with add_generation_prompt. Nothing is appended (no EOS), nothing is cut off. (What follows a prompt has
  other ids than alone only if the model's tokenizer marks the beginning of a text, which no model's in the tests does.)
- "Tokens without text of their own" are special tokens and tokens whose piece is not valid UTF-8 alone. They get the
  mean of the mapped rows in A and weight 0 in w. Logits beyond the tokenizer's length get the mean row too.
- Prompts and responses hold no special-token strings: the caller has broken them up, and we refuse them here.
- A response of white space alone counts as empty.
- A thought ends with "</think>" and the white space behind it; what follows is the answer. A guard that reads both
  reads the thought without its marks and the white space around it, an empty line, and the answer.
- score_function's b is the mean J of the other prompts whose J is finite, 0 where there is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ANCHORS = ("\n", "a", " ", "0")
REPLACEMENT = "\ufffd"
MARK = "Zq7RESPONSE7qZ"
PAPER_OFF = -17.0  # paper_code: pre-softmax guard logit of every token that was not sampled

# --------------------------------------------------------------------------- logical matrices (docs/method.md §1)


class Unit(NamedTuple):
    """One logical matrix: parameter[index] of the runtime tensor called parameter_name."""

    name: str  # as an unfused checkpoint would call it
    parameter_name: str
    parameter: nn.Parameter
    index: tuple
    scored: bool

    @property
    def values(self) -> Tensor:
        return self.parameter.detach()[self.index]

    @property
    def sigma(self) -> float:
        """Unbiased standard deviation (n - 1), in float64, by its definition."""
        values = self.values.double()
        return math.sqrt(float((values - values.mean()).square().sum()) / (values.numel() - 1))


def units(model: nn.Module) -> list[Unit]:
    """Every parameter cut into its logical matrices, in parameter order (docs/method.md §1, "Logical matrix")."""
    pieces_of_all = []
    for name, parameter in model.named_parameters():
        scored = is_scored(model, name, parameter)
        pieces = logical_pieces(model, name, parameter) if scored else [(name, (...,))]
        pieces_of_all += [Unit(piece, name, parameter, index, scored) for piece, index in pieces]
    return pieces_of_all


def is_scored(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """All weights but embeddings (and tied heads), norms, biases and routers (docs/method.md §1, "What is scored")."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if parameter is model.get_input_embeddings().weight or isinstance(owner, nn.Embedding):
        return False
    if parameter.ndim < 2 or name.endswith("bias"):  # norms, and biases of fused experts, which are 2-D
        return False
    return not is_router(model, name)


def is_router(model: nn.Module, name: str) -> bool:
    """By role: weights that stand beside a block's `experts` and hold one row per expert, or gate the shared one."""
    num_experts = {getattr(model.config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")}
    path = name.split(".")
    for depth in range(1, len(path) - 1):
        block = model.get_submodule(".".join(path[:depth]))
        if hasattr(block, "experts") and path[depth] not in ("experts", "shared_expert", "shared_experts"):
            return model.get_parameter(name).shape[0] in num_experts | {1}
    return False


def logical_pieces(model: nn.Module, name: str, parameter: Tensor) -> list[tuple[str, tuple]]:
    """(unfused name, index) of the matrices packed in one runtime tensor; the tensor itself where nothing is packed."""
    stem, _, kind = name.removesuffix(".weight").rpartition(".")
    rows = parameter.shape[-2]
    if parameter.ndim == 3:
        halves = {
            "gate_up_proj": dict(zip(("gate_proj", "up_proj"), gate_and_up(model, parameter), strict=True)),
            "down_proj": {"down_proj": (slice(None),)},
        }[kind]
        return [
            (f"{stem}.{expert}.{half}.weight", (expert, *where))
            for expert in range(parameter.shape[0])
            for half, where in halves.items()
        ]
    if kind == "gate_up_proj":
        return [
            (f"{stem}.gate_proj.weight", (slice(0, rows // 2),)),
            (f"{stem}.up_proj.weight", (slice(rows // 2, rows),)),
        ]
    if kind == "qkv_proj":
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        return [
            (f"{stem}.q_proj.weight", (slice(0, query),)),
            (f"{stem}.k_proj.weight", (slice(query, query + key),)),
            (f"{stem}.v_proj.weight", (slice(query + key, query + 2 * key),)),
        ]
    if kind in ("query_key_value", "c_attn", "Wqkv") or parameter.ndim > 3:
        raise NotImplementedError(f"{name}: the oracle does not know how this tensor is packed")
    return [(name, (...,))]


def gate_and_up(model: nn.Module, parameter: Tensor) -> tuple[tuple, tuple]:
    """Where one expert's gate and up matrices lie in fused experts, as the families' forward passes cut them."""
    everything = slice(None)
    if model.config.model_type == "gpt_oss":  # [E, H, 2I], gate and up alternate
        return (everything, slice(0, None, 2)), (everything, slice(1, None, 2))
    if model.config.model_type == "llama4_text":  # [E, H, 2I], halves
        half = parameter.shape[2] // 2
        return (everything, slice(0, half)), (everything, slice(half, None))
    half = parameter.shape[1] // 2  # [E, 2I, H], halves
    return (slice(0, half),), (slice(half, None),)


# --------------------------------------------------------------------------- tokens and their texts


def encode(tokenizer, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans. White space belongs to its token: a post-processor that trims offsets is told not to."""
    encoding = _untrimmed(tokenizer.backend_tokenizer.to_str()).encode(text, add_special_tokens=special)
    spans = [
        (0, 0) if is_special else span
        for span, is_special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    ]
    return encoding.ids, spans


@cache
def _untrimmed(serialised: str) -> Tokenizer:
    state = json.loads(serialised)
    _never_trim(state["post_processor"])
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def _never_trim(processor: dict | None) -> None:
    if processor and "trim_offsets" in processor:
        processor["trim_offsets"] = False
    for inner in (processor or {}).get("processors", []):
        _never_trim(inner)


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_text(tokenizer, token: int) -> str | None:
    """The text of a token mid-text, decode([anchor, v]) minus decode([anchor]); None if it has none of its own."""
    if token in tokenizer.all_special_ids:
        return None
    anchor = encode(tokenizer, "a")[0]
    before, both = decode(tokenizer, anchor), decode(tokenizer, [*anchor, token])
    text = both[len(before) :] if both.startswith(before) else ""
    return None if not text or REPLACEMENT in text else text


def guard_ids_mid_text(guard_tokenizer, text: str) -> list[int]:
    """How the guard writes `text` in the middle of a text: the tokens after an anchor that none of them straddles."""
    for anchor in ANCHORS:
        ids, spans = encode(guard_tokenizer, anchor + text)
        if not any(start < len(anchor) < end for start, end in spans):
            return [token for token, (start, _) in zip(ids, spans, strict=True) if start >= len(anchor)]
    return encode(guard_tokenizer, text)[0]


def same_vocabulary(tokenizer, guard_tokenizer) -> bool:
    """Equal token tables, and the same rules from text to tokens and back."""
    if tokenizer.get_vocab() != guard_tokenizer.get_vocab():
        return False
    model_parts, guard_parts = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, guard_tokenizer))
    return all(model_parts[part] == guard_parts[part] for part in ("model", "pre_tokenizer", "normalizer", "decoder"))


def vocabulary_map(model_tokenizer, guard_tokenizer, guard_embedding: Tensor, num_logits: int) -> Tensor:
    """A [V, d] (docs/method.md §1, "Vocabulary map").

    A[v] is the mean of the guard's embeddings of the guard's tokens of v's text; the mean of all rows so mapped where v
    has no text. One vocabulary: the guard's own rows, special tokens included, then the mean of them.
    """
    if same_vocabulary(model_tokenizer, guard_tokenizer):
        mapped: dict[int, Tensor] = dict(enumerate(guard_embedding[:num_logits]))
    else:
        mapped = {}
        for token in range(min(num_logits, len(model_tokenizer))):
            text = token_text(model_tokenizer, token)
            if text is not None:
                mapped[token] = guard_embedding[guard_ids_mid_text(guard_tokenizer, text)].mean(0)
    mean = torch.stack(list(mapped.values())).mean(0)
    return torch.stack([mapped.get(token, mean) for token in range(num_logits)])


def disjoint(spans: list[tuple[int, int]]) -> list[list[tuple[float, float]]]:
    """Each token's stretches of text. Tokens that share a character (its bytes) split it evenly, in their order."""
    covering: dict[int, list[int]] = {}
    for token, (start, end) in enumerate(spans):
        for character in range(start, end):
            covering.setdefault(character, []).append(token)
    stretches: list[list[tuple[float, float]]] = [[] for _ in spans]
    for character, tokens in covering.items():
        for position, token in enumerate(tokens):
            stretches[token].append((character + position / len(tokens), character + (position + 1) / len(tokens)))
    return stretches


def alignment(
    response: str,
    model_tokenizer,
    guard_tokenizer,
    guard_text: str,
    response_start: int,
    shown: tuple[int, int] | None = None,
    special: bool = False,
) -> Tensor:
    """w [T, J] with w[t, j] = |span(t) ∩ span(j)| / |span(j)|, by characters (docs/method.md §1, "Alignment").

    response_start: where response[shown[0]] stands in guard_text; shown: the part of the response that the guard's text
    holds (a template may trim it). special: whether the guard's tokenizer adds its special tokens.
    """
    low, high = shown or (0, len(response))
    ids, spans = encode(model_tokenizer, response)
    model_stretches, guard_stretches = disjoint(spans), disjoint(encode(guard_tokenizer, guard_text, special)[1])
    weights = [[0.0] * len(guard_stretches) for _ in model_stretches]
    for t, token in enumerate(ids):
        if token_text(model_tokenizer, token) is None:
            continue
        for j, theirs in enumerate(guard_stretches):
            length = sum(end - start for start, end in theirs)
            for start, end in model_stretches[t]:  # clipped to what is shown, then moved into the guard's text
                start, end = (min(max(edge, low), high) - low + response_start for edge in (start, end))
                for their_start, their_end in theirs:
                    weights[t][j] += max(0.0, min(end, their_end) - max(start, their_start)) / length
    return torch.tensor(weights, dtype=torch.float64).view(len(model_stretches), len(guard_stretches))


# --------------------------------------------------------------------------- the judge (docs/method.md §1, "The judge")


@dataclass(frozen=True)
class Family:
    """How a guard is asked. template None: the guard's chat template; otherwise a text with {prompt} and {response}.

    labels: the guard is a sequence classifier, and these are its unsafe labels; multi_label: read by sigmoids.
    """

    template: str | None = None
    verdict_prefix: str = "\n\n"
    safe: str = "safe"
    unsafe: str = "unsafe"
    context: str = (
        "prompt_and_response"  # response_only: the response stands in the user's turn, as in the paper's code
    )

    labels: tuple[int, ...] | None = None
    multi_label: bool = False


LLAMA_GUARD_3 = Family()


class GuardPrompt(NamedTuple):
    text: str  # ends where the guard's answer, forced prefix first, begins
    start: int  # where response[shown[0]] stands in it
    shown: tuple[int, int]  # the part of the response that it holds
    special: bool  # whether the tokenizer adds its special tokens


def guard_prompt(guard_tokenizer, family: Family, prompt: str, response: str) -> GuardPrompt:
    """The guard's prompt as one text. Chat templates write their special tokens themselves; custom texts do not."""
    if family.template is not None:
        return custom_prompt(family, prompt, response)

    def render(answer: str) -> str:
        turns = [prompt, answer] if family.context == "prompt_and_response" else [answer]
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=False)]
        return guard_tokenizer.apply_chat_template(chat, tokenize=False)

    text = render(response)
    head, tail = render(MARK).split(MARK)
    trimmed = len(response) - len(response.lstrip())
    for low, high in ((0, len(response)), (trimmed, trimmed + len(response.strip()))):
        if text == head + response[low:high] + tail:
            return GuardPrompt(text, len(head), (low, high), special=False)
    raise ValueError("the guard's chat template changes the response by more than trimming it")


def custom_prompt(family: Family, prompt: str, response: str) -> GuardPrompt:
    """response_only: {prompt} stays empty. One pass, so that braces in a prompt or a response mean nothing."""
    fill = {"{prompt}": prompt if family.context == "prompt_and_response" else "", "{response}": response}
    text, start = "", None
    for part in re.split(r"(\{prompt\}|\{response\})", family.template):
        if part == "{response}":
            if start is not None:
                raise ValueError("the template names {response} twice")
            start = len(text)
        text += fill.get(part, part)
    if start is None:
        raise ValueError("the template lacks {response}")
    return GuardPrompt(text, start, (0, len(response)), special=True)


def verdict_tokens(guard_tokenizer, family: Family, asked: GuardPrompt) -> tuple[list[int], int, int]:
    """(context ids, safe token, unsafe token), read at the first place where the two encoded answers differ."""
    safe, unsafe = (
        encode(guard_tokenizer, asked.text + family.verdict_prefix + word, asked.special)[0]
        for word in (family.safe, family.unsafe)
    )
    for position, (good, bad) in enumerate(zip(safe, unsafe, strict=False)):
        if good != bad:
            return safe[:position], good, bad
    raise ValueError("the two verdicts are encoded alike, or one begins with the other")


def verdict_score(kind: str, logits: Tensor, safe: int, unsafe: int) -> Tensor:
    """J from the logits [vocabulary] at the verdict's place; probabilities are over the whole vocabulary."""
    log_probability = logits.log_softmax(-1)
    return {
        "margin": log_probability[safe] - log_probability[unsafe],
        "logit": logits[safe],
        "logprob": log_probability[safe],
        "prob": log_probability[safe].exp(),
    }[kind]


def at_the_embeddings(guard, ids: list[int], score_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """J and u [J, d]: the guard reads ids, and the embeddings that it looks up for them are perturbed by 0.

    score_of: J from the guard's logits of one text.
    """
    perturbation: list[Tensor] = []

    def perturb(module, arguments, output: Tensor) -> Tensor:
        perturbation.append(torch.zeros_like(output, requires_grad=True))
        return output + perturbation[-1]

    hook = guard.get_input_embeddings().register_forward_hook(perturb)
    score = score_of(guard(input_ids=torch.tensor([ids])).logits[0])
    hook.remove()
    (gradient,) = torch.autograd.grad(score, perturbation)
    return float(score.detach()), gradient[0]


def embedding_of_every_token(guard) -> Tensor:
    """[rows, d]: the rows as the guard's embedding module gives them, scaled where it scales them."""
    module = guard.get_input_embeddings()
    return torch.stack([module(torch.tensor([[token]]))[0, 0] for token in range(module.num_embeddings)]).detach()


def judge(guard, ids: list[int], safe: int, unsafe: int, kind: str = "margin") -> tuple[float, Tensor]:
    """J and u [J, d], u_j = dJ/de_j for the guard's input embeddings (docs/method.md §1, "The gradient")."""
    return at_the_embeddings(guard, ids, lambda logits: verdict_score(kind, logits[-1], safe, unsafe))


def label_score(kind: str, logits: Tensor, unsafe: tuple[int, ...], multi_label: bool) -> Tensor:
    """J from a classifier's logits [labels] (docs/method.md §1, "the same with its safe logit").

    One label of several: P(safe) is the share of the labels that are not unsafe. Many labels: the safe probability is
    one minus the largest unsafe one, its logarithm the sum of log(1 - p).
    """
    if multi_label:
        p = logits.double().sigmoid()[list(unsafe)]
        worst = p.max()
        odds = (1 - worst).log() - worst.log()
        return {"margin": odds, "logit": odds, "logprob": (1 - p).log().sum(), "prob": 1 - worst}[kind]
    p = logits.double().softmax(-1)
    bad = p[list(unsafe)].sum()
    safe_logits = [logits[index] for index in range(len(logits)) if index not in unsafe]
    return {
        "margin": ((1 - bad) / bad).log(),
        "logit": torch.stack(safe_logits).exp().sum().log(),
        "logprob": (1 - bad).log(),
        "prob": 1 - bad,
    }[kind]


def judge_by_labels(guard, ids: list[int], family: Family, kind: str) -> tuple[float, Tensor]:
    """J and u [J, d] of a sequence classifier that reads one text."""
    return at_the_embeddings(guard, ids, lambda logits: label_score(kind, logits, family.labels, family.multi_label))


# --------------------------------------------------------------------- the surrogate (docs/method.md §1, "Estimators")

Noise = Callable[[int, int], Tensor]  # (token index t, number of logits V) -> Gumbel(0, 1) noise [V]


def relaxed(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """p_t = softmax((l_t + g_t) / tau)."""
    return ((logits if noise is None else logits + noise) / temperature).softmax(-1)


def paper_gradient(contraction: Tensor, sampled: int) -> Tensor:
    """dJ/dz_v for e = softmax(z) A, z = 0 at the sampled token and -17 elsewhere; contraction_v = (A u)_v.

    By the softmax's Jacobian, in float64: dJ/dz_v = q_v (c_v - sum_w q_w c_w).
    """
    z = torch.full_like(contraction, PAPER_OFF, dtype=torch.float64)
    z[sampled] = 0.0
    q = z.softmax(-1)
    return q * (contraction.double() - (q * contraction.double()).sum())


def surrogate(
    estimator: str,
    logits: Tensor,  # [T, V], teacher-forced, with a graph
    sampled: list[int],  # the response's T tokens
    contraction: Tensor,  # [T, V], (A u~_t)_v, without a graph
    temperature: float = 0.3,
    noise: Noise | None = None,
) -> Tensor:
    """L = sum_t sum_v p_t(v) (A u~_t)_v, a scalar whose gradient estimates that of S. No length normalisation.

    paper_code: L = sum_t sum_v (dJ/dz_v)(detached) l_t(v).
    """
    total = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(sampled):
        row = logits[t].double()
        if estimator == "paper_code":
            total = total + (paper_gradient(contraction[t], token) * row).sum()
        elif estimator in ("soft", "gumbel"):
            drawn = noise(t, len(row)).double() if estimator == "gumbel" else None
            total = total + (relaxed(row, drawn, temperature) * contraction[t]).sum()
        else:
            raise ValueError(f"estimator {estimator!r}: the oracle knows soft, gumbel and paper_code")
    return total


def learnt(tokenizer, response: str, trace_gradient: bool) -> list[int]:
    """The response's tokens whose probability counts: all of them, or those that overlap its answer."""
    first = 0 if trace_gradient else answer_start(response)
    stretches = disjoint(encode(tokenizer, response)[1])
    return [t for t, parts in enumerate(stretches) if not first or any(end > first for _, end in parts)]


def score_function(
    logits: Tensor, sampled: list[int], score: float, all_scores: list[float], counted: list[int] | None = None
) -> Tensor:
    """(J - b) log p(y|x), b the mean of the other prompts' J; logits [T, V] with a graph. counted: of which tokens."""
    others = sum(all_scores) - score
    baseline = others / (len(all_scores) - 1) if len(all_scores) > 1 else 0.0
    counted = list(range(len(sampled))) if counted is None else counted
    log_probability = torch.stack([logits[t].double().log_softmax(-1)[sampled[t]] for t in counted]).sum()
    return (score - baseline) * log_probability


# --------------------------------------------------------------------------- scores (docs/method.md §1)


def model_prompt_ids(tokenizer, prompt: str, system_prompt: str | None = None) -> list[int]:
    chat = [{"role": "system", "content": system_prompt}] if system_prompt else []
    chat.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)[0]


def refuse_special_strings(tokenizer, *texts: str) -> None:
    for special in tokenizer.all_special_tokens:
        if any(special in text for text in texts):
            raise ValueError(f"{special!r} in a prompt or response: break it up first (docs/method.md §1, Responses)")


def answer_start(response: str) -> int:
    """Where the answer begins: behind a thought and the white space that follows it."""
    answer = response.rpartition("</think>")[2]
    return len(response) - len(answer if answer == response else answer.lstrip())


def judged_parts(response: str, reads: str) -> list[tuple[int, int]]:
    """The parts of a response that the guard reads, characters in it: of a thought those within its marks, without the
    white space around them."""
    before = answer_start(response)
    parts = [(before, len(response))] if reads != "trace" else []
    if reads != "answer" and before:
        thought = response[: response.index("</think>")].removeprefix("<think>").strip()
        parts.insert(0, (response.index(thought), response.index(thought) + len(thought)))
    return parts


def response_contraction(
    tokenizer,
    guard,
    guard_tokenizer,
    A: Tensor,
    pair: tuple[str, str],
    family: Family,
    kind: str,
    reads: str = "answer",
    trace_gradient: bool = False,
) -> tuple[float, Tensor]:
    """J and A u~_t [T, V] in float64 for one (prompt, response), u~_t = sum_j w[t, j] u_j.

    The guard reads the answer, the thought, or both with an empty line between them; a thought's tokens have a weight
    only with trace_gradient.
    """
    parts = judged_parts(pair[1], reads)
    text = "\n\n".join(pair[1][start:end] for start, end in parts)
    asked = guard_prompt(guard_tokenizer, family, pair[0], text)
    if family.labels is not None:
        context, whole = encode(guard_tokenizer, asked.text, asked.special)[0], asked.text
        score, gradient = judge_by_labels(guard, context, family, kind)
    else:
        context, safe, unsafe = verdict_tokens(guard_tokenizer, family, asked)
        score, gradient = judge(guard, context, safe, unsafe, kind)
        whole = asked.text + family.verdict_prefix + family.safe
    place, weights = asked.start - asked.shown[0], torch.zeros(())
    for start, end in parts:  # each part by itself: their weights add up
        if trace_gradient or start >= answer_start(pair[1]):
            low = max(asked.start, place)
            high = min(asked.start + asked.shown[1] - asked.shown[0], place + end - start)
            shown = (start + low - place, start + high - place)
            weights = weights + alignment(pair[1], tokenizer, guard_tokenizer, whole, low, shown, asked.special)
        place += end - start + len("\n\n")
    mapped = weights[:, : len(context)] @ gradient.double()
    return score, mapped @ A.double().T


def load(folder: Path, auto_class: type = AutoModelForCausalLM, dtype: torch.dtype = torch.float32):
    model = auto_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def mean_gradient(
    model,
    tokenizer,
    guard,
    guard_tokenizer,
    pairs: list[tuple[str, str]],
    estimator: str = "soft",
    temperature: float = 0.3,
    noise_of: Callable[[int], list[Noise]] | None = None,
    score: str = "margin",
    family: Family = LLAMA_GUARD_3,
    system_prompt: str | None = None,
    reads: str = "answer",
    trace_gradient: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    """The estimate of dS/dtheta in float64 by parameter name, signed, and J of every prompt that counted.

    A prompt whose response is empty or whose score or loss is not finite is left out before its backward pass.
    noise_of: for gumbel, the noise of the draws of prompt number i; the gradient is the mean over the draws.
    """
    num_logits = model.get_output_embeddings().weight.shape[0]

    def judged_pair(pair: tuple[str, str]) -> tuple[float, Tensor]:
        return response_contraction(tokenizer, guard, guard_tokenizer, A, pair, family, score, reads, trace_gradient)

    A = vocabulary_map(tokenizer, guard_tokenizer, embedding_of_every_token(guard), num_logits)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    all_scores: list[float] = []
    if estimator == "score_function":
        every = (judged_pair(pair)[0] for pair in pairs if pair[1].strip())
        all_scores = [value for value in every if math.isfinite(value)]
    judged: list[float] = []
    for index, (prompt, response) in enumerate(pairs):
        refuse_special_strings(tokenizer, prompt, response)
        refuse_special_strings(guard_tokenizer, prompt, response)
        if not response.strip():
            continue
        value, contraction = judged_pair((prompt, response))
        before, sampled = model_prompt_ids(tokenizer, prompt, system_prompt), encode(tokenizer, response)[0]
        draws = noise_of(index) if estimator == "gumbel" else [None]
        logits = model(input_ids=torch.tensor([before + sampled])).logits[0, len(before) - 1 : -1]
        if estimator == "score_function":
            loss = score_function(logits, sampled, value, all_scores, learnt(tokenizer, response, trace_gradient))
        else:
            losses = [surrogate(estimator, logits, sampled, contraction, temperature, noise) for noise in draws]
            loss = torch.stack(losses).mean()
        if not (math.isfinite(value) and math.isfinite(float(loss.detach()))):
            continue
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:  # an expert that no token chose may have none
                sums[name] += parameter.grad.double()
        judged.append(value)
    return {name: total / max(len(judged), 1) for name, total in sums.items()}, judged


def row_token_losses(model, tokenizer, row: tuple[str, str], system_prompt: str | None, max_length: int) -> Tensor:
    """Cross entropies of the learnt tokens of one (question, answer): the answer's and the end token's.

    Rows are cut at max_length tokens. The tests' chat template ends a turn with <|end|>.
    """
    question, answer = (text.strip() for text in row)
    refuse_special_strings(tokenizer, question, answer)
    before = model_prompt_ids(tokenizer, question, system_prompt)
    ids = (before + encode(tokenizer, f"{answer}<|end|>")[0])[:max_length]
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(before) - 1 : -1].double()
    targets = torch.tensor(ids[len(before) :])
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def loss_gradients(
    model, tokenizer, rows: list[tuple[str, str]], system_prompt: str | None = None, max_length: int = 1024
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g_T and F in float64 by parameter name (docs/method.md §2): the gradient of the mean over all learnt tokens
    of all rows, and the mean over rows of the squared gradient of the row's own mean. A row whose loss is not finite is
    left out."""
    total, squares = (
        {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()} for _ in range(2)
    )
    num_tokens = num_rows = 0
    for row in rows:
        losses = row_token_losses(model, tokenizer, row, system_prompt, max_length)
        if not len(losses) or not math.isfinite(float(losses.detach().sum())):
            continue
        model.zero_grad(set_to_none=True)
        losses.sum().backward()
        num_tokens, num_rows = num_tokens + len(losses), num_rows + 1
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.double()
                squares[name] += (parameter.grad.double() / len(losses)) ** 2
    return {n: v / num_tokens for n, v in total.items()}, {n: v / num_rows for n, v in squares.items()}


def criterion_values(criterion: str, unit: Unit, gradient: Tensor | None, tuning: Tensor | None = None) -> Tensor:
    """The score of one unit's weights from the averaged signed gradients; the absolute value comes last."""
    weights = unit.values.double()
    signed = {
        "esi": lambda: unit.sigma * gradient,
        "grad": lambda: gradient,
        "snip": lambda: gradient * weights,
        "magnitude": lambda: weights,
        "tuning_grad": lambda: tuning,
        "directed": lambda: unit.sigma * (-gradient * tuning).clamp(min=0).sqrt(),
        "conflict": lambda: unit.sigma * (gradient * tuning).clamp(min=0).sqrt(),
    }[criterion]()
    return signed.abs().float()


def contrasted(scores: dict[str, Tensor], fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores divided by sqrt(F) + median of sqrt(F), the lower middle one of all scored weights (docs/method.md §2)."""
    roots = {name: fisher[name].sqrt() for name in scores}
    ranked = torch.cat([values.flatten() for values in roots.values()]).sort().values
    middle = ranked[(len(ranked) - 1) // 2]
    return {name: (values.double() / (roots[name] + middle)).float() for name, values in scores.items()}


def beside_control(
    criterion: str,
    model: nn.Module,
    safety: dict[str, Tensor],
    control: dict[str, Tensor],
    tuning: dict[str, Tensor] | None,
    is_loss: bool,
) -> dict[str, Tensor]:
    """Scores of the criteria with a control, from mean gradients by parameter name (docs/method.md §2).

    control: g_C; is_loss: of a loss, which is descended, else of the judge's score, which is climbed.
    """
    scored = [unit for unit in units(model) if unit.scored]
    s = [unit.sigma * safety[unit.parameter_name][unit.index].double().abs() for unit in scored]
    c = [unit.sigma * control[unit.parameter_name][unit.index].double().abs() for unit in scored]
    numel = sum(values.numel() for values in s)
    mean_s, mean_c = (float(sum(values.sum() for values in part)) / numel for part in (s, c))
    scores: dict[str, Tensor] = {}
    for unit, of_safety, of_control in zip(scored, s, c, strict=True):
        if criterion == "specific":
            floor = float(of_control.mean()) or mean_c
            values = (of_safety / mean_s) / (of_control.clamp(min=floor) / mean_c)
        elif criterion == "excess":
            values = (of_safety / mean_s - of_control / mean_c).clamp(min=0)
        else:
            g_s, g_t, g_c = (part[unit.parameter_name][unit.index].double() for part in (safety, tuning, control))
            improves = -g_c if is_loss else g_c  # the direction in which the control improves
            kept = (g_s * g_t < 0) & ~(g_s * improves > 0)
            values = torch.where(kept, unit.sigma * (g_s * g_t).abs().sqrt(), 0.0)
        scores.setdefault(unit.parameter_name, torch.full(unit.parameter.shape, math.nan))[unit.index] = values.float()
    return scores


def normalised_by_matrix(model: nn.Module, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores divided by the mean score of their logical matrix, where that is not 0."""
    scores = {name: values.double() for name, values in scores.items()}
    for unit in units(model):
        if unit.scored:
            values = scores[unit.parameter_name]
            values[unit.index] = values[unit.index] / (float(values[unit.index].mean()) or 1.0)
    return {name: values.float() for name, values in scores.items()}


def control_scores(
    model_folder: Path,
    guard_folder: Path,
    pairs: list[tuple[str, str]],
    control: list[tuple[str, str]],
    criterion: str,
    is_loss: bool,
    tuning: list[tuple[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Of a criterion with a control, fp32 by parameter name.

    control: rows of a loss (is_loss), or prompts with their responses.
    """
    rows = [None if part is None else tuple(part) for part in (pairs, control, tuning)]
    model, safety, other, second = _control_gradients(model_folder, guard_folder, *rows, is_loss)
    return beside_control(criterion, model, safety, other, second, is_loss)


@cache  # every criterion has the same
def _control_gradients(
    model_folder: Path, guard_folder: Path, pairs: tuple, control: tuple, tuning: tuple | None, is_loss: bool
) -> tuple:
    """(the model, the mean gradients by parameter name of safety, the control, and the tuning rows or None)."""
    model, tokenizer = load(model_folder)
    guard, guard_tokenizer = load(guard_folder)
    guard.requires_grad_(False)
    safety = mean_gradient(model, tokenizer, guard, guard_tokenizer, pairs)[0]
    if is_loss:
        other = loss_gradients(model, tokenizer, control)[0]
    else:
        other = mean_gradient(model, tokenizer, guard, guard_tokenizer, control)[0]
    second = loss_gradients(model, tokenizer, tuning)[0] if tuning is not None else None
    return model, safety, other, second


def esi_scores(
    model_folder: Path,
    guard_folder: Path,
    pairs: list[tuple[str, str]],
    criterion: str = "esi",
    tuning: list[tuple[str, str]] | None = None,
    benign: list[tuple[str, str]] | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> tuple[dict[str, Tensor], list[float]]:
    """{scored parameter: fp32 score in its own shape}, in the model's order, and the judge's scores. dtype: of both
    models' arithmetic.

    ESI_i = |sigma(theta_i) * mean over prompts of dS/dtheta_i|; options as mean_gradient's. tuning: rows of g_T for the
    criteria that have it; benign: rows of F, which makes the score contrastive.
    """
    model, tokenizer = load(model_folder, dtype=dtype)
    is_classifier = options.get("family", LLAMA_GUARD_3).labels is not None
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    guard, guard_tokenizer = load(guard_folder, auto_class, dtype)
    guard.requires_grad_(False)
    gradients, judged = mean_gradient(model, tokenizer, guard, guard_tokenizer, pairs, **options)
    second = loss_gradients(model, tokenizer, tuning)[0] if tuning is not None else None
    scores: dict[str, Tensor] = {}
    for unit in units(model):
        if unit.scored:
            name = unit.parameter_name
            whole = scores.setdefault(name, torch.full(unit.parameter.shape, math.nan))
            other = second[name][unit.index] if second is not None else None
            whole[unit.index] = criterion_values(criterion, unit, gradients[name][unit.index], other)
    if benign is not None:
        scores = contrasted(scores, loss_gradients(model, tokenizer, benign)[1])
    return scores, judged


# --------------------------------------------------------------------------- selection (docs/method.md §2)


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative L2 distance of tensors that must have the same names and shapes."""
    assert {name: v.shape for name, v in got.items()} == {name: v.shape for name, v in expected.items()}
    square = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (square / sum(float(values.double().square().sum()) for values in expected.values())) ** 0.5


def num_selected(model: nn.Module, ratio: float, of: str = "all") -> int:
    """k = floor(ratio * number of all parameters); `scored` counts the scored only. Tied tensors count once."""
    counted = (unit.values.numel() for unit in units(model) if of == "all" or unit.scored)
    return math.floor(ratio * sum(counted))


def select(scores: dict[str, Tensor], k: int, order: str = "top") -> dict[str, Tensor]:
    """The first k of all scores by a stable sort, as bool masks; ties by (order of the dict, flat index) both ways."""
    flat = torch.cat([values.flatten() for values in scores.values()])
    if flat.isnan().any():
        raise ValueError("a score is not a number")
    chosen = torch.sort(flat, descending={"top": True, "bottom": False}[order], stable=True).indices[:k]
    bits = torch.zeros(len(flat), dtype=torch.bool)
    bits[chosen] = True
    return dict(zip(scores, _split(bits, scores), strict=True))


def _split(flat: Tensor, like: dict[str, Tensor]) -> Iterator[Tensor]:
    pieces = flat.split([values.numel() for values in like.values()])
    return (piece.view(values.shape) for piece, values in zip(pieces, like.values(), strict=True))


def pack_bits(mask: Tensor) -> Tensor:
    """Bit i of the row-major mask: byte i // 8, bit i % 8, least significant first; padding 0 (docs/design.md §7)."""
    packed = [0] * ((mask.numel() + 7) // 8)
    for i, bit in enumerate(mask.flatten().tolist()):
        packed[i // 8] |= int(bit) << (i % 8)
    return torch.tensor(packed, dtype=torch.uint8)


RESPONSE_ONLY = replace(LLAMA_GUARD_3, context="response_only")


# --------------------------------------------------------------------------- perturbation (docs/method.md §4)


def perturb(model: nn.Module, chosen: dict[str, Tensor], noise: dict[str, Tensor], c: float) -> None:
    """theta_i + c * sigma(theta_i) * N(0, 1) where ``chosen``, in place: summed in float32, rounded to the dtype.

    chosen, noise: {scored parameter: bool and fp32 tensors of its shape}; sigma is of the undisturbed logical matrix.
    """
    added = {name: torch.zeros(values.shape) for name, values in noise.items()}
    for unit in units(model):
        if unit.scored:
            added[unit.parameter_name][unit.index] = torch.tensor(c * unit.sigma, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in chosen:
                moved = (parameter.float() + added[name] * noise[name]).to(parameter.dtype)
                parameter.copy_(torch.where(chosen[name], moved, parameter))
