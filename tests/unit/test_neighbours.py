"""A row's result is its own: the row alone against the same row beside others, in everything that makes batches."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from builders import byte_bpe_tokenizer, spread
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from esi_ds.core.batch import left_pad, right_pad
from esi_ds.core.loss import row_losses
from esi_ds.core.surrogate import score_function_surrogate
from esi_ds.data.chat import EncodedResponse
from esi_ds.data.conversations import IGNORED, TokenSequence
from esi_ds.errors import UserError
from esi_ds.eval.classifiers import NextWordJudge, SequenceJudge, judge_pairs, length_batches, yes_no_family
from esi_ds.eval.fluency import surprises
from esi_ds.judge.classifier import SequenceRule
from esi_ds.judge.guard import Guard, WholeWeights
from esi_ds.judge.pairs import PairEncoder
from esi_ds.models.folder import max_positions
from esi_ds.models.rows import (
    ROUNDING,
    Together,
    alike_up_to,
    difference_ahead,
    difference_beside,
    end_logits,
    frequencies_note,
    last_logits,
)
from esi_ds.stages.esi.objectives import MeanLoss, ScoreFunctionObjective
from esi_ds.stages.esi.prepare import Example
from esi_ds.stages.esi.score import PassData
from esi_ds.stages.learnt_rows import padded
from esi_ds.stages.tune.work import TuneRun
from esi_ds.zero.batching import batch_size_for, check_causal, check_gradient
from esi_ds.zero.generate import choose_batches, generate, may_stand_together

VOCABULARY, PAD = 380, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
ENCODER = SIZES | {"max_position_embeddings": 300, "pad_token_id": 1}
# Attention with rotary positions; no mask at all; no mask in the recurrence; learned positions from the batch's left
# edge; positions by the padding token; positions by the padding token and logits_to_keep ignored.
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "opt": transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=PAD
    ),
    "rwkv": transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=300
    ),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **SIZES | {"num_hidden_layers": 3}, lru_width=32, head_dim=8, attention_window_size=64
    ),
    "bart": transformers.BartConfig(**DECODER, max_position_embeddings=300),
    "roberta": transformers.RobertaConfig(**ENCODER, is_decoder=True),
    "trocr": transformers.TrOCRConfig(**DECODER, max_position_embeddings=300, use_learned_position_embeddings=True),
}
KINDS = tuple(CONFIGS)
IGNORE_PADDING = ("rwkv", "recurrent_gemma", "bart")


class CapacityMLP(LlamaMLP):
    """Experts with a capacity: of all tokens of the batch, only the first half is served."""

    def forward(self, x: Tensor) -> Tensor:
        served = torch.arange(x.shape[0] * x.shape[1]).view(*x.shape[:2], 1) < 20
        return super().forward(x) * served


class BatchStatistics(nn.LayerNorm):
    """Normalises over the batch, as batch-norm does in training."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 1))) / x.std((0, 1))


class LengthMLP(LlamaMLP):
    """Depends on how much text follows, as ProphetNet does, but not on what it says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + x.shape[1] / 10)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    is_llama = kind in ("capacity", "batch statistics", "length", "encoder")
    config = transformers.BertConfig(**ENCODER) if kind == "encoder" else CONFIGS["llama" if is_llama else kind]
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind == "capacity":
        model.model.layers[0].mlp = CapacityMLP(config)
    if kind == "length":
        model.model.layers[0].mlp = LengthMLP(config)
    if kind == "batch statistics":
        model.model.norm = BatchStatistics(32)
    spread(model)
    return model.eval()


def sharded(model: PreTrainedModel) -> Any:
    """What stages see of a model, on one rank without ZeRO-3."""
    return SimpleNamespace(module=model, release=lambda: None, together=None, expert_parallel=False)


def pass_data(model: PreTrainedModel, examples: list[Any]) -> PassData[Any]:
    """Examples in one batch; no gradients are kept."""
    return PassData("tuning", sharded(model), examples, None, pad=PAD, batch_size=3)


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: PreTrainedModel, row: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


def close(values: Tensor, expected: Tensor) -> bool:
    """Within rounding of fp32 sums in another order."""
    return bool((values - expected).norm() <= 1e-5 * expected.norm())


def gradients(model: PreTrainedModel) -> Tensor:
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


SHORT, LONG = ids(1, 9), ids(2, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_logits_are_those_of_the_row_alone(kind: str) -> None:
    model = build(kind)
    for rows in ([SHORT, LONG], [LONG, SHORT]):
        with torch.no_grad():
            logits = last_logits(model, right_pad(rows, PAD, "cpu"), len(LONG) - 4)
        row = rows.index(SHORT)
        assert close(logits[row, : len(SHORT) - 4], plain(model, SHORT)[4:])
        assert close(logits[1 - row], plain(model, LONG)[4:])


def test_right_padding_gives_what_left_padding_gave() -> None:
    model = build("llama")
    left = left_pad([SHORT, LONG], PAD, "cpu")
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**left, position_ids=positions).logits[0, -len(SHORT) :]
        logits = last_logits(model, right_pad([SHORT, LONG], PAD, "cpu"), len(LONG))[0, : len(SHORT)]
    assert (logits - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_positions_of_a_padded_batch_are_those_that_models_count_themselves(kind: str) -> None:
    """From the left edge, as Llama does, or from the mask, as OPT does: bit for bit what explicit positions give."""
    model = build(kind)
    batch = right_pad([SHORT, LONG], PAD, "cpu")
    positions = torch.arange(len(LONG)).expand(2, -1)
    with torch.no_grad():
        counted, explicit = model(**batch).logits, model(**batch, position_ids=positions).logits
    assert torch.equal(counted[0, : len(SHORT)], explicit[0, : len(SHORT)]) and torch.equal(counted[1], explicit[1])


def test_logits_to_keep_that_is_ignored_unknown_or_misread() -> None:
    model = build("trocr")
    batch = right_pad([LONG], PAD, "cpu")
    assert model(**batch, logits_to_keep=4).logits.shape[1] == len(LONG)  # the architecture ignores it
    assert torch.equal(last_logits(model, batch, 4)[0], plain(model, LONG)[-4:])

    class Strict(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=input_ids[..., None].float())

    assert last_logits(Strict(), batch, 4).flatten().tolist() == LONG[-4:]

    class OneAtATime(nn.Module):
        def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
            return SimpleNamespace(logits=input_ids[:, -1:, None].float())

    with pytest.raises(UserError, match="gives logits of 1 positions where those of the last 4 of 24"):
        last_logits(OneAtATime(), batch, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_rows_of_unlike_length_the_head_reads_only_their_ends(dtype: torch.dtype) -> None:
    """The bits, and those of the gradient, of all positions from the shortest row's end on, which were 23 × 4 here."""
    model = build("llama").to(dtype)
    rows = [LONG, SHORT[:2], SHORT, SHORT]
    batch, read, results = right_pad(rows, PAD, "cpu"), list[int](), list[tuple[Tensor, Tensor]]()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    ends = torch.tensor([len(row) for row in rows]) - 1
    for logits in (end_logits(model, batch), last_logits(model, batch, 23)[torch.arange(4), ends - 1]):
        logits[:, 7].sum().backward()
        results.append((logits, gradients(model)))
    assert read == [3, 23] and all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_ends_of_rows_where_the_architecture_takes_no_positions() -> None:
    """It ignores them, or takes a number of last ones alone, as code of a model's own does."""
    batch, ends = right_pad([LONG, SHORT], PAD, "cpu"), torch.tensor([len(LONG), len(SHORT)]) - 1

    class TakesANumber(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> SimpleNamespace:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return SimpleNamespace(logits=self.lm_head(hidden[:, -logits_to_keep:]))

    for model in (build("trocr"), TakesANumber(CONFIGS["llama"]).eval()):
        with torch.no_grad():
            whole = model(**batch, logits_to_keep=len(LONG)).logits
            assert torch.equal(end_logits(model, batch), whole[torch.arange(2), ends])


def examples() -> list[Example]:
    responses = ids(5, 4), ids(6, 15), ids(7, 1)
    return [
        Example(index, ids(index + 10, length), EncodedResponse(response, []), None)
        for index, (length, response) in enumerate(zip((5, 20, 11), responses, strict=True))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_batch_of_responses_is_the_sum_of_its_rows(kind: str) -> None:
    model, rows = build(kind), examples()
    objective = ScoreFunctionObjective(pass_data(model, rows), {0: 1.0, 1: -2.0, 2: 0.5})
    logits, gradient, values = objective.forward(rows)
    logits.backward(gradient)
    together = gradients(model)
    for example, value in zip(rows, values, strict=True):
        probabilities = (
            model(torch.tensor([example.ids]), use_cache=False)
            .logits[0, -len(example.response.ids) - 1 : -1]
            .log_softmax(1)
        )
        sampled = torch.tensor(example.response.ids)[:, None]
        own = objective._advantages[example.index] * probabilities.gather(1, sampled).sum()
        assert value == pytest.approx(own.item(), rel=1e-4)
        own.backward()
    assert close(together, gradients(model))


def test_a_surrogate_is_computed_in_fp32_from_the_logits_of_a_bf16_model() -> None:
    """To the bit; only the gradient that goes into the model is rounded."""
    model, row = build("llama").bfloat16(), examples()[1]
    objective = ScoreFunctionObjective(pass_data(model, [row]), {0: 1.0, 1: -2.0})
    logits, gradient, (value,) = objective.forward([row])
    assert logits.dtype == gradient.dtype == torch.bfloat16
    sampled = torch.tensor(row.response.ids)
    values, expected = score_function_surrogate(logits[0].detach().float(), sampled, -3.0)
    assert value == float(values.sum()) and torch.equal(gradient[0], expected.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_tuning_rows_is_the_sum_of_its_rows(kind: str) -> None:
    model = build(kind)
    rows = [
        TokenSequence(number, row, [*[IGNORED] * first, *row[first:]])
        for number, (row, first) in enumerate(((SHORT, 4), (LONG, 13), (ids(8, 30), 2)))
    ]
    batch, labels = padded(rows, PAD, torch.device("cpu"))
    losses = row_losses(last_logits(model, batch, labels.shape[1]), labels)
    losses.sum().backward()
    together = gradients(model)
    for row, loss in zip(rows, losses, strict=True):
        logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        own = nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED, reduction="sum")
        assert loss.item() == pytest.approx(own.item(), rel=1e-5)
        own.backward()
    assert close(together, gradients(model))
    objective = MeanLoss(pass_data(model, rows))
    assert objective.forward(rows)[0].item() == pytest.approx(losses.sum().item(), rel=1e-6)


PAIRS = [
    ("How?", "I cannot help with that."),
    ("Tell me a story", "Once upon a time there was a girl. " * 3),
    ("a", "b"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_judges_and_surprise_read_a_pair_as_if_it_were_alone(kind: str) -> None:
    model, tokenizer = build(kind), byte_bpe_tokenizer()
    family = yes_no_family("{prompt}\n{response}\nAnswer:", unsafe=(" Yes",), safe=(" No",))
    judge = NextWordJudge(model, tokenizer, family)
    alone = [judge_pairs(judge, [pair])[0] for pair in PAIRS]
    batched = judge_pairs(judge, PAIRS)
    assert [(v.unsafe, v.reason) for v in batched] == [(v.unsafe, v.reason) for v in alone]

    guard, encoder = Guard(model, tokenizer, "margin", WholeWeights()), PairEncoder(family, tokenizer)
    encoded: list[Any] = [encoder.encode(*pair) for pair in PAIRS]
    assert guard.why_alone("cpu") is None
    expected = [guard.judge([pair], "cpu")[0] for pair in encoded]
    for judgement, own in zip(guard.judge(encoded, "cpu"), expected, strict=True):
        assert judgement.score == pytest.approx(own.score, rel=1e-4, abs=1e-5)
        assert close(judgement.gradient, own.gradient)
    assert guard.scores(encoded, "cpu") == pytest.approx([own.score for own in expected], rel=1e-4, abs=1e-5)

    assert surprises(model, tokenizer, PAIRS) == pytest.approx(surprises(model, tokenizer, PAIRS, batch_size=1))


def test_a_classifier_that_mixes_padding_in_reads_one_pair_at_a_time() -> None:
    """FNet has no mask: its Fourier transform runs over the padding too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 380, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": PAD}
    model = transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes, num_labels=2)).eval()
    spread(model)
    rule, tokenizer = SequenceRule("{prompt} {response}", (1,)), byte_bpe_tokenizer()
    judge = SequenceJudge(model, tokenizer, rule)
    assert (judge.why_alone() or "").startswith("a row's logits depend on the rows beside it, by ")
    verdicts = judge_pairs(judge, PAIRS)
    assert judge.max_batch == 1
    expected = [
        model(torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])).logits[0].softmax(0)[1].item()
        for prompt, answer in PAIRS
    ]
    assert [verdict.score for verdict in verdicts] == pytest.approx(expected, rel=1e-4)


DEPENDS = r"a row's logits depend on the rows beside it, by \S+ of their norm \(up to 0\.001 is taken for rounding\)"


@pytest.mark.parametrize("kind", ["capacity", "batch statistics"])
def test_a_model_whose_rows_share_something_reads_one_at_a_time(kind: str) -> None:
    model = sharded(build(kind))
    rows, note = batch_size_for(model, SHORT, PAD, 4, 24)
    assert rows == 1 and re.fullmatch(DEPENDS, note or "")
    assert batch_size_for(model, SHORT, PAD, 1, 24) == (1, None)
    inputs = SimpleNamespace(
        stage="set",
        tune=SimpleNamespace(batch_size=4, gradient_accumulation=2),
        rows=SimpleNamespace(sequences=[TokenSequence(0, SHORT, SHORT)]),
        benign=None,
        tokenizer=SimpleNamespace(pad_token_id=PAD),
    )
    if kind == "capacity":  # the other is not even causal
        with pytest.raises(UserError, match="tune.batch_size = 4: .* tune.gradient_accumulation: 8"):
            TuneRun._check_batches(SimpleNamespace(inputs=inputs), model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_of_right_padding_lets_causal_models_pass(kind: str) -> None:
    model = sharded(build(kind))
    check_causal(model, SHORT, PAD)
    assert batch_size_for(model, SHORT, PAD, 4, 24) == (4, None)
    model.module.to(torch.bfloat16)
    assert batch_size_for(model, SHORT, PAD, 4, 24) == (4, None)


@pytest.mark.parametrize("kind", ["encoder", "batch statistics", "length"])
def test_a_model_that_is_not_causal_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"its logits of earlier tokens depend on later ones, by \S+ of their norm"):
        check_causal(sharded(build(kind)), SHORT, PAD)


REFORMER = transformers.ReformerConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    attention_head_size=8,
    num_attention_heads=4,
    feed_forward_size=48,
    attn_layers=["local", "local"],
    axial_pos_shape=(8, 8),
    axial_pos_embds_dim=(16, 16),
    max_position_embeddings=64,
    local_attn_chunk_length=8,
    is_decoder=True,
    pad_token_id=PAD,
)


class Detached(LlamaMLP):
    """Written for inference only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize("kind", ["reformer", "detached"])
def test_a_model_without_a_gradient_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "reformer":  # its layers undo themselves in the backward pass, in training mode only
        model = transformers.AutoModelForCausalLM.from_config(REFORMER).eval()
        problem = r"cannot be differentiated \(AssertionError: If you want to train"
    else:
        model = build("llama")
        model.model.norm = nn.Sequential(model.model.norm, Detached(CONFIGS["llama"]))
        problem = "has no gradient: none reaches its embeddings"
    with pytest.raises(UserError, match=problem):
        check_gradient(sharded(model), SHORT)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "capacity"])
def test_a_model_with_a_gradient_passes_and_is_left_as_it_was(kind: str) -> None:
    model = build(kind)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    check_gradient(sharded(model), SHORT)
    assert not frozen.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not frozen)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_probe_needs_numbers() -> None:
    broken = [torch.full((3, 4), torch.nan)] * 2
    assert all(probe(lambda rows: broken, [1]).is_rounding for probe in (difference_beside, difference_ahead))
    sound = torch.ones(3, 4)
    assert difference_beside(lambda rows: [sound] if len(rows) == 1 else broken, [1]).distance == math.inf


PROMPTS = [ids(21, 6), ids(22, 17), ids(23, 6), ids(24, 11), ids(25, 6)]


@pytest.mark.parametrize("kind", [*IGNORE_PADDING, "llama", "capacity"])
def test_prompts_are_answered_as_if_each_were_alone(kind: str) -> None:
    model, tokenizer = sharded(build(kind)), byte_bpe_tokenizer()
    lengths = {number: len(prompt) for number, prompt in enumerate(PROMPTS)}
    batches, note = choose_batches(model, tokenizer, lengths, 2, "gathered", 5)
    # RWKV's step with a cache mixes the rows of any batch: it broadcasts [B, H] against [B, 1, H].
    alone = Together.NONE
    expected = {"llama": Together.ANY, "capacity": alone, "rwkv": alone}.get(kind, Together.EQUAL_LENGTH)
    assert model.together is expected
    assert sorted(number for batch in batches for number in batch) == list(lengths)
    assert (note is None) == (kind == "llama") == ("its first logits by" not in (note or ""))
    if expected is Together.EQUAL_LENGTH:
        assert batches == [[0, 2], [4], [3], [1]]
    for numbers in batches:
        texts = generate(model, tokenizer, [PROMPTS[n] for n in numbers], 5, "gathered", end_ids=()).texts
        assert texts == [generate(model, tokenizer, [PROMPTS[n]], 5, "gathered", end_ids=()).texts[0] for n in numbers]


def test_rounding_that_decides_between_two_tokens_does_not_separate_prompts() -> None:
    """As bf16's near-ties do: alone, a row's likeliest next token is 8; beside others it is 7."""
    model = build("llama")

    def tie(module: nn.Module, arguments: Any, logits: Tensor) -> None:
        logits[..., 7:9] = 50.0
        logits[..., 7 + (len(logits) == 1)] += 1e-4

    model.lm_head.register_forward_hook(tie)
    assert may_stand_together(sharded(model), byte_bpe_tokenizer(), "gathered") is Together.ANY


@pytest.mark.parametrize("kind", ["llama", "opt", "roberta"])
def test_rounding_of_bf16_does_not_separate_prompts(kind: str) -> None:
    """transformers gives the logits of generation in fp32, of whose rounding they are not.

    Rows beside others are rounded otherwise, as by some processors' products of bf16; others' are the same bits.
    """
    module = build(kind).to(torch.bfloat16)

    def round_otherwise(head: nn.Module, arguments: Any, logits: Tensor) -> Tensor:
        return logits * (1 + 2**-7) if len(logits) > 1 else logits

    module.get_output_embeddings().register_forward_hook(round_otherwise)
    model = sharded(module)
    assert may_stand_together(model, byte_bpe_tokenizer(), "gathered") is Together.ANY
    assert model.beside.distance > ROUNDING[torch.float32]


def test_a_restart_makes_the_same_batches_of_what_is_left() -> None:
    model, tokenizer = sharded(build("bart")), byte_bpe_tokenizer()
    lengths = {number: 5 + number % 3 for number in range(20)}
    batches, _ = choose_batches(model, tokenizer, lengths, 3, "gathered", 5)
    for done in range(len(batches)):
        left = {number: lengths[number] for batch in sorted(batches[done:]) for number in batch}
        assert choose_batches(model, tokenizer, dict(sorted(left.items())), 3, "gathered", 5)[0] == batches[done:]


LIMIT = 40  # more tokens than the probe's
FAR = ids(31, LIMIT + 4)
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 3.0, 8.0, 16.0],
}
LONGROPE = transformers.Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=ROPE)


def longrope() -> PreTrainedModel:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(LONGROPE).eval()
    spread(model)
    return model


def test_rows_beyond_the_limit_of_longrope_change_those_beside_them() -> None:
    """Which the probe of short rows does not see: the configuration says where."""
    module = longrope()
    with torch.no_grad():
        beside = last_logits(module, right_pad([SHORT, FAR], PAD, "cpu"), len(FAR))[0, : len(SHORT)]
    assert not close(beside, plain(module, SHORT))
    assert alike_up_to(LONGROPE) == LIMIT
    model = sharded(module)
    assert batch_size_for(model, SHORT, PAD, 4, LIMIT) == (4, None)
    assert batch_size_for(model, SHORT, PAD, 4, LIMIT + 1) == (1, frequencies_note(LIMIT))
    inputs = SimpleNamespace(
        stage="set",
        tune=SimpleNamespace(batch_size=4, gradient_accumulation=2),
        rows=SimpleNamespace(sequences=[TokenSequence(0, SHORT, SHORT)]),
        benign=SimpleNamespace(sequences=[TokenSequence(0, FAR, FAR)]),
        tokenizer=SimpleNamespace(pad_token_id=PAD),
    )
    with pytest.raises(UserError, match=f"tune.gradient_accumulation: 8, .* or tune.max_length: {LIMIT}"):
        TuneRun._check_batches(SimpleNamespace(inputs=inputs), model)


def test_where_layers_or_their_types_have_frequencies_of_their_own() -> None:
    several = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert alike_up_to(transformers.Gemma3TextConfig(rope_parameters=several)) == LIMIT
    assert alike_up_to(transformers.Gemma4TextConfig()) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=dynamic)
    # These change beyond the longest row that is read only.
    assert alike_up_to(config) is None
    rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary.original_max_seq_len == max_positions(config) == LIMIT


def test_prompts_that_may_pass_the_limit_are_answered_alone() -> None:
    model, tokenizer = sharded(longrope()), byte_bpe_tokenizer()
    prompts = [SHORT, FAR[:37], LONG]
    lengths = {number: len(prompt) for number, prompt in enumerate(prompts)}
    assert choose_batches(model, tokenizer, lengths, 2, "gathered", 3) == ([[0, 1], [2]], None)
    batches, note = choose_batches(model, tokenizer, lengths, 2, "gathered", 9)
    assert batches == [[0, 2], [1]] and note is not None and f"beyond {LIMIT} tokens" in note

    def answers(numbers: list[int]) -> list[str]:
        return generate(model, tokenizer, [prompts[n] for n in numbers], 9, "gathered", end_ids=()).texts

    assert answers([0, 2]) == [*answers([0]), *answers([2])]


def test_judges_and_surprises_read_pairs_beyond_the_limit_alone() -> None:
    module, tokenizer = longrope(), byte_bpe_tokenizer()
    judge = SimpleNamespace(model=module, max_batch=None)
    pairs = {number: SimpleNamespace(text=SimpleNamespace(ids=row)) for number, row in enumerate([FAR, *PROMPTS])}
    assert length_batches(judge, pairs, 3) == [[1, 3, 5], [4, 2], [0]]
    texts = [("a", "b"), ("a " * 30, "b"), ("a", "c")]
    together, alone = (surprises(module, tokenizer, texts, batch_size=size) for size in (3, 1))
    assert together == pytest.approx(alone, rel=1e-4)
    guard = Guard(module, tokenizer, "margin", WholeWeights())
    assert guard.why_alone("cpu") == frequencies_note(LIMIT)
