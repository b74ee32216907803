"""The judge's texts, verdicts, vocabulary map and alignment, for any two tokenizers."""

from __future__ import annotations

import itertools

import pytest
import torch
from builders import GUARD_CHAT, PAIRS, byte_bpe_tokenizer, sentencepiece_tokenizer
from reference import encode, guard_ids_mid_text, token_text, vocabulary_map
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from esi_ds.data.chat import break_up, encode_response, encode_with_spans, special_strings
from esi_ds.errors import UserError
from esi_ds.judge import vocabulary
from esi_ds.judge.alignment import alignment_weights
from esi_ds.judge.families import FAMILIES, Family
from esi_ds.judge.guard import verdict_score
from esi_ds.judge.pairs import PairEncoder, TextBuilder, encode_text
from esi_ds.judge.recognition import choose_family
from esi_ds.judge.vocabulary import VocabularyMap, encode_mid_text, same_vocabulary, token_texts

BEGIN = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
TRIMMING = {
    "byte level": lambda: processors.ByteLevel(trim_offsets=True),
    "roberta": lambda: processors.RobertaProcessing(("<|end|>", 2), ("<|bos|>", 1), trim_offsets=True),
    "sequence": lambda: processors.Sequence([processors.ByteLevel(trim_offsets=True), BEGIN]),
}


def trimming_tokenizer(kind: str = "byte level", vocab_size: int = 380) -> PreTrainedTokenizerFast:
    """Its spans, as it says them itself, lack the blanks before words."""
    tokenizer = byte_bpe_tokenizer(vocab_size)
    tokenizer.backend_tokenizer.post_processor = TRIMMING[kind]()
    return tokenizer


TOKENIZERS = {
    "byte": byte_bpe_tokenizer,
    "byte2": lambda: byte_bpe_tokenizer(400),
    "trimming": trimming_tokenizer,
    "piece": sentencepiece_tokenizer,
    "piece2": lambda: sentencepiece_tokenizer(420),
}
COUPLES = list(itertools.product(TOKENIZERS, TOKENIZERS))
LLAMA = FAMILIES["llama-guard-3"]


def guard_tokenizer(name: str):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = GUARD_CHAT
    return tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_texts_are_texts_mid_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = token_texts(tokenizer)
    assert texts == [token_text(tokenizer, token) for token in range(len(tokenizer))]
    assert all(texts[token] is None for token in tokenizer.all_special_ids)
    ids = tokenizer("aa the cafe is safe", add_special_tokens=False)["input_ids"]
    assert "".join(texts[token] for token in ids[1:]) == tokenizer.decode(ids)[len(texts[ids[0]].lstrip()) :]


@pytest.mark.parametrize(("model", "guard"), COUPLES)
def test_contraction_is_the_product_with_the_whole_map(model: str, guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ũ through M (E ũ) against the map A built row by row, padded logits included; E is read in many parts."""
    monkeypatch.setattr(vocabulary, "ROWS", 50)
    tokenizer, other = TOKENIZERS[model](), guard_tokenizer(guard)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(other), 8, generator=generator)
    gradient = torch.randn(5, 8, generator=generator)
    mapping = VocabularyMap(tokenizer, other, len(tokenizer) + 4)
    expected = gradient @ vocabulary_map(tokenizer, other, table, len(tokenizer) + 4).T
    # fp32 sums in another order, values of size one: 1e-5 is about a hundred roundings.
    torch.testing.assert_close(mapping.contract(gradient, table), expected, rtol=1e-5, atol=1e-5)
    assert mapping.is_identity == (model == guard) == same_vocabulary(tokenizer, other)


def test_identity_uses_the_table_itself() -> None:
    tokenizer = byte_bpe_tokenizer()
    table = torch.eye(len(tokenizer))
    contraction = VocabularyMap(tokenizer, byte_bpe_tokenizer(), len(tokenizer)).contract(table[:3], table)
    assert torch.equal(contraction, table[:3])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_mid_text_encoding_spells_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    words = [" the", "the", "\n", "a", "é", " 12", "safe"]
    for word, ids in zip(words, encode_mid_text(tokenizer, words), strict=True):
        assert ids == guard_ids_mid_text(tokenizer, word)
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([*before, *ids]) == tokenizer.decode(before) + word


@pytest.mark.parametrize(("model", "guard"), COUPLES)
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[1].isascii()])
def test_weights_of_a_guard_token_inside_the_response_add_up_to_one(model: str, guard: str, pair) -> None:
    encoded = PairEncoder(LLAMA, guard_tokenizer(guard)).encode(*pair)
    response = encode_response(TOKENIZERS[model](), [], pair[1])
    weights = alignment_weights(response.offsets, encoded.spans, encoded.shown, [True] * len(response.ids))
    low, high = encoded.shown
    assert pair[1][low:high] == pair[1].strip()
    shares = [max(0, min(end, high) - max(start, low)) / (end - start) for start, end in encoded.spans]
    torch.testing.assert_close(weights.sum(0), torch.tensor(shares))
    assert shares.count(1.0) >= len(shares) - 2  # all but those that straddle a border


@pytest.mark.parametrize("kind", TRIMMING)
def test_white_space_is_in_the_span_of_its_token(kind: str) -> None:
    """Whatever the tokenizer's own setting, which stays: it is exported with the model."""
    plain, trimming = byte_bpe_tokenizer(), trimming_tokenizer(kind, 340)
    text = "I am the first.\n    if  so"
    before = trimming.backend_tokenizer.to_str()
    assert trimming(text, return_offsets_mapping=True)["offset_mapping"] != encode(trimming, text)[1]
    encoded = encode_with_spans(trimming, text)
    assert (encoded["input_ids"], encoded["offset_mapping"]) == encode(trimming, text) == encode(plain, text)
    assert trimming.backend_tokenizer.to_str() == before
    assert encode_response(trimming, [], text) == encode_response(plain, [], text)
    trimming.chat_template = plain.chat_template = GUARD_CHAT
    pairs = [PairEncoder(LLAMA, tokenizer).encode("Tell me", text) for tokenizer in (trimming, plain)]
    assert pairs[0] == pairs[1]


def test_one_tokenizer_gives_the_identity_inside_the_response() -> None:
    response = " ".join(["First step 2. Second step 3."] * 2)
    pair = PairEncoder(LLAMA, guard_tokenizer("byte")).encode("Tell me", response)
    encoded = encode_response(byte_bpe_tokenizer(), [], response)
    weights = alignment_weights(encoded.offsets, pair.spans, pair.shown, [True] * len(encoded.ids))
    assert torch.equal(weights[1:-1, 1:-1], torch.eye(len(encoded.ids))[1:-1, 1:-1])


def test_straddling_tokens_count_with_their_share() -> None:
    weights = alignment_weights([(0, 2), (2, 5)], [(-2, 1), (1, 3), (3, 8)], (0, 5), [True, True])
    expected = torch.tensor([[1 / 3, 1 / 2, 0], [0, 1 / 2, 2 / 5]])
    torch.testing.assert_close(weights, expected)
    assert alignment_weights([(0, 2)], [(0, 2), (1, 1)], (0, 2), [False]).tolist() == [[0.0, 0.0]]


def test_templates_and_contexts() -> None:
    tokenizer = guard_tokenizer("piece")
    both = TextBuilder(LLAMA, tokenizer, "prompt_and_response").build("Why?", "  Because. ")
    assert both.text[both.start : both.end] == "Because." and both.response_offset == 2
    assert "User: Why?" in both.text and both.text.endswith("Answer:\n\n")
    alone = TextBuilder(LLAMA, tokenizer, "response_only").build("Why?", "Because.")
    assert "Why?" not in alone.text and "User: Because." in alone.text
    custom = Family("custom", "", (" safe",), (" unsafe",), "Q {prompt} A {response} V:")
    built = TextBuilder(custom, tokenizer, "prompt_and_response").build("x {response} y", "z")
    assert built.text == "Q x {response} y A z V:" and built.text[built.start : built.end] == "z"
    assert TextBuilder(custom, tokenizer, "response_only").build("x", "z").text == "Q  A z V:"


def test_a_template_that_reads_lists_of_parts() -> None:
    """Llama-Guard-3-1B's template takes content as [{"type": "text", "text": ...}]."""
    tokenizer = guard_tokenizer("piece")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %};"
        "{% endfor %}"
    )
    built = TextBuilder(LLAMA, tokenizer, "prompt_and_response").build("Why?", "Because.")
    assert built.text == "Why?;Because.;\n\n"


def test_verdict_ids_come_from_the_first_difference() -> None:
    tokenizer = byte_bpe_tokenizer()
    family = Family("custom", " It is", (" a safe",), (" a unsafe",), "x")
    text, spans = encode_text(tokenizer, "Verdict: It is", family)
    safe, unsafe = (tokenizer("Verdict: It is" + word)["input_ids"] for word in (" a safe", " a unsafe"))
    position = len(text.ids)
    assert safe[:position] == unsafe[:position] == text.ids and len(spans) == position
    assert (text.safe, text.unsafe) == ([safe[position]], [unsafe[position]]) and safe[position] != unsafe[position]
    with pytest.raises(ValueError, match="cannot tell"):
        encode_text(tokenizer, "Verdict:", Family("custom", "", (" safe",), (" safe, safe",), "x"))


def test_a_pair_keeps_the_spans_of_its_response_only() -> None:
    """A run keeps the pairs of all prompts, and spans take more memory than ids."""
    family = Family("custom", " It is", (" a safe",), (" a unsafe",), "{prompt} {response}")
    pair = PairEncoder(family, byte_bpe_tokenizer()).encode("Why? " * 50, "Because.")
    lists = [values for values in (*vars(pair).values(), *vars(pair.text).values()) if isinstance(values, list)]
    assert sum(isinstance(value, tuple) for values in lists for value in values) == len(pair.response_tokens) < 50


def test_scores_of_a_verdict() -> None:
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    p = logits.softmax(0)
    assert float(verdict_score("margin", logits, [0], [1])) == pytest.approx(float((p[0] / p[1]).log()), abs=1e-6)
    assert float(verdict_score("margin", logits, [0], [1, 2])) == pytest.approx(
        float((p[0] / (p[1] + p[2])).log()), abs=1e-6
    )
    assert float(verdict_score("logit", logits, [0], [1])) == 1.0
    assert float(verdict_score("logprob", logits, [0], [1])) == pytest.approx(float(p[0].log()), abs=1e-6)
    assert float(verdict_score("prob", logits, [0], [1])) == pytest.approx(float(p[0]), abs=1e-6)


def test_families_are_recognised_or_asked_for() -> None:
    from esi_ds.config import EsiGuard

    tokenizer = guard_tokenizer("piece")
    assert choose_family(EsiGuard(path="somewhere"), tokenizer).name == "llama-guard-3"
    tokenizer.chat_template = "{# Safety: Safe, Unsafe, Controversial #}{{ messages }}"
    assert choose_family(EsiGuard(path="somewhere"), tokenizer).name == "qwen3guard"
    assert choose_family(EsiGuard(path="Qwen/Qwen3Guard-Gen-8B"), tokenizer).unsafe == (" Unsafe", " Controversial")
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UserError, match="judge.family"):
        choose_family(EsiGuard(path="somewhere"), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        choose_family(EsiGuard(path="somewhere", family="llama-guard-3"), tokenizer)


def test_special_tokens_in_data_stay_text() -> None:
    tokenizer, guard = byte_bpe_tokenizer(), guard_tokenizer("piece")
    specials = special_strings(tokenizer, guard)
    text, count = break_up("a <|end|> b </s></s> c", specials)
    assert count == 3
    for t in (tokenizer, guard):
        assert not set(t(text, add_special_tokens=False)["input_ids"]) & set(t.all_special_ids)
    assert break_up("plain < text", specials) == ("plain < text", 0)
