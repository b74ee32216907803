"""Guards whose forward pass does more with ids than look up rows: ESI's judge reads what evaluation reads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from builders import byte_bpe_tokenizer, random_classifier
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from esi_ds.errors import UserError
from esi_ds.eval.classifiers import NextWordJudge, SequenceJudge, yes_no_family
from esi_ds.judge.classifier import ClassifierGuard, SequenceRule, label_score
from esi_ds.judge.embeddings import token_table
from esi_ds.judge.guard import Guard, WholeWeights, verdict_score
from esi_ds.judge.pairs import EncodedPair, EncodedText, PairEncoder

VOCABULARY, SAFE, UNSAFE = 200, 10, 11
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GEMMA = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama, head tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2, scaled in the module": transformers.Gemma2Config(**GEMMA),
    "gemma3, scaled in the module": transformers.Gemma3TextConfig(**GEMMA),
    "gemma3n, embeddings for every layer": transformers.Gemma3nTextConfig(
        **GEMMA,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2, learned positions and dropout": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, embd_pdrop=0.5
    ),
    "opt, projected embeddings": transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=1,
    ),
    "bloom, normed embeddings": transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0
    ),
    "ctrl, scaled in place": transformers.CTRLConfig(
        vocab_size=VOCABULARY, n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=128
    ),
    "xglm, scaled in the module": transformers.XGLMConfig(
        vocab_size=VOCABULARY, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=128
    ),
    "granite, scaled in the model": transformers.GraniteConfig(**SMALL, embedding_multiplier=6.0),
}


def spread(model: nn.Module) -> nn.Module:
    """Large random weights, so that no path through the model is negligible."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if name.endswith("correct_output_scale"):
                parameter.fill_(0.5)  # 0 at initialisation, which would hide Gemma 3n's second embedding
    return model.eval().requires_grad_(False)


def causal(name: str) -> PreTrainedModel:
    return spread(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]))


class EmbeddingWithPositions(nn.Module):
    """Tokens and positions in one module, as some models with their own code have it."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words, self.places = words, nn.Embedding(128, words.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


class ReadsTwice(LlamaForCausalLM):
    """Looks its tokens up a second time, flattened, as a residual at the end of the model."""

    def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
        hidden = self.model(input_ids=input_ids, **{k: v for k, v in options.items() if k != "logits_to_keep"})[0]
        again = self.get_input_embeddings()(input_ids.flatten()).view_as(hidden)
        return SimpleNamespace(logits=self.lm_head((hidden + again.cumsum(1)).tanh()))


class ReadsTheNextToken(LlamaForCausalLM):
    """Looks up shifted ids too: its score has no gradient per position of the text."""

    def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
        options.pop("logits_to_keep")
        hidden = self.model(input_ids=input_ids, **options)[0]
        return SimpleNamespace(logits=self.lm_head(hidden + self.get_input_embeddings()(input_ids.roll(1, 1))))


class ReadsPastTheModule(LlamaForCausalLM):
    """Multiplies one-hot rows by the weight and never calls the module."""

    def forward(self, input_ids: Tensor, logits_to_keep: int, **options: object) -> SimpleNamespace:
        table = self.get_input_embeddings().weight
        embeddings = nn.functional.one_hot(input_ids, VOCABULARY).to(table) @ table
        return self.model(inputs_embeds=embeddings, **options) and SimpleNamespace(logits=self.lm_head(embeddings))


def with_positions() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.set_input_embeddings(EmbeddingWithPositions(model.get_input_embeddings()))
    return spread(model)


def with_largest_norm() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    words = nn.Embedding(VOCABULARY, 32, max_norm=0.5)
    model.set_input_embeddings(words)
    return spread(model)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: lambda name=name: causal(name) for name in CONFIGS},
    "tokens and positions in one module": with_positions,
    "rows cut to a norm by the module": with_largest_norm,
    "two lookups": lambda: spread(ReadsTwice(LlamaConfig(**SMALL))),
}


def pair(length: int, seed: int) -> EncodedPair:
    """A text of random ids with a response in its middle."""
    ids = torch.randint(5, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    text = EncodedText(ids, [SAFE], [UNSAFE])
    return EncodedPair(text, list(range(4, length - 3)), [(0, 1)] * (length - 7), (0, length - 7))


def margin(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The guard's own score of a text alone."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits[SAFE] - logits[UNSAFE]


def worth_along(model: PreTrainedModel, ids: list[int], position: int, token: int) -> float:
    """The derivative of the score as the embedding at ``position`` begins to move to that of ``token`` there."""
    module, share = model.get_input_embeddings(), torch.zeros((), requires_grad=True)
    other = module(torch.tensor([[*ids[:position], token, *ids[position + 1 :]]]))[0, position].detach().clone()

    def move(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        direction = torch.zeros_like(output)
        direction[0, position] = other - output[0, position]
        return output + share * direction

    hook = module.register_forward_hook(move)
    try:
        (derivative,) = torch.autograd.grad(margin(model, ids), share)
    finally:
        hook.remove()
    return float(derivative)


@pytest.mark.parametrize("name", MODELS)
def test_the_score_is_the_guard_s_own(name: str) -> None:
    """Of a text alone and in a batch, with and without a gradient."""
    model = MODELS[name]()
    guard = Guard(model, SimpleNamespace(pad_token_id=0), "margin", WholeWeights())
    # Those whose forward pass is written above count padding as text: evaluation's batches are not the point here.
    texts = [pair(20, 1), pair(20 if name in ("tokens and positions in one module", "two lookups") else 14, 2)]
    expected = [float(margin(model, text.text.ids)) for text in texts]
    assert [judgement.score for judgement in guard.judge(texts, "cpu")] == pytest.approx(expected, abs=1e-5)
    assert guard.scores(texts, "cpu") == pytest.approx(expected, abs=1e-5)
    judge = NextWordJudge.__new__(NextWordJudge)
    judge.model, judge._pad, judge._threshold = model, 0, 0.5
    for text, wanted, verdict in zip(texts, expected, judge.judge(texts), strict=True):
        if verdict.score is not None:  # a random model may say another word
            assert verdict.score == pytest.approx(1 / (1 + 2.718281828459045**wanted), abs=1e-5), text


@pytest.mark.parametrize("kind", ["margin", "logit", "logprob", "prob"])
def test_a_bf16_guard_is_scored_in_fp32(kind: str) -> None:
    """To the bit: of logits in bf16, which keeps two or three digits, only the numbers themselves are rounded."""
    model, text = causal("llama, head tied").bfloat16(), pair(12, 3)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text.text.ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    expected = float(verdict_score(kind, logits.float(), [SAFE], [UNSAFE]))
    guard = Guard(model, SimpleNamespace(pad_token_id=0), kind, WholeWeights())
    assert guard.judge([text], "cpu")[0].score == expected and guard.scores([text], "cpu") == [expected]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "two lookups"])
def test_a_token_is_worth_what_the_module_gives_for_it(name: str) -> None:
    """(A u)_v, up to what is the same for all v, against differences of the score along the way to v's embedding."""
    model = MODELS[name]()
    guard, text = Guard(model, SimpleNamespace(pad_token_id=0), "margin", WholeWeights()), pair(12, 3)
    (judgement,) = guard.judge([text], "cpu")
    with guard.embedding_table() as table:
        worth = judgement.gradient.double() @ table.double().T
    for row, position in enumerate(text.response_tokens):
        here = text.text.ids[position]
        for token in (7, 150):
            difference = float(worth[row, token] - worth[row, here])
            expected = worth_along(model, text.text.ids, position, token)
            assert difference == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_two_lookups_of_a_token_add_up() -> None:
    model, text = MODELS["two lookups"](), pair(12, 3)
    (judgement,) = Guard(model, SimpleNamespace(pad_token_id=0), "margin", WholeWeights()).judge([text], "cpu")
    weight = model.get_input_embeddings().weight.requires_grad_()
    ids = text.text.ids
    logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    (whole,) = torch.autograd.grad(logits[SAFE] - logits[UNSAFE], weight)  # a row's gradient: all lookups together
    for gradient, position in zip(judgement.gradient, text.response_tokens, strict=True):
        if ids.count(ids[position]) == 1:
            torch.testing.assert_close(gradient, whole[ids[position]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [(ReadsTheNextToken, "looks up other ids"), (ReadsPastTheModule, "does not read its tokens")],
)
def test_a_guard_without_a_gradient_per_token_is_refused(kind: type, problem: str) -> None:
    guard = Guard(spread(kind(LlamaConfig(**SMALL))), SimpleNamespace(pad_token_id=0), "margin", WholeWeights())
    with pytest.raises(UserError, match=f"judge.path.*{problem}"):
        guard.judge([pair(12, 3)], "cpu")
    assert len(guard.scores([pair(12, 3)], "cpu")) == 1  # which score_function needs


def test_a_guard_that_hides_its_embeddings_is_refused() -> None:
    model = causal("llama, head tied")
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"judge\.path.*does not say which module"):
        Guard(model, SimpleNamespace(pad_token_id=0), "margin", WholeWeights()).judge([pair(12, 3)], "cpu")


def test_an_embedding_that_needs_more_than_ids_is_refused() -> None:
    model = with_positions()
    model.get_input_embeddings().forward = lambda ids, positions: ids  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"judge\.path.*does not take ids alone"):
        token_table(model)


def test_the_table_of_a_plain_embedding_is_its_weight() -> None:
    model = causal("llama, head tied")
    assert token_table(model).data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "gpt2"])
def test_a_classifier_judges_as_in_evaluation(kind: str) -> None:
    """GPT-2 embeds token types by the table of its tokens: both must be given them, or neither."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    if kind == "roberta":  # it has one token type, and its tokenizer gives none
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=4, num_labels=3, pad_token_id=0
        )
        model = transformers.GPT2ForSequenceClassification(config)
    else:
        model = random_classifier(kind, len(tokenizer))
    model = spread(model)
    rule = SequenceRule("Q {prompt} A {response}", [1])
    encoder = PairEncoder(yes_no_family(rule.template, unsafe=(), safe=()), tokenizer)
    texts = [encoder.encode("Why?", "Because the sheet is folded."), encoder.encode("Tell me a story", "No.")]
    assert all(isinstance(text, EncodedPair) for text in texts)
    verdicts = SequenceJudge(model, tokenizer, rule).judge(texts)
    guard = ClassifierGuard(model, tokenizer, "prob", WholeWeights(), [1], False)
    for judgement, verdict in zip(guard.judge(texts, "cpu"), verdicts, strict=True):
        assert judgement.score == pytest.approx(1 - verdict.score, abs=1e-6)
        assert float(judgement.gradient.norm()) > 0
    assert label_score("prob", torch.zeros(3), [1], False) == pytest.approx(2 / 3)
