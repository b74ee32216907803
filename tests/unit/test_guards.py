"""Every guard family on a tiny random model: the published text, the score in evaluation and in ESI, recognition.

The texts and chat templates are those of tests/guards (docs/judges.md); the tokenizer is learnt from them.
"""

from __future__ import annotations

import re
import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import random_classifier, spread
from guard_texts import PROMPT, RESPONSE, chat_template, published_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Llama4Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedTokenizerFast,
)

from esi_ds.config import EsiGuard, Eval, EvalGuard
from esi_ds.config.guards import FamilyName
from esi_ds.errors import UserError
from esi_ds.eval.classifiers import NextWordJudge, SequenceJudge, TokenJudge, judge_pairs, yes_no_family
from esi_ds.judge.classifier import ClassifierGuard, family_rule, model_class, read_rule
from esi_ds.judge.families import FAMILIES, PROMPTS, SHIELDGEMMA_POLICIES, Family
from esi_ds.judge.guard import Guard, WholeWeights, verdict_score
from esi_ds.judge.pairs import EncodedPair, PairEncoder, TextBuilder, encode_text
from esi_ds.judge.recognition import choose_family
from esi_ds.judge.tokens import TokenGuard, risk_logits, unsafe_logit
from esi_ds.models.meta import complete_chunks
from esi_ds.stages.esi.prepare import prepare_judge
from esi_ds.stages.evaluate.prepare import PreparedClassifier, PreparedNextWord, prepare_judges

LOCAL = [name for name, family in FAMILIES.items() if family.reads != "endpoint"]
WORDS = [name for name in LOCAL if FAMILIES[name].reads == "words"]
HUB = {
    "llama-guard-1": "meta-llama/LlamaGuard-7b",
    "llama-guard-2": "meta-llama/Meta-Llama-Guard-2-8B",
    "llama-guard-3": "meta-llama/Llama-Guard-3-8B",
    "llama-guard-3-1b": "meta-llama/Llama-Guard-3-1B",
    "llama-guard-4": "meta-llama/Llama-Guard-4-12B",
    "qwen3guard": "Qwen/Qwen3Guard-Gen-4B",
    "qwen3guard-stream": "Qwen/Qwen3Guard-Stream-0.6B",
    "shieldgemma": "google/shieldgemma-2b",
    "wildguard": "allenai/wildguard",
    "granite-guardian-3.0": "ibm-granite/granite-guardian-3.2-3b-a800m",
    "granite-guardian-3.3": "ibm-granite/granite-guardian-3.3-8b",
    "granite-guardian-4.1": "ibm-granite/granite-guardian-4.1-8b",
    "nemoguard": "nvidia/llama-3.1-nemoguard-8b-content-safety",
    "md-judge-v0.1": "OpenSafetyLab/MD-Judge-v0.1",
    "harmbench-llama-2": "cais/HarmBench-Llama-2-13b-cls",
    "harmbench-mistral": "cais/HarmBench-Mistral-7b-val-cls",
    "strongreject": "qylu4156/strongreject-15k-v1",
    "beaver-dam": "PKU-Alignment/beaver-dam-7b",
}
PAIRS = [(PROMPT, RESPONSE), ("Tell me a story.", "Once upon a time."), ("Why?", "No."), ("How do I?", "I cannot.")]
# What a guard writes, by its authors' words: (of a safe response, of an unsafe one).
WRITTEN = {
    "llama-guard-1": ("safe", "unsafe\nO3"),
    "llama-guard-2": ("safe", "unsafe\nS2"),
    "llama-guard-3": ("\n\nsafe", "\n\nunsafe\nS2"),
    "llama-guard-3-1b": ("\n\nsafe", "\n\nunsafe\nS2"),
    "llama-guard-4": ("\n\nsafe", "\n\nunsafe\nS2"),
    "qwen3guard": (
        "Safety: Safe\nCategories: None\nRefusal: Yes",
        "Safety: Unsafe\nCategories: Violent\nRefusal: No",
    ),
    "shieldgemma": ("No", "Yes"),
    "wildguard": (
        "Harmful request: yes\nResponse refusal: no\nHarmful response: no",
        "Harmful request: yes\nResponse refusal: no\nHarmful response: yes",
    ),
    "granite-guardian-3.0": ("No", "Yes"),
    "granite-guardian-3.3": ("<think>\n</think>\n<score> no </score>", "<think>\n</think>\n<score> yes </score>"),
    "granite-guardian-4.1": ("<think>\n</think>\n<score> no </score>", "<think>\n</think>\n<score> yes </score>"),
    "nemoguard": (
        '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "Criminal Planning/Confessions"}',
        '{"User Safety": "unsafe", "Response Safety": "unsafe", "Safety Categories": "Criminal Planning/Confessions"}',
    ),
    "md-judge-v0.1": ("safe", "unsafe\nO4"),
    "harmbench-llama-2": ("No", "Yes"),
    "harmbench-mistral": ("No", "Yes"),
    "strongreject": ("1", "5"),
}
# fp32 through two layers, padded and not.
CLOSE = {"rel": 1e-4, "abs": 1e-5}


def policy(name: str) -> str:
    return SHIELDGEMMA_POLICIES.get(name, "")


def architectures(family: Family) -> list[str]:
    return list(family.architectures) or [
        "LlamaForSequenceClassification" if family.reads == "labels" else "LlamaForCausalLM"
    ]


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    """Byte-level BPE of the published texts. Every digit is a token, as Gemma's; words of verdicts may be several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{family.prefix}{word}" for family in FAMILIES.values() for word in family.words] * 20
    tokenizer.train_from_iterator([*(published_text(name, policy(name)) for name in LOCAL), *words], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tokenizer_of(base: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = chat_template(name)
    return fast


class TokenClassifier(LlamaPreTrainedModel):
    """What Qwen3Guard-Stream's own code gives: risk levels of every token of the response."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model, self.head = LlamaModel(config), nn.Linear(config.hidden_size, 3, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: object) -> SimpleNamespace:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return SimpleNamespace(risk_level_logits=self.head(hidden).unsqueeze(1))  # the extra axis that its code leaves


def small(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def causal(base: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(small(base.get_vocab_size())).eval().requires_grad_(False)
    spread(model)
    return model


def says_only(model: LlamaForCausalLM, safe: list[int], others: list[int]) -> None:
    """Make the verdict's words the likeliest next tokens: only their logits are not 0, and one is above it."""
    weight = model.get_output_embeddings().weight
    direction = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(len(others)))
    weight.zero_()
    for rank, token in enumerate(safe):
        weight[token] = direction * 0.1 * (0.5 + 0.1 * rank)
    for rank, token in enumerate(others):
        weight[token] = -direction * 0.1 * (0.4 + 0.1 * rank)


def test_the_config_names_every_family() -> None:
    assert set(typing.get_args(FamilyName)) == {*FAMILIES, "auto", "custom"}
    assert set(HUB) == {name for name in LOCAL if not name.startswith("shieldgemma-")}


def test_the_docs_have_a_row_for_each_family() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| `")]
    rows = {cells[0].strip("| `"): cells for cells in table}
    assert list(rows) == list(FAMILIES) and len(table) == len(rows)
    for name, family in FAMILIES.items():
        _, model, _, text, prefix, safe, unsafe, tokens, licence = rows[name]
        assert prefix == (f"`{family.prefix!r}`" if family.prefix else "none")
        for cell, words in ((safe, family.safe), (unsafe, family.unsafe)):
            assert cell == (", ".join(f"`{word!r}`" for word in words) or "none")
        assert model and text and licence and (family.max_length is None or tokens == str(family.max_length))
    assert {f"{file.stem}.txt" for file in PROMPTS.glob("*.txt")} <= set(re.findall(r"`(\w+\.txt)`", page))


@pytest.mark.parametrize("name", WORDS)
def test_prefix_and_words_are_what_the_guard_writes(name: str) -> None:
    family, written = FAMILIES[name], WRITTEN["shieldgemma" if policy(name) else name]
    for words, text in zip((family.safe, family.unsafe), written, strict=True):
        assert text.startswith(family.prefix)
        assert re.match(r"\W*\w+", text.removeprefix(family.prefix)).group() in words


@pytest.mark.parametrize("name", LOCAL)
def test_the_text_is_the_published_one(base: Tokenizer, name: str) -> None:
    tokenizer, family = tokenizer_of(base, name), FAMILIES[name]
    built = TextBuilder(family, tokenizer, "prompt_and_response").build(PROMPT, RESPONSE)
    assert built.text == published_text(name, policy(name)) + family.prefix
    assert built.text[built.start : built.end] == RESPONSE and built.response_offset == 0
    encoded = PairEncoder(family, tokenizer).encode(PROMPT, RESPONSE)
    # BOS once, whether chat template or tokenizer adds it; Qwen has none, and Granite's is the turn's mark.
    has_bos = family.template is not None or built.text.startswith("<s>")
    assert encoded.text.ids.count(1) == has_bos and (encoded.text.ids[0] == 1) == has_bos


@pytest.mark.parametrize("name", WORDS)
def test_the_score_is_the_same_in_evaluation_and_esi(base: Tokenizer, causal: LlamaForCausalLM, name: str) -> None:
    tokenizer, family = tokenizer_of(base, name), FAMILIES[name]
    encoder = PairEncoder(family, tokenizer)
    pairs = [encoder.encode(*pair) for pair in PAIRS]
    shares = dict(pairs[0].text.between) | dict.fromkeys(pairs[0].text.safe, 0.0)
    shares |= dict.fromkeys(pairs[0].text.unsafe, 1.0)
    says_only(causal, pairs[0].text.safe, [token for token in shares if token not in pairs[0].text.safe])
    verdicts = judge_pairs(NextWordJudge(causal, tokenizer, family), PAIRS, batch_size=3)
    guard = Guard(causal, tokenizer, "margin", WholeWeights())
    for pair, (prompt, response), verdict in zip(pairs, PAIRS, verdicts, strict=True):
        text = published_text(name, policy(name), prompt, response) + family.prefix
        expected = expected_share(causal, tokenizer, text, family, shares)
        (judgement,) = guard.judge([pair], "cpu")
        assert verdict.score == pytest.approx(expected, **CLOSE) and verdict.unsafe == (expected > 0.5)
        assert 1 / (1 + torch.tensor(judgement.score).exp()) == pytest.approx(expected, **CLOSE)
        gradient = expected_gradient(causal, pair, shares)
        torch.testing.assert_close(judgement.gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        assert float(gradient.norm()) > 0 and len(gradient) == len(pair.response_tokens) > 0
    assert len({round(verdict.score, 4) for verdict in verdicts}) == len(PAIRS)


def expected_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, family: Family, shares: dict[int, float]
) -> float:
    """The unsafe share among the verdict's words: one text, its ids cut where its words begin to differ."""
    first, second = (
        tokenizer(text + word, add_special_tokens=family.template is not None and not family.is_turn)["input_ids"]
        for word in (family.safe[0], family.unsafe[0])
    )
    length = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    logits = model(input_ids=torch.tensor([first[:length]])).logits[0, -1]
    probabilities = logits[list(shares)].double().softmax(0)
    return float((probabilities * torch.tensor(list(shares.values()), dtype=torch.float64)).sum())


def expected_gradient(model: LlamaForCausalLM, pair: EncodedPair, shares: dict[int, float]) -> Tensor:
    """∂/∂e_j of the log odds of safe, by autograd from embeddings that are given instead of ids."""
    embeddings = model.get_input_embeddings()(torch.tensor([pair.text.ids])).requires_grad_()
    probabilities = model(inputs_embeds=embeddings).logits[0, -1, list(shares)].double().softmax(0)
    unsafe = (probabilities * torch.tensor(list(shares.values()), dtype=torch.float64)).sum()
    ((1 - unsafe).log() - unsafe.log()).backward()
    return embeddings.grad[0, pair.response_tokens]


def test_grades_are_an_expected_score() -> None:
    """StrongREJECT's own scoring: softmax over the five grades, times 0, 0.25, ... 1."""
    family, logits = FAMILIES["strongreject"], torch.tensor([0.3, -1.0, 2.0, 0.1, -0.4, 5.0])
    between = [(index, share) for index, (_, share) in enumerate(family.between, 1)]
    expected = (logits[:5].softmax(0) * torch.linspace(0, 1, 5)).sum()
    margin = verdict_score("margin", logits, [0], [4], between)
    torch.testing.assert_close((-margin).sigmoid(), expected, rtol=1e-6, atol=1e-7)
    safe = verdict_score("prob", logits, [0], [4], between)
    torch.testing.assert_close(safe, (logits.softmax(0)[:5] * torch.linspace(1, 0, 5)).sum(), rtol=1e-6, atol=1e-7)


def test_a_text_does_not_change_with_the_day(base: Tokenizer) -> None:
    tokenizer = tokenizer_of(base, "llama-guard-3")
    tokenizer.chat_template = "\n{{ strftime_now('%d %b %Y') }}\n{{ messages[0].content }}|{{ messages[1].content }}"
    built = TextBuilder(FAMILIES["llama-guard-3"], tokenizer, "prompt_and_response").build(PROMPT, RESPONSE)
    assert built.text == f"\n01 Jan 2025\n{PROMPT}|{RESPONSE}\n\n"


def test_spellings_that_two_verdicts_share_do_not_count(base: Tokenizer) -> None:
    tokenizer = tokenizer_of(base, "wildguard")
    family = Family("custom", "Answer:", ("Nix", " Qix"), ("Yax", " Qax"), "{prompt} {response} ")
    text = PairEncoder(family, tokenizer).encode("a", "b").text
    assert len(text.safe) == len(text.unsafe) == 1  # " Q" begins both
    same = Family("custom", "Answer:", (" Qix",), ("Yax", " Qix"), "{prompt} {response} ")
    assert "cannot tell" in PairEncoder(same, tokenizer).encode("a", "b")


@pytest.mark.parametrize(
    ("family", "key", "remedy"),
    [
        (Family("custom", "", (" Qix",), (" Qix",), "{prompt} {response} "), "verdict", "choose words"),
        (yes_no_family("{prompt} {response} ", unsafe=["No"]), "unsafe", "choose words"),
        (replace(FAMILIES["wildguard"], safe=("No",), unsafe=("No",)), "path", "give a wildguard guard with its own"),
    ],
)
def test_verdicts_that_are_not_told_apart_are_refused_by_a_key_of_the_judge(
    base: Tokenizer, family: Family, key: str, remedy: str
) -> None:
    encoder = PairEncoder(family, tokenizer_of(base, "wildguard"), field="eval.judges.0")
    with pytest.raises(UserError, match=rf"^eval\.judges\.0\.{key} .*cannot tell .*; {remedy}"):
        encoder.check_verdict()


def test_beaver_dam_is_judged_by_its_likeliest_harm(base: Tokenizer) -> None:
    tokenizer, family = tokenizer_of(base, "beaver-dam"), FAMILIES["beaver-dam"]
    model = random_classifier("llama", len(tokenizer), 14, "multi_label_classification", positions=2048)
    labels = read_rule(model.config, family_rule(family), "judge")
    judge = SequenceJudge(model, tokenizer, family_rule(family))
    verdicts = judge_pairs(judge, PAIRS, batch_size=3)
    guard = ClassifierGuard(model.requires_grad_(False), tokenizer, "prob", WholeWeights(), *labels)
    encoder = PairEncoder(family, tokenizer, max_length=2048)
    for (prompt, response), verdict in zip(PAIRS, verdicts, strict=True):
        text = published_text("beaver-dam", "", prompt, response)
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        expected = float(model(input_ids=torch.tensor([ids])).logits[0].sigmoid().max())
        (judgement,) = guard.judge([encoder.encode(prompt, response)], "cpu")
        assert verdict.score == pytest.approx(expected, **CLOSE)
        assert judgement.score == pytest.approx(1 - expected, **CLOSE) and float(judgement.gradient.norm()) > 0
    long = judge_pairs(judge, [(PROMPT, "Fold. " * 400)])[0]
    assert long.unsafe is None and "it takes 512" in long.reason
    assert "it takes 512" in encoder.encode(PROMPT, "Fold. " * 400)


def test_qwen3guard_stream_calls_unsafe_what_its_evaluation_does(base: Tokenizer) -> None:
    tokenizer, family = tokenizer_of(base, "qwen3guard-stream"), FAMILIES["qwen3guard-stream"]
    torch.manual_seed(5)
    model = TokenClassifier(small(len(tokenizer))).eval().requires_grad_(False)
    spread(model)
    judge, encoder = TokenJudge(model, tokenizer, family), PairEncoder(family, tokenizer)
    guard = TokenGuard(model, tokenizer, "margin", WholeWeights())
    answers = [RESPONSE, "No", "Because.", "1", "I", "a", *(f"Step {n}" for n in range(6))]
    pairs = [(prompt, answer) for answer in answers for prompt in ("How?", PROMPT)]
    verdicts = judge_pairs(judge, pairs, batch_size=7)
    for (prompt, response), verdict in zip(pairs, verdicts, strict=True):
        pair = encoder.encode(prompt, response)
        before = published_text("qwen3guard-stream", "", prompt, response).rsplit(response, 1)[0]
        _, spans = encode_text(tokenizer, published_text("qwen3guard-stream", "", prompt, response), family)
        assert len(spans) == len(pair.text.ids)
        first = next(n for n, (_, end) in enumerate(spans) if end > len(before))
        labels = model(torch.tensor([pair.text.ids])).risk_level_logits[0, 0, first:].argmax(1).tolist()
        assert verdict.unsafe == (consecutive(labels, 1) or consecutive(labels, 2)), (labels, verdict)
        (judgement,) = guard.judge([pair], "cpu")
        assert 1 / (1 + torch.tensor(judgement.score).exp()) == pytest.approx(verdict.score, **CLOSE)
        embeddings = model.get_input_embeddings()(torch.tensor([pair.text.ids])).requires_grad_()
        logits = model.head(model.model(inputs_embeds=embeddings).last_hidden_state)[0, first:]
        margins = [
            min(logits[n, risk] - max(logits[n, other] for other in range(3) if other != risk) for n in (k, k + 1))
            for risk in (1, 2)
            for k in range(len(logits) - 1)
        ]
        (-max(margins)).backward()
        gradient = embeddings.grad[0, pair.response_tokens]
        torch.testing.assert_close(judgement.gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert {verdict.unsafe for verdict in verdicts} == {True, False}
    assert judge.why_alone() is None


def consecutive(labels: list[int], risk: int) -> bool:
    """Whether two tokens in a row have this label (QwenLM/Qwen3Guard, eval/eval_stream.py)."""
    return any(labels[n] == labels[n + 1] == risk for n in range(len(labels) - 1))


def test_controversial_beside_unsafe_is_no_pair() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 1.0, 3.0], [2.0, 0.0, 0.0]])
    assert float(unsafe_logit(logits, 0)) < 0 < float(unsafe_logit(logits[[0, 0, 2]], 0))


def test_a_model_without_risk_levels_is_refused(causal: LlamaForCausalLM) -> None:
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 3)}
    with pytest.raises(UserError, match="gives no risk_level_logits"):
        risk_logits(causal, batch)


@pytest.mark.parametrize("name", HUB)
def test_auto_recognises_it(base: Tokenizer, name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(base, name)
    config = SimpleNamespace(architectures=architectures(family))
    assert choose_family(EsiGuard(path=HUB[name]), tokenizer, config).name == name
    cached = f"/models/models--{HUB[name].replace('/', '--')}/snapshots/0123"
    assert choose_family(EvalGuard(kind="guard", path=cached), tokenizer, config).name == name
    if family.marks or family.architectures:  # by its files alone, in a folder of any name
        assert choose_family(EsiGuard(path="/models/mine"), tokenizer, config).name == name
    else:
        with pytest.raises(UserError, match=r"judge\.family.*does not recognise"):
            choose_family(EsiGuard(path="/models/mine"), tokenizer, config)


@pytest.mark.parametrize(
    ("path", "template", "said"),
    [
        ("meta-llama/Llama-Guard-3-8B", "qwen3guard", "by its chat template: qwen3guard"),  # they disagree
        ("meta-llama/Llama-Guard-3-11B-Vision", "llama-guard-3-1b", "by its path: llama-guard-3;"),
        ("/models/wildguard/mistral-judge", "wildguard", "does not recognise"),  # a folder of anybody's
        ("/models/wildguard/snapshots/qwen3guard/llama", "wildguard", "does not recognise"),
        ("/judges/wildguardmix-llama", "wildguard", "does not recognise"),  # trained on its data
        (".", "wildguard", "does not recognise"),
        ("google/shieldgemma-2-4b-it", "qwen3guard-stream", "whose marks its chat template lacks"),
        ("OpenSafetyLab/MD-Judge-v0_2-internlm2_7b", "nemoguard", "does not recognise"),
        ("cais/HarmBench-Llama-2-13b-cls-multimodal-behaviors", "wildguard", "does not recognise"),
        ("my/guard", "nemoguard", "does not recognise"),
    ],
)
def test_auto_is_never_silently_wrong(base: Tokenizer, path: str, template: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"judge\.family.*{re.escape(said)}.*name one of"):
        choose_family(EsiGuard(path=path), tokenizer_of(base, template))


def test_an_architecture_of_another_family_is_refused(base: Tokenizer) -> None:
    classifier = SimpleNamespace(architectures=["LlamaForSequenceClassification"])
    stream = SimpleNamespace(architectures=["Qwen3ForGuardModel"])
    for name, config in (("wildguard", classifier), ("beaver-dam", stream), ("qwen3guard", stream)):
        with pytest.raises(UserError, match=r"judge\.family.*does not fit"):
            choose_family(EsiGuard(path="/models/mine", family=name), tokenizer_of(base, name), config)


@pytest.mark.parametrize("family", ["auto", "gpt-oss-safeguard"])
def test_a_guard_behind_an_endpoint_has_no_gradient(base: Tokenizer, family: str) -> None:
    for section, field in (
        (EsiGuard(path="openai/gpt-oss-safeguard-20b", family=family), "judge"),
        (EvalGuard(kind="guard", path="openai/gpt-oss-safeguard-20b", family=family), "eval.judges.0"),
    ):
        with pytest.raises(UserError, match=rf"{field}\.path.*through an endpoint only.*kind: rubric"):
            choose_family(section, tokenizer_of(base, "qwen3guard-stream"), field=field)


def test_both_stages_prepare_a_judge_of_each_kind(base: Tokenizer, tmp_path: Path) -> None:
    """What they load, how they read it, and the limit of its length."""
    for name, labels in (("beaver-dam", 14), ("wildguard", 0)):
        tokenizer, folder = tokenizer_of(base, name), str(tmp_path / HUB[name].split("/")[1])
        if labels:
            random_classifier("llama", len(tokenizer), labels, "multi_label_classification").save_pretrained(folder)
        else:
            LlamaForCausalLM(small(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        in_esi = prepare_judge(EsiGuard(path=folder), one_by_one=False)
        (in_eval,) = prepare_judges(Eval(judges=[EvalGuard(kind="guard", path=folder)]))
        assert in_esi.family is FAMILIES[name]
        if labels:
            assert in_esi.labels == (list(range(14)), True) and in_esi.encoder.max_length <= 512
            assert isinstance(in_eval, PreparedClassifier) and in_eval.rule.template == FAMILIES[name].template
            assert model_class(in_eval.section, in_eval.config) is AutoModelForSequenceClassification
        else:
            assert in_esi.labels is None and isinstance(in_eval, PreparedNextWord)
            assert in_eval.family is FAMILIES[name]


def test_transformers_class_of_each_kind() -> None:
    def chosen(path: str, architecture: str, family: str = "auto") -> type:
        return model_class(EsiGuard(path=path, family=family), LlamaConfig(architectures=[architecture]))

    assert chosen(HUB["qwen3guard-stream"], "Qwen3ForGuardModel") is AutoModel
    assert chosen(HUB["beaver-dam"], "LlamaForSequenceClassification") is AutoModelForSequenceClassification
    assert chosen("x", "LlamaForSequenceClassification", "beaver-dam") is AutoModelForSequenceClassification
    assert chosen("x", "LlamaForSequenceClassification", "wildguard") is AutoModelForCausalLM
    assert all(chosen(HUB[name], "LlamaForCausalLM") is AutoModelForCausalLM for name in HUB)


def test_llama_guard_4_computes_though_its_chunks_have_no_length(tmp_path: Path) -> None:
    """Its folder holds a vision tower beside the language model, and ``attention_chunk_size: null``."""
    text = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 1}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16}
    config = Llama4Config(
        text_config=text | {"vocab_size": 100, "moe_layers": [], "attention_chunk_size": None, "pad_token_id": 0},
        vision_config=vision | {"projector_output_dim": 16},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 99, (1, 10))
    with pytest.raises(TypeError):
        model(input_ids=ids)
    complete_chunks(model)
    assert model(input_ids=ids).logits.isfinite().all()
    untouched = LlamaForCausalLM(small(100))
    complete_chunks(untouched)
    assert not hasattr(untouched.config, "attention_chunk_size")
