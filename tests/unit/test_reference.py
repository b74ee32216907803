"""The oracle proved: against definitions, automatic differentiation and transformers, never against esi_ds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from builders import (
    GUARD_CHAT,
    GUARD_HEADER_CHAT,
    PAIRS,
    build_guard,
    build_model,
    byte_bpe_tokenizer,
    second_byte_bpe_tokenizer,
    sentencepiece_tokenizer,
)
from reference import (
    LLAMA_GUARD_3,
    RESPONSE_ONLY,
    Family,
    alignment,
    disjoint,
    encode,
    esi_scores,
    guard_ids_mid_text,
    guard_prompt,
    judge,
    load,
    mean_gradient,
    model_prompt_ids,
    num_selected,
    pack_bits,
    paper_gradient,
    response_contraction,
    same_vocabulary,
    select,
    surrogate,
    token_text,
    units,
    verdict_tokens,
    vocabulary_map,
)
from safetensors.torch import load_file
from torch.nn import functional

KINDS = ("llama", "llama_tied", "qwen3_moe", "mixtral", "phi3", "needle")
TOKENIZERS = {"byte": byte_bpe_tokenizer, "second": second_byte_bpe_tokenizer, "piece": sentencepiece_tokenizer}
COUPLES = list(itertools.product(TOKENIZERS, TOKENIZERS))
CUSTOM = Family(template="Q {prompt} R\n{response}\nOk?", verdict_prefix="", safe=" safe", unsafe=" unsafe")


def guard_tokenizer(name: str):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = GUARD_CHAT
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for kind in KINDS:
        build_model(kind, folder / kind, byte_bpe_tokenizer())
    build_guard(folder / "same", byte_bpe_tokenizer(), chat_template=GUARD_HEADER_CHAT)
    build_guard(folder / "other", sentencepiece_tokenizer(), extra_rows=2)
    return folder


# --------------------------------------------------------------------------- logical matrices


@pytest.mark.parametrize("kind", KINDS)
def test_units_cut_every_parameter_once(folder, kind: str) -> None:
    model, _ = load(folder / kind)
    seen = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for unit in units(model):
        seen[unit.parameter_name][unit.index] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_expert_slices_are_the_matrices_of_the_unfused_checkpoint(folder, kind: str) -> None:
    """transformers writes one tensor per expert; its conversion is not ours."""
    model, _ = load(folder / kind)
    on_disk = load_file(folder / kind / "model.safetensors")
    renamed = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    experts = [unit for unit in units(model) if ".experts." in unit.name]
    assert len(experts) == 2 * 5 * 3
    for unit in experts:
        name = unit.name
        if kind == "mixtral":
            stem, half, _ = name.rsplit(".", 2)
            name = f"{stem.replace('.mlp.', '.block_sparse_moe.')}.{renamed[half]}.weight"
        assert torch.equal(unit.values, on_disk[name]), name


def test_fused_dense_slices_act_as_separate_projections(folder) -> None:
    """Phi-3's own forward pass says which rows are which: zeroing values, keys or the gate shows in its parts."""
    model, _ = load(folder / "phi3")
    layer = model.model.layers[0]
    by_name = {unit.name: unit for unit in units(model)}
    x = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0))
    gate, up = (by_name[f"model.layers.0.mlp.{half}_proj.weight"].values for half in ("gate", "up"))
    expected = functional.linear(
        functional.silu(functional.linear(x, gate)) * functional.linear(x, up), layer.mlp.down_proj.weight
    )
    torch.testing.assert_close(layer.mlp(x), expected)
    rows = [by_name[f"model.layers.0.self_attn.{part}_proj.weight"].values.shape[0] for part in "qkv"]
    assert rows == [24, 4, 4]
    # One token attends to itself only, so its output is o_proj of its value, once per query head.
    value = functional.linear(x[:, :1], by_name["model.layers.0.self_attn.v_proj.weight"].values).repeat(1, 1, 6)
    position = model.model.rotary_emb(x[:, :1], torch.zeros(1, 1, dtype=torch.long))
    attended = layer.self_attn(x[:, :1], position_embeddings=position, attention_mask=None)[0]
    torch.testing.assert_close(attended, functional.linear(value, layer.self_attn.o_proj.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_sigma_is_torch_std(folder, kind: str) -> None:
    for unit in units(load(folder / kind)[0]):
        if unit.scored:
            assert unit.sigma == pytest.approx(float(unit.values.double().std()), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "unscored"),
    [
        ("llama", {"model.embed_tokens.weight"}),
        ("llama_tied", {"model.embed_tokens.weight"}),
        (
            "qwen3_moe",
            {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"},
        ),
        ("mixtral", {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}),
        ("phi3", {"model.embed_tokens.weight"}),
    ],
)
def test_what_is_scored(folder, kind: str, unscored: set[str]) -> None:
    model, _ = load(folder / kind)
    left_out = {unit.name for unit in units(model) if not unit.scored}
    assert {name for name in left_out if "norm" not in name} == unscored
    assert all(unit.parameter.ndim == 1 for unit in units(model) if "norm" in unit.name)
    names = {unit.name for unit in units(model) if unit.scored}
    assert ("lm_head.weight" in names) == (kind != "llama_tied")
    assert num_selected(model, 0.01) == math.floor(0.01 * sum(p.numel() for p in model.parameters()))


def test_thirds_cut_inside_rows_and_experts_and_leave_a_rank_empty(folder) -> None:
    """What the builders promise: ceil(n / 3) is no multiple of a row nor of an expert; four weights on three ranks."""
    experts = dict(load(folder / "qwen3_moe")[0].named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    part = -(-experts.numel() // 3)
    assert part % experts[0].numel() and part % experts.shape[-1]
    needle = dict(load(folder / "needle")[0].named_parameters())["model.layers.0.mlp.gate_proj.weight"]
    assert needle.numel() - 2 * -(-needle.numel() // 3) == 0


# --------------------------------------------------------------------------- vocabulary map


def test_same_vocabulary_is_reflexive_only() -> None:
    for model_kind, guard_kind in COUPLES:
        assert same_vocabulary(TOKENIZERS[model_kind](), guard_tokenizer(guard_kind)) == (model_kind == guard_kind)


def test_tokens_without_text() -> None:
    byte, piece = byte_bpe_tokenizer(), sentencepiece_tokenizer()
    assert all(token_text(byte, token) is None for token in byte.all_special_ids)
    assert [token_text(byte, byte.convert_tokens_to_ids(token)) for token in ("Ã", "©", "Ġ", "A")] == [None] * 2 + [
        " ",
        "A",
    ]
    assert [token_text(piece, piece.convert_tokens_to_ids(f"<0x{code}>")) for code in ("C3", "41")] == [None, "A"]
    assert token_text(piece, encode(piece, "a the")[0][-1]) == " the"


@pytest.mark.parametrize(("model_kind", "guard_kind"), COUPLES)
def test_map_rows_by_definition(model_kind: str, guard_kind: str) -> None:
    """One-hot embeddings show which guard tokens a row is the mean of: they spell the token's text, mid-text."""
    model, guard = TOKENIZERS[model_kind](), guard_tokenizer(guard_kind)
    A = vocabulary_map(model, guard, torch.eye(len(guard), dtype=torch.float64), len(model) + 3)
    assert A.shape == (len(model) + 3, len(guard))
    torch.testing.assert_close(A.sum(1), torch.ones(len(A), dtype=torch.float64))
    if model_kind == guard_kind:
        assert torch.equal(A[: len(model)], torch.eye(len(guard), dtype=torch.float64))
        torch.testing.assert_close(A[len(model) :], torch.full_like(A[len(model) :], 1 / len(guard)))
        return
    texts = [token_text(model, token) for token in range(len(model))]
    with_text = [token for token, text in enumerate(texts) if text is not None]
    mean = A[with_text].mean(0)
    for token, row in enumerate(A):
        if token in with_text:
            ids = guard_ids_mid_text(guard, texts[token])
            assert row.nonzero().flatten().tolist() == sorted(set(ids))
            spelled = guard.decode(encode(guard, "a")[0] + ids, clean_up_tokenization_spaces=False)
            assert spelled == "a" + texts[token]
        else:
            torch.testing.assert_close(row, mean)


# --------------------------------------------------------------------------- alignment


@pytest.mark.parametrize(("model_kind", "guard_kind"), COUPLES)
@pytest.mark.parametrize("family", [LLAMA_GUARD_3, RESPONSE_ONLY, CUSTOM], ids=["chat", "response_only", "custom"])
def test_weights_of_guard_tokens_inside_the_response_add_up_to_one(
    model_kind: str, guard_kind: str, family: Family
) -> None:
    model, guard = TOKENIZERS[model_kind](), guard_tokenizer(guard_kind)
    for prompt, response in PAIRS:
        asked = guard_prompt(guard, family, prompt, response)
        low, high = asked.shown
        assert asked.text[asked.start : asked.start + high - low] == response[low:high]
        weights = alignment(response, model, guard, asked.text, asked.start, asked.shown, asked.special)
        spans = encode(guard, asked.text, asked.special)[1]
        end = asked.start + high - low
        sums = weights.sum(0).tolist()
        for total, (start, stop) in zip(sums, spans, strict=True):
            if stop <= asked.start or start >= end or start == stop:
                assert total == 0
            elif response.isascii() and asked.start <= start and stop <= end:
                assert total == pytest.approx(1, abs=1e-12)
            elif response.isascii():  # straddles a border: the share of it that lies inside
                inside = min(stop, end) - max(start, asked.start)
                assert total == pytest.approx(inside / (stop - start), abs=1e-12)


@pytest.mark.parametrize("name", ["byte", "second"])
def test_one_tokenizer_gives_the_identity_but_for_tokens_without_text(name: str) -> None:
    """Nothing straddles here: the template puts line ends, which no token of these tokenizers shares with a word."""
    tokenizer = TOKENIZERS[name]()
    for prompt, response in PAIRS:
        asked = guard_prompt(tokenizer, CUSTOM, prompt, response)
        ids, spans = encode(tokenizer, asked.text, asked.special)
        inside = [
            j
            for j, (start, end) in enumerate(spans)
            if asked.start <= start and end <= asked.start + len(response) and start < end
        ]
        tokens = encode(tokenizer, response)[0]
        if [ids[j] for j in inside] != tokens:  # leading blanks merge with the line end before them
            assert response.startswith(" ")
            continue
        weights = alignment(response, tokenizer, tokenizer, asked.text, asked.start, special=asked.special)
        has_text = torch.tensor([token_text(tokenizer, token) is not None for token in tokens], dtype=torch.float64)
        torch.testing.assert_close(weights[:, inside], torch.diag(has_text))
        assert weights.sum() == has_text.sum()


def test_bytes_of_one_character_split_it_in_order() -> None:
    assert disjoint([(0, 1), (1, 2), (1, 2), (2, 2)]) == [[(0.0, 1.0)], [(1.0, 1.5)], [(1.5, 2.0)], []]


def test_alignment_by_hand() -> None:
    """'safe house' after 'X': byte pieces of the model against one made-up span list is what the formula says."""
    tokenizer = byte_bpe_tokenizer()
    spans_of_model = encode(tokenizer, "safe house")[1]
    theirs = encode(tokenizer, "Xsafe house")[1]
    weights = alignment("safe house", tokenizer, tokenizer, "Xsafe house", 1)
    for t, (a, b) in enumerate(spans_of_model):
        for j, (c, d) in enumerate(theirs):
            assert weights[t, j] == pytest.approx(max(0, min(b + 1, d) - max(a + 1, c)) / (d - c))


def test_trimmed_offsets_are_undone() -> None:
    """RoBERTa's post-processor takes blanks out of the spans; they belong to their tokens all the same."""
    from tokenizers import processors

    plain, trimming = byte_bpe_tokenizer(), byte_bpe_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert trimming("a the", return_offsets_mapping=True)["offset_mapping"][-1] == (2, 5)
    assert encode(trimming, "a the") == encode(plain, "a the")
    assert encode(plain, "a the")[1][-1] == (1, 5)


# --------------------------------------------------------------------------- judge


def test_guard_prompts(folder) -> None:
    _, tokenizer = load(folder / "same")
    asked = guard_prompt(tokenizer, LLAMA_GUARD_3, "Hi ", " Yes {prompt} ")
    assert asked.text.endswith("User: Hi\n\nAgent: Yes {prompt}\n\n<|end|><|assistant|>") and asked.shown == (1, 13)
    alone = guard_prompt(tokenizer, RESPONSE_ONLY, "Hi", "Yes")
    assert "User: Yes" in alone.text and "Hi" not in alone.text and "Agent:" not in alone.text
    assert guard_prompt(tokenizer, CUSTOM, "{response}", " {prompt}").text == "Q {response} R\n {prompt}\nOk?"


@pytest.mark.parametrize("guard", ["same", "other"])
@pytest.mark.parametrize("family", [LLAMA_GUARD_3, CUSTOM], ids=["chat", "custom"])
def test_scores_equal_a_plain_forward_pass(folder, guard: str, family: Family) -> None:
    """From ids, not embeddings; and |u| against central differences along u."""
    model, tokenizer = load(folder / guard)
    model.double()
    context, safe, unsafe = verdict_tokens(tokenizer, family, guard_prompt(tokenizer, family, *PAIRS[0]))
    assert safe != unsafe
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1]
        probabilities = logits.softmax(-1)
        expected = {
            "margin": probabilities[safe].log() - probabilities[unsafe].log(),
            "logit": logits[safe],
            "logprob": probabilities[safe].log(),
            "prob": probabilities[safe],
        }
        table = model.get_input_embeddings()(torch.tensor([context]))
    for kind, value in expected.items():
        score, gradient = judge(model, context, safe, unsafe, kind)
        assert score == pytest.approx(float(value), rel=1e-10)
        step = 1e-3
        direction = gradient / gradient.norm()
        with torch.no_grad():
            moved = [model(inputs_embeds=table + sign * step * direction).logits[0, -1] for sign in (1, -1)]
        ends = [
            {
                "margin": float(z[safe] - z[unsafe]),
                "logit": float(z[safe]),
                "logprob": float(z.log_softmax(-1)[safe]),
                "prob": float(z.softmax(-1)[safe]),
            }[kind]
            for z in moved
        ]
        # Measured 3e-5: transformers keeps norms and rotary tables in fp32 even in a float64 model. Along a random
        # direction the slope nearly cancels and that noise alone is some per cent of it.
        assert float(gradient.norm()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3), kind


def test_verdict_is_read_where_the_answers_differ(folder) -> None:
    _, tokenizer = load(folder / "same")
    asked = guard_prompt(tokenizer, LLAMA_GUARD_3, *PAIRS[0])
    context, safe, unsafe = verdict_tokens(tokenizer, LLAMA_GUARD_3, asked)
    for word, token in (("safe", safe), ("unsafe", unsafe)):
        whole = encode(tokenizer, asked.text + "\n\n" + word)[0]
        assert whole[: len(context)] == context and whole[len(context)] == token
    with pytest.raises(ValueError, match="begins with"):
        verdict_tokens(tokenizer, Family(safe="A", unsafe="A A"), asked)


# --------------------------------------------------------------------------- surrogate


def test_soft_gradient_is_that_of_the_judge_of_soft_embeddings(folder) -> None:
    """At identity alignment L is the first-order change of J as the guard reads e_t = sum_v p_t(v) A[v].

    So dL/dl must be dJ/dl through those embeddings, with u taken at the same point: automatic differentiation of J
    itself, with no surrogate in between.
    """
    model, tokenizer = load(folder / "llama")
    guard, _ = load(folder / "same")
    prompt, response = PAIRS[0]
    asked = guard_prompt(tokenizer, CUSTOM, prompt, response)
    context, safe, unsafe = verdict_tokens(tokenizer, CUSTOM, asked)
    sampled = encode(tokenizer, response)[0]
    whole = asked.text + CUSTOM.safe
    weights = alignment(response, tokenizer, tokenizer, whole, asked.start, special=True)[:, : len(context)]
    places = weights.argmax(1)
    assert torch.equal(weights, functional.one_hot(places, len(context)).double())
    assert [context[j] for j in places] == sampled
    before = model_prompt_ids(tokenizer, prompt)
    with torch.no_grad():
        logits = model(torch.tensor([before + sampled])).logits[0, len(before) - 1 : -1]
    A = vocabulary_map(tokenizer, tokenizer, guard.get_input_embeddings().weight.detach(), logits.shape[1])

    leaf = logits.clone().requires_grad_()
    embeddings = (
        guard.get_input_embeddings()(torch.tensor([context]))
        .detach()[0]
        .index_copy(0, places, (leaf / 0.3).softmax(-1) @ A)
    )
    embeddings.retain_grad()
    z = guard(inputs_embeds=embeddings[None]).logits[0, -1]
    (z[safe] - z[unsafe]).backward()

    contraction = weights @ embeddings.grad.double() @ A.double().T
    mine = logits.clone().requires_grad_()
    surrogate("soft", mine, sampled, contraction).backward()
    torch.testing.assert_close(mine.grad, leaf.grad, rtol=1e-4, atol=1e-6 * float(leaf.grad.abs().max()) + 1e-9)


@pytest.mark.parametrize("estimator", ["soft", "gumbel"])
def test_surrogate_gradient_equals_finite_differences(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, contraction, direction, drawn = (
        torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(4)
    )

    def loss(z):
        return surrogate(estimator, z, [0] * 4, contraction, 0.3, lambda t, width: drawn[t, :width])

    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    step = 1e-5
    slope = float(loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    assert float((leaf.grad * direction).sum()) == pytest.approx(slope, rel=1e-8)
    # by hand: dL/dl_t = p_t (c_t - <p_t, c_t>) / tau
    p = ((logits + (drawn if estimator == "gumbel" else 0)) / 0.3).softmax(-1)
    by_hand = p * (contraction - (p * contraction).sum(-1, keepdim=True)) / 0.3
    torch.testing.assert_close(leaf.grad, by_hand)


def test_paper_gradient_by_automatic_differentiation() -> None:
    contraction = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.full((50,), -17.0, dtype=torch.float64)
    z[7] = 0
    z.requires_grad_()
    (z.softmax(-1) * contraction).sum().backward()
    torch.testing.assert_close(paper_gradient(contraction, 7), z.grad, rtol=1e-10, atol=0)
    assert int(z.grad.abs().argmax()) == 7
    logits = torch.zeros(1, 50, dtype=torch.float64, requires_grad=True)
    surrogate("paper_code", logits, [7], contraction[None]).backward()
    torch.testing.assert_close(logits.grad[0], z.grad, rtol=1e-10, atol=0)


# --------------------------------------------------------------------------- scores


def test_score_gradient_equals_finite_differences_of_the_loss(folder) -> None:
    """One weight moved both ways, the surrogate's mean recomputed: the derivative through the whole model."""
    model, tokenizer = load(folder / "qwen3_moe")
    guard, guard_tok = load(folder / "other")
    pairs = PAIRS[1:4]
    gradients, judged = mean_gradient(model, tokenizer, guard, guard_tok, pairs)
    assert len(judged) == len(pairs)
    width = model.get_output_embeddings().weight.shape[0]
    A = vocabulary_map(tokenizer, guard_tok, guard.get_input_embeddings().weight.detach(), width)

    @torch.no_grad()
    def mean_loss() -> float:
        total = 0.0
        for prompt, response in pairs:
            with torch.enable_grad():
                contraction = response_contraction(
                    tokenizer, guard, guard_tok, A, (prompt, response), LLAMA_GUARD_3, "margin"
                )[1]
            before, sampled = model_prompt_ids(tokenizer, prompt), encode(tokenizer, response)[0]
            logits = model(torch.tensor([before + sampled])).logits[0, len(before) - 1 : -1]
            total += float(surrogate("soft", logits, sampled, contraction))
        return total / len(pairs)

    for name in ("lm_head.weight", "model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.v_proj.weight"):
        parameter, gradient = model.get_parameter(name), gradients[name]
        position = torch.unravel_index(gradient.abs().argmax(), gradient.shape)
        value, step = float(parameter.detach()[position]), 1e-3
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[position] = value + sign * step
            ends.append(mean_loss())
        with torch.no_grad():
            parameter[position] = value
        # fp32 forward passes: 1e-6 of a loss of size one over a step of 1e-3
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient[position]), rel=2e-2), name


def test_criteria_are_their_formulas(folder) -> None:
    model, tokenizer = load(folder / "phi3")
    guard, guard_tok = load(folder / "same")
    gradients, _ = mean_gradient(model, tokenizer, guard, guard_tok, PAIRS[:2])
    scores = {
        name: esi_scores(folder / "phi3", folder / "same", PAIRS[:2], name)[0]
        for name in ("esi", "grad", "snip", "magnitude")
    }
    for unit in units(model):
        name, index = unit.parameter_name, unit.index
        if not unit.scored:
            assert name not in scores["esi"]
            continue
        gradient = gradients[name][index]
        assert float(gradient.abs().max()) > 0, unit.name
        expected = {
            "esi": gradient.abs() * unit.values.double().std(),
            "grad": gradient.abs(),
            "snip": (gradient * unit.values).abs(),
            "magnitude": unit.values.abs().double(),
        }
        for criterion, values in expected.items():
            torch.testing.assert_close(scores[criterion][name][index].double(), values, rtol=1e-6, atol=1e-30)
    assert all(v.dtype == torch.float32 and not v.isnan().any() for s in scores.values() for v in s.values())


def test_signed_gradients_are_averaged_before_the_absolute_value(folder) -> None:
    one, two, both = (
        esi_scores(folder / "llama", folder / "other", pairs, "grad")[0]["lm_head.weight"]
        for pairs in (PAIRS[:1], PAIRS[1:2], PAIRS[:2])
    )
    assert bool((both <= (one + two) / 2 * (1 + 1e-5) + 1e-12).all())
    assert bool((both < (one + two) / 2 * 0.5).any())


def test_empty_responses_are_left_out_and_special_strings_refused(folder) -> None:
    with_empty, judged = esi_scores(folder / "llama", folder / "same", [PAIRS[0], ("Nothing", " \n")])
    alone, one = esi_scores(folder / "llama", folder / "same", PAIRS[:1])
    assert judged == one and all(torch.equal(with_empty[name], alone[name]) for name in alone)
    with pytest.raises(ValueError, match="break it up"):
        esi_scores(folder / "llama", folder / "same", [("a <|end|>", "b")])


# --------------------------------------------------------------------------- selection


def test_selection_and_its_ties() -> None:
    scores = {"b": torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "a": torch.tensor([2.0, 0.0, 2.0])}
    top = select(scores, 3)
    assert top["b"].tolist() == [[False, True], [True, True]] and not top["a"].any()
    assert select(scores, 4)["a"].tolist() == [True, False, False]
    low = select(scores, 3, "bottom")
    assert low["a"].tolist() == [False, True, False] and low["b"].tolist() == [[True, False], [True, False]]
    assert not any(mask.any() for mask in select(scores, 0).values())
    assert all(mask.all() for mask in select(scores, 99).values())
    with pytest.raises(ValueError, match="not a number"):
        select({"a": torch.tensor([math.nan])}, 1)


def test_packed_bits() -> None:
    assert pack_bits(torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()).tolist() == [0b10000001, 0b00000001]
    assert pack_bits(torch.zeros(0, dtype=torch.bool)).tolist() == []
