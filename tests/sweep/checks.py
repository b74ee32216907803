"""What the sweep asks of one architecture. A check returns a verdict: a word, and a reason where it is not "right".

right    the shipped way agrees with the plain one.
unknown  esi_ds says itself that it does not know, or transformers alone cannot run the tiny model.
refused  esi_ds stops with a UserError.
fails    something else stops the run, loudly.
wrong    the run goes on with wrong numbers or names.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import functional
import torch
from reference import mean_gradient
from safetensors.torch import load_file
from tiny import NUM_EXPERTS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from esi_ds.core.batch import TokenRows, right_pad
from esi_ds.core.units import Parameter
from esi_ds.models.folder import ModelSource, stored_weights
from esi_ds.models.meta import meta_model, meta_parameters
from esi_ds.models.roles import describe, unrecognised
from esi_ds.models.rows import difference_ahead, difference_beside, last_logits
from esi_ds.models.widths import widths
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.export import plan_export
from esi_ds.zero.generate import choose_batches, generate, ready_to_generate

# fp32 sums in another order, through random layers that amplify them. A wrong position or mask moves logits by 1e-2
# and more. Measured over all architectures that are right: see docs/architectures.md.
TOLERANCE = 2e-4
SHORT, LONG = list(range(20, 27)), list(range(40, 59))
OTHER_LONG = list(range(140, 159))
FIRST = 3  # logits before it are not asked for
CHECKS = ("units", "rows", "loading", "answers", "scores")


def distance(values: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; inf where one of them is not finite."""
    if values.shape != expected.shape or not bool(values.isfinite().all() and expected.isfinite().all()):
        return math.inf
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def cannot_run(model: PreTrainedModel) -> str | None:
    """Why transformers alone cannot run this model on text; None where it can."""
    try:
        logits = plain_logits(model, LONG)
    except Exception as error:  # whatever an architecture raises is the reason
        return f"unknown: the tiny model does not run on text alone ({first_line(error)})"
    if not bool(logits.isfinite().all()):
        return "unknown: the tiny model's logits are not finite"
    return None


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits [L, V] of one row, given as nothing but its tokens."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **options).logits[0]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def rows(model: PreTrainedModel) -> str:
    """A row alone, without a mask, against the same row right-padded beside another one, as everything but generation
    reads it."""

    def read(batch: TokenRows, first: int = FIRST) -> list[Tensor]:
        padded = right_pad(batch, 0, "cpu")
        with torch.no_grad():
            logits = last_logits(model, padded, padded["input_ids"].shape[1] - first)
        return [values[: len(row) - first] for values, row in zip(logits, batch, strict=True)]

    if not difference_ahead(lambda batch: read(batch, 0), SHORT).is_rounding:
        return "refused: the logits of earlier tokens depend on later ones"
    alone = read([SHORT])[0]
    differences = {
        "the mask that a row alone is given changes its logits": distance(alone, plain_logits(model, SHORT)[FIRST:])
    }
    if not difference_beside(read, SHORT).is_rounding:  # the stages then read one row at a time
        return verdict(differences)
    differences |= {
        "a row's logits depend on a longer row": distance(read([SHORT, LONG])[0], alone),
        "a row's logits depend on a longer row before it": distance(read([OTHER_LONG, SHORT])[1], alone),
        "a row's logits depend on a second row of the same length": distance(
            read([LONG[: len(SHORT)], SHORT])[1], alone
        ),
    }
    return verdict(differences)


def verdict(differences: dict[str, float], tolerance: float = TOLERANCE) -> str:
    """right (with the largest difference), or wrong, and what differs by how much."""
    wrong = [f"{what} (by {value:.1g})" for what, value in differences.items() if not value <= tolerance]
    return "wrong: " + "; ".join(wrong) if wrong else f"right: {max(differences.values()):.1g}"


def greedy(model: PreTrainedModel, ids: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding without a cache, one plain call a token."""
    ids, start = list(ids), len(ids)
    for _ in range(num_tokens):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[start:]


def answer_alone(model: PreTrainedModel, ids: list[int], num_tokens: int) -> list[int]:
    """What transformers' own generate() answers to one row, with its cache."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0)
    return model.generate(input_ids=torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()


def together(model: ShardedModel, tokenizer: PreTrainedTokenizerBase, prompts: TokenRows, num_tokens: int) -> list[str]:
    """Answers in batches of two, where they may share one."""
    lengths = {number: len(ids) for number, ids in enumerate(prompts)}
    batches, _ = choose_batches(model, tokenizer, lengths, 2, "gathered", num_tokens)
    texts: dict[int, str] = {}
    for numbers in batches:
        given = generate(model, tokenizer, [list(prompts[n]) for n in numbers], num_tokens, "gathered", end_ids=())
        texts |= zip(numbers, given.texts, strict=True)
    return [texts[number] for number in lengths]


def answers(model: PreTrainedModel, sharded: ShardedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Generated answers of a batch against greedy decoding of each row alone, without a cache."""
    num_tokens, batch = 6, {"shorter": SHORT, "longer": LONG}

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    with ready_to_generate(sharded, "gathered"):
        texts = together(sharded, tokenizer, list(batch.values()), num_tokens)
    wrong = [
        name
        for (name, ids), answer in zip(batch.items(), texts, strict=True)
        if answer != text(greedy(model, ids, num_tokens))
    ]
    if not wrong:
        return "right"
    if all(answer_alone(model, batch[name], num_tokens) != greedy(model, batch[name], num_tokens) for name in wrong):
        return "unknown: generate() of transformers answers a row alone otherwise than greedy decoding without a cache"
    return f"wrong: another answer to the {' and the '.join(wrong)} row of a batch"


def loading(model: PreTrainedModel, sharded: ShardedModel) -> str:
    """Weights, buffers and logits of the model loaded under ZeRO-3 against those of plain from_pretrained; the names of
    its export against those of the folder."""
    state = dict(model.named_parameters())
    names = [p.name for p in sharded.parameters]
    if names != list(state):
        return f"wrong: other parameters ({', '.join(sorted(set(names) ^ set(state)))[:200] or 'another order'})"
    kept = {p.name: sharded.whole(p, keeper=0) for p in sharded.parameters}
    for name, whole in kept.items():
        if whole is not None and not torch.equal(whole, state[name].detach()):
            return f"wrong: the weights of {name} differ"
    buffers = dict(sharded.module.named_buffers())
    differing = [
        name
        for name, buffer in model.named_buffers()
        if name not in buffers or not torch.equal(buffers[name].nan_to_num(), buffer.nan_to_num())
    ]
    batch = right_pad([LONG], 0, "cpu")
    with torch.no_grad():
        expected = last_logits(model, batch, len(LONG))
        got = last_logits(sharded.module, batch, len(LONG))
    sharded.release()
    if other := _other_names(model, sharded):
        return f"wrong: an export has other names than what was loaded ({', '.join(sorted(other))[:200]})"
    differences = {"logits differ": distance(got, expected)}
    result = verdict(differences, tolerance=1e-5)
    if differing and result.startswith("right"):
        return f"wrong: the buffer {differing[0]} differs, the logits do not"
    return result + (f" (buffer {differing[0]} differs)" if differing else "")


def _other_names(model: PreTrainedModel, sharded: ShardedModel) -> set[str]:
    """Names of an export that the loaded folder does not hold, or the other way round; a tied weight may have either of
    its own."""
    stored = {weight.name for weight in stored_weights(ModelSource(str(model.name_or_path)))}
    exported = {entry.name for entries in plan_export(sharded).files.values() for entry in entries}
    return (stored ^ exported) - {name for pair in model.all_tied_weights_keys.items() for name in pair}


def units(model: PreTrainedModel) -> str:
    """Roles and logical matrices: each weight in one, what is tied or a router's in none, and parts that do what their
    roles say. Also asks for the widths, as a run with an automatic batch size does."""
    widths(model.config)
    parameters = describe(model)
    problems = [*_differ_on_meta(model, parameters), *_not_tiled(parameters), *_unscored(model, parameters)]
    problems += [*_reached_towers(model, parameters), *_otherwise_tied(model)]
    problems += functional.problems(model, parameters, torch.tensor([LONG]))
    if problems:
        return "wrong: " + "; ".join(problems)
    if names := unrecognised(parameters):
        count = f"{len(names)} of {len(parameters)} parameters"
        return f"unknown: {count} are scored as one matrix each, with a warning (the first: {names[0]})"
    return "right"


def _reached_towers(model: PreTrainedModel, parameters: tuple[Parameter, ...]) -> Iterator[str]:
    """What is called a tower's, and not scored, although text gives it a gradient."""
    names = [parameter.name for parameter in parameters if parameter.role == "tower"]
    if names:
        model(input_ids=torch.tensor([LONG]), use_cache=False).logits.square().sum().backward()
        tensors = dict(model.named_parameters())
        reached = [name for name in names if (grad := tensors[name].grad) is not None and bool(grad.count_nonzero())]
        model.zero_grad()
        yield from (f"{name} is a tower's, but text reaches it" for name in reached)


def _differ_on_meta(model: PreTrainedModel, parameters: tuple[Parameter, ...]) -> Iterator[str]:
    expected = meta_parameters(model.config, ModelSource(str(model.name_or_path)))
    if expected != parameters:
        pairs = itertools.zip_longest(parameters, expected)
        first = next((ours or theirs) for ours, theirs in pairs if ours != theirs)
        yield f"{first.name} is described otherwise on the meta device"


def _otherwise_tied(model: PreTrainedModel) -> Iterator[str]:
    """What is wrongly scored or left out where the head is tied, if it is not here, or the other way round."""
    config = copy.deepcopy(model.config)
    sections = [part for part in (config, config.get_text_config()) if hasattr(part, "tie_word_embeddings")]
    if not sections:
        return
    is_tied = sections[0].tie_word_embeddings
    for section in sections:
        section.tie_word_embeddings = not is_tied
    other = meta_model(config, ModelSource(str(model.name_or_path)))
    for problem in _unscored(other, describe(other)):
        yield f"with tie_word_embeddings={not is_tied}, {problem}"


def _not_tiled(parameters: tuple[Parameter, ...]) -> Iterator[str]:
    for parameter in parameters:
        if parameter.scored:
            times = torch.zeros(parameter.numel, dtype=torch.int64)
            for unit in parameter.units:
                for view in unit.views(times):
                    view.add_(1)
            if not bool((times == 1).all()):
                yield f"the units of {parameter.name} do not hold every weight once"


def _unscored(model: PreTrainedModel, parameters: tuple[Parameter, ...]) -> Iterator[str]:
    """Embeddings, tied heads and routers must not be scored; every other matrix must."""
    tensors = dict(model.named_parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    for parameter in parameters:
        tensor, path = tensors[parameter.name], parameter.name.lower()
        is_input = tensor is embedding
        if is_input and parameter.scored:
            tied = " and the tied head" if head is not None and head.weight is embedding else ""
            yield f"{parameter.name}, the input embedding{tied}, is scored as {parameter.role}"
        if head is not None and tensor is head.weight and not is_input and not parameter.scored:
            yield f"{parameter.name}, an untied head, is not scored ({parameter.role})"
        looks_like_router = tensor.ndim == 2 and NUM_EXPERTS in tensor.shape and ("gate" in path or "router" in path)
        if looks_like_router and parameter.scored:
            yield f"{parameter.name} looks like a router and is scored as {parameter.role}"
        is_known = parameter.role in ("embedding", "bias", "router", "tower")  # towers: ``_reached_towers``
        if tensor.ndim > 1 and not parameter.scored and not is_known:
            yield f"{parameter.name} {tuple(tensor.shape)} is not scored ({parameter.role})"


def scores(model: PreTrainedModel, folder: Path, pairs: list[tuple[str, str]]) -> str:
    """Scores that the shipped stage has written in ``folder/run`` against sigma times the oracle's gradient, in
    float64. The logical matrices are the shipped ones: whether they are right is asked by ``units``."""
    oracle, guard = eager(folder / "model"), eager(folder / "guard").requires_grad_(False)
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("model", "guard")]
    gradients, _ = mean_gradient(oracle, tokenizers[0], guard, tokenizers[1], pairs)
    shipped = load_file(folder / "run/scores/model-00001-of-00001.safetensors")
    errors: dict[str, float] = {}
    total = 0.0
    for parameter in describe(model):
        if parameter.scored:
            expected = esi(parameter, model.get_parameter(parameter.name), gradients[parameter.name])
            errors[parameter.name] = float((shipped[parameter.name].double() - expected).square().sum())
            total += float(expected.square().sum())
    if not total > 0:
        return "wrong: every score is zero"
    error = (sum(errors.values()) / total) ** 0.5
    worst = max(errors, key=errors.__getitem__)
    return f"right: {error:.1g}" if error <= TOLERANCE else f"wrong: off by {error:.2g}, most in {worst}"


def esi(parameter: Parameter, weight: Tensor, gradient: Tensor) -> Tensor:
    """|sigma times gradient| in the parameter's shape, float64, sigma by its definition."""
    values, sigma = weight.detach().double().flatten(), torch.zeros(parameter.numel, dtype=torch.float64)
    for unit in parameter.units:
        deviation = unit.elements(values).std()
        for view in unit.views(sigma):
            view.fill_(deviation)
    return (sigma.view(parameter.shape) * gradient).abs()


def eager(folder: Path) -> PreTrainedModel:
    """A model as the oracle runs it, eager where the architecture allows."""
    for options in (
        {"attn_implementation": "eager", "experts_implementation": "eager"},
        {"attn_implementation": "eager"},
        {},
    ):
        try:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        except (ValueError, TypeError, AttributeError):
            continue
    raise ValueError(f"{folder} cannot be loaded")
