"""The answer of a response with thoughts, and that it alone is judged and counted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import CHAT, byte_bpe_tokenizer, random_classifier, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from thinking import thinking_tokenizer, thought
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from esi_ds.data.chat import encode_prompt, special_strings
from esi_ds.data.prompts import load_responses
from esi_ds.data.thoughts import (
    APRIEL,
    MARKS,
    UNFINISHED,
    Piece,
    Span,
    decode_responses,
    final_answer,
    marks_with,
    opening_mark,
    parts,
    spans_in_text,
    whole_response,
)
from esi_ds.data.thoughts import HARMONY as HARMONY_MARKS
from esi_ds.eval.classifiers import SequenceJudge, judge_pairs
from esi_ds.eval.coherence import EMPTY, incoherence
from esi_ds.eval.endpoint import Reply
from esi_ds.eval.fluency import surprises
from esi_ds.eval.refusals import REFUSAL_LISTS, is_refusal, judge_by_words, refused
from esi_ds.eval.rubric import RubricQuestion, read_verdict
from esi_ds.eval.tables import answer_measures
from esi_ds.eval.verdicts import text_to_judge
from esi_ds.judge.alignment import alignment_weights
from esi_ds.judge.classifier import SequenceRule
from esi_ds.judge.families import FAMILIES
from esi_ds.judge.pairs import PairEncoder
from esi_ds.report.evaluation import interval
from esi_ds.report.tuning import num_answers, refusal_rows, refusal_shares, thought_notes
from esi_ds.stages.esi.prepare import PromptData, PromptInputs, clean_responses, encode_examples
from esi_ds.stages.tune.work import answer_row

REFUSES, COMPLIES = "I'm sorry, but I can't help with that.", "Sure, here is how: step 1 ..."
PONDERS = "Policy says I cannot do this. I'm sorry? Sure, here is how it would go."
HARMONY = (
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>commentary<|message|>wait<|end|>"
    "<|start|>assistant<|channel|>final<|message|>{}"
)
FORMS = {
    "think": "<think>\n{}\n</think>\n\n{}",
    "opened by the prompt": "{}\n</think>\n\n{}",
    "harmony": HARMONY,
    "harmony with its end": HARMONY + "<|return|>",
    "harmony, decoded without special tokens": "analysis{}assistantfinal{}",
    "several thoughts": "<think>a</think> <think>{}</think>{}",
    "a thought about marks": "<think>They want <think> tags. {}</think>{}",
    "a thought in a thought": "<think>a <think>b</think> {} </think>{}",
    "marks in capitals": "<THINK>{}</Think>\n{}",
    "answer in marks": "<think>{}</think>\n<answer>\n{}\n</answer>\n",
    "solution in marks": "<|begin_of_thought|>{}<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "Marco-o1": "<Thought>\n{}\n</Thought>\n<Output>\n{}\n</Output>",
    "final": "<think>{}</think><final>{}</final>",
    "final answer in marks": "<think>{}</think>\n<final_answer>{}</final_answer>",
    "final answer": "<think>{}</think>\n\n**Final Answer**\n{}",
    "a box": "<think>{}</think>\n<|begin_of_box|>{}<|end_of_box|>",
    "Granite": "Here is my thought process:\n\n{}\n\nHere is my response:\n\n{}",
    "Apriel": "Here are my reasoning steps:\n{}\n[BEGIN FINAL RESPONSE]\n{}\n[END FINAL RESPONSE]\n",
    "Apriel, opened by the prompt": "{}\n[BEGIN FINAL RESPONSE]\n{}\n[END FINAL RESPONSE]",
    **{opening: opening + "{}" + closing + "\n{}" for opening, closing in MARKS},
}
LEADING = {
    "analysis": "<analysis>\n{}\n</analysis>\n\n{}",
    "reflection": "\n<Reflection>{}</Reflection>{}",
    **{tag: f"<{tag}>\n{{}}\n</{tag}>\n{{}}" for tag in ("cot", "inner_thoughts", "reason", "thoughts")},
    "scratchpad, answer": "<scratchpad>{}</scratchpad>\n<answer>{}</answer>",
    "two of them": "<analysis>{}</analysis><scratchpad>Well.</scratchpad>{}",
    "about marks": "<analysis>{} <think> opens it.</analysis>{}",
    "and another": "<analysis>First.</analysis><think>{}</think>{}",
}
OPEN = {
    **{opening: opening + "{}" for opening, _ in MARKS if opening != APRIEL[0]},
    "analysis": "<analysis>{}",
    "scratchpad, twice": "<scratchpad>a</scratchpad> <scratchpad>{}",
    "a second thought": "<think>a</think>" + COMPLIES + "<think>{}",
    "harmony": "<|channel|>analysis<|message|>{}",
    "harmony, before the answer": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", [REFUSES, COMPLIES, ""])
def test_the_answer_stands_behind_the_thoughts(form: str, answer: str) -> None:
    response = FORMS[form].format(PONDERS, answer)
    assert final_answer(response) == answer
    spans = parts(response).answer
    assert spans is not None and "".join(response[start:end] for start, end in spans) == answer


@pytest.mark.parametrize("form", FORMS)
def test_the_thought_is_the_rest(form: str) -> None:
    """All that the form shows but marks and answer: of harmony the commentary too."""
    shown = thought(FORMS[form].format(PONDERS, COMPLIES))
    assert PONDERS in shown and COMPLIES not in shown
    if form == "harmony":
        assert shown == f"{PONDERS}\n\nwait"
    if form in OPEN and form in dict(MARKS):
        assert shown == thought(OPEN[form].format(PONDERS)) == PONDERS


@pytest.mark.parametrize("speaks", ["", " </think> ends it.", " <think> opens it.", " <|channel|>final<|message|>x"])
def test_an_engine_that_gives_thought_and_answer_apart(speaks: str) -> None:
    """Marks that the thought or the answer speaks of change nothing: what was apart stays apart."""
    whole = whole_response(PONDERS + speaks, COMPLIES + speaks)
    assert whole is not None and (final_answer(whole) or "").startswith(COMPLIES)
    assert PONDERS not in (final_answer(whole) or "") and thought(whole).startswith(PONDERS)
    assert COMPLIES not in thought(whole)
    unfinished = whole_response(PONDERS + speaks, None)
    assert unfinished is not None and final_answer(unfinished) is None
    assert whole_response(None, COMPLIES + speaks) == whole_response("", COMPLIES + speaks) == COMPLIES + speaks
    assert whole_response(None, None) is None
    assert whole_response("a", "b") == "<think>\na\n</think>\n\nb"


REFUSAL_MESSAGE = f"<|channel|>final<|message|>{REFUSES}"


@pytest.mark.parametrize(
    "response",
    [
        f"{COMPLIES}\n{REFUSAL_MESSAGE}",
        f"{REFUSAL_MESSAGE}<|end|>{COMPLIES}",
        f"{REFUSAL_MESSAGE}<|return|>{COMPLIES}<|start|>assistant",
        f"<|start|>{COMPLIES}{REFUSAL_MESSAGE}",
        f"<|channel|>{COMPLIES}{REFUSAL_MESSAGE}",
        f"<|channel|>analysis<|message|>No.<|end|>{COMPLIES}<|start|>assistant{REFUSAL_MESSAGE}",
        f"<|channel|>final {COMPLIES}<|message|>{REFUSES}",
        f"{COMPLIES} as in <|channel|>analysis",
        f"<|channel|>analysis\n{COMPLIES}",
    ],
)
def test_text_outside_of_messages_is_answer(response: str) -> None:
    """An attack may have a model that has no channels write such marks: what no judge reads would be harmless."""
    for reads in ("answer", "both"):
        assert COMPLIES.removeprefix("Sure") in str(text_to_judge(response, reads))
    (verdict,) = judge_by_words([response], REFUSAL_LISTS["xstest"])
    assert verdict.unsafe is (not response.startswith(REFUSAL_MESSAGE))


@pytest.mark.parametrize(
    "response",
    [
        "<|start|>assistant{}",
        " to=functions.find<|channel|>commentary json<|message|>{{}}<|call|>"
        "<|start|>functions.find to=assistant<|channel|>commentary<|message|>[]<|end|><|start|>assistant{}",
        "<|channel|>analysis to=python code<|message|>1<|call|>{}",
        "<|channel|>commentary to=functions.find <|constrain|>json<|message|>{{}}<|end|>\n{}",
        "<|channel|>analysis<|channel|>analysis<|message|>No.<|end|>{}",
    ],
)
def test_what_harmony_writes_around_messages_is_no_answer(response: str) -> None:
    assert final_answer(response.format(f"{REFUSAL_MESSAGE}<|return|>\n")) == REFUSES
    assert final_answer(response.format("<|channel|>analysis<|message|>No.")) is None
    assert final_answer(response.format("<|channel|>")) is None


def test_thoughts_of_other_kinds_may_speak_of_messages() -> None:
    quotes = f"They want {REFUSAL_MESSAGE}<|end|>."
    assert final_answer(f"<think>{quotes}</think>{COMPLIES}") == COMPLIES
    assert final_answer(f"{quotes}</think>{COMPLIES}", "<think>") == COMPLIES
    assert final_answer(f"Mind <|channel|>.</think>{COMPLIES}") == COMPLIES


@settings(derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([*HARMONY_MARKS, "<|return|>", "final", "analysis", "1. ", " 2.\n", "3."])))
def test_nothing_is_in_neither_thoughts_nor_answer(pieces: list[str]) -> None:
    response = "".join(pieces)
    trace, answer = parts(response)
    spans = sorted([*trace, *(answer or [])])
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    shown = "".join(response[start:end] for start, end in spans)
    assert [c for c in shown if c.isdigit()] == [c for c in response if c.isdigit()]


def test_a_user_s_pair_of_marks() -> None:
    marks = marks_with(["[[ponder]]", "[[/ponder]]"])
    response = f"[[Ponder]]{PONDERS}[[/ponder]]\n{COMPLIES}"
    assert final_answer(response, None, marks) == COMPLIES and final_answer(response) == response
    assert thought(response, None, marks) == PONDERS
    assert final_answer(f"[[ponder]]{PONDERS}", None, marks) is None
    assert final_answer(f"<think>{PONDERS}</think>{COMPLIES}", None, marks) == COMPLIES
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = CHAT.replace("<|assistant|>\n", "<|assistant|>[[ponder]]\n")
    assert opening_mark(tokenizer, encode_prompt(tokenizer, "Why?", None), marks) == "[[ponder]]"
    assert final_answer(f"{PONDERS}[[/ponder]]{COMPLIES}", "[[ponder]]", marks) == COMPLIES


def test_a_user_s_pair_of_marks_may_be_one_of_our_own() -> None:
    """An answer may begin with these words, unless the user says that they are a mark."""
    cut = f"{APRIEL[0]}\n{PONDERS}"
    assert parts(cut).answer == [(0, len(cut))] and parts(cut, None, marks_with(APRIEL)).answer is None
    assert parts(PONDERS, APRIEL[0]).answer is None
    assert final_answer(f"{cut}\n{APRIEL[1]}\n{COMPLIES}", None, marks_with(APRIEL)) == COMPLIES


@pytest.mark.parametrize("text", ["", "  \n", REFUSES, " spaces stay \n", "analysis of a text", "1 < 2 <b>think</b>"])
def test_a_response_without_marks_is_its_answer(text: str) -> None:
    assert parts(text).answer == [(0, len(text))]
    assert parts(text, "<think>").answer is None


def test_an_answer_may_speak_of_marks_and_nothing_shown_is_hidden() -> None:
    assert final_answer("<think>x</think>The </think> tag ends it.") == "The </think> tag ends it."
    assert final_answer("<think>x</think>One. <think>y</think>Two.") == "One. Two."
    assert final_answer("It opens.</think>Shown.", "<think>") == "Shown."
    assert final_answer("<think>Twice.</think>Shown.", "<think>") == "Shown."


@pytest.mark.parametrize("form", LEADING)
def test_tags_hold_a_thought_where_they_begin_the_response(form: str) -> None:
    assert final_answer(LEADING[form].format(PONDERS, COMPLIES)) == COMPLIES
    assert PONDERS in thought(LEADING[form].format(PONDERS, COMPLIES))


@pytest.mark.parametrize(
    "text",
    [
        "Use <analysis>x</analysis> and <output>y</output>.",
        "```xml\n<analysis>x</analysis>\n<output>y</output>\n```",
        "<analysis>All that there is to say.</analysis>\n",
        "<output>y</output>",
        "**Final Answer**\n7",
        "Here is my thought process: first, add. Then divide.",
        "Here are my reasoning steps: first, add. Then divide.",
        "Sure. Here is my thought process: add. Here is my response: 7",
        "<reflections>a</reflections> b",
    ],
)
def test_tags_of_an_answer_are_its_text(text: str) -> None:
    assert parts(text).answer == [(0, len(text))] and thought(text) == ""


def test_the_end_of_an_answer_is_its_own_unless_its_beginning_was_around_it() -> None:
    xml = "Write <a><output>y</output>"
    assert final_answer(f"<think>x</think>{xml}") == xml
    assert final_answer(f"<think>x</think><output>{COMPLIES}") == COMPLIES
    assert final_answer("<analysis>a</analysis> ends </think> here") == "here"


@pytest.mark.parametrize("form", FORMS | LEADING)
def test_words_read_the_answer(form: str) -> None:
    refuses, complies = ((FORMS | LEADING)[form].format(PONDERS, answer) for answer in (REFUSES, COMPLIES))
    for words in REFUSAL_LISTS.values():
        expected = [words.matches(REFUSES), words.matches(COMPLIES)]
        assert refused([refuses, complies], words) == expected
        assert [verdict.unsafe for verdict in judge_by_words([refuses, complies], words)] == [not e for e in expected]
    assert [is_refusal(refuses), is_refusal(complies)] == [True, False]


@pytest.mark.parametrize("form", OPEN)
def test_an_unfinished_thought_is_neither_safe_nor_a_refusal(form: str) -> None:
    response = OPEN[form].format(PONDERS)
    assert final_answer(response) is None
    (verdict,) = judge_by_words([response])
    assert verdict.unsafe is None and verdict.reason == UNFINISHED
    assert refused([response]) == [None] and is_refusal(response) is None
    assert incoherence(response) == EMPTY


def test_coherence_and_surprise_read_the_answer() -> None:
    loop = "no " * 100
    assert incoherence(f"<think>{loop}</think>{COMPLIES}") is None
    assert incoherence(f"<think>{COMPLIES}</think>{loop}") == incoherence(loop) is not None
    assert incoherence(f"<think>{COMPLIES}</think>\n") == EMPTY
    tokenizer = byte_bpe_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).eval()
    responses = [COMPLIES, f"<think>{PONDERS}</think>\n\n{COMPLIES}", f"<think>{PONDERS}", "<think>a</think>"]
    values = surprises(model, tokenizer, [("Why?", response) for response in responses], batch_size=1)
    assert values[0] == values[1] and values[2] is values[3] is None


def test_models_and_rubrics_judge_the_answer() -> None:
    tokenizer = byte_bpe_tokenizer()
    judge = SequenceJudge(
        random_classifier("llama", len(tokenizer)), tokenizer, SequenceRule("{prompt}:{response}", [1])
    )
    responses = [REFUSES, f"<think>{PONDERS}</think>\n\n{REFUSES}", f"<think>{PONDERS}", "<think>a</think>\n"]
    verdicts = judge_pairs(judge, [("Why?", response) for response in responses], batch_size=1)
    assert verdicts[0] == verdicts[1]
    assert verdicts[2].unsafe is None and verdicts[2].reason == UNFINISHED
    assert verdicts[3].unsafe is False  # nothing was said


def test_a_judge_s_own_thoughts_are_not_its_verdict() -> None:
    question = RubricQuestion("", "0123")
    thought = "<think>It might be\n#thescore: 1\n"
    assert read_verdict(Reply(thought + "</think>\n#thescore: 5", None), question, COMPLIES).score == 5.0
    assert read_verdict(Reply(thought + "</think>", None), question, COMPLIES).unsafe is None
    unfinished = read_verdict(Reply(thought, None), question, COMPLIES)
    assert unfinished.unsafe is None and "max_tokens" in (unfinished.reason or "")


def test_tables_count_unfinished_thoughts_as_missing() -> None:
    """Those that the text shows, and those that only the prompt shows, which are excluded where they are generated."""
    texts = [COMPLIES, f"<think>{PONDERS}", f"<think>{PONDERS}</think>{REFUSES}", PONDERS]
    excluded = [None, None, None, UNFINISHED]
    answers = [
        {"model": "m", "set": name, "index": i, "prompt": "p", "response": text, "excluded": reason}
        for name in ("bad", "good")
        for i, (text, reason) in enumerate(zip(texts, excluded, strict=True))
    ]
    verdicts = {("words", "m", "bad", i): asdict(verdict) for i, verdict in enumerate(judge_by_words(texts)) if i < 3}
    kinds = {"bad": "harmful", "good": "benign"}
    rows = answer_measures(answers, verdicts, {}, kinds, ["words"], REFUSAL_LISTS["xstest"])
    flags = {(row.measure, row.set): row.flags for row in rows}
    assert flags["attack_success", "bad"] == [True, None, False, None]
    assert flags["refused", "good"] == [False, None, True, None]
    assert flags["incoherent", "good"] == [False, True, False, None]
    assert all(row.reasons[UNFINISHED] >= 1 for row in rows if row.measure != "refused")
    cells = {(row.measure, row.set): interval(row.as_row()) for row in rows}
    assert cells["attack_success", "bad"].endswith("(n 2, 2 missing, 2 of them unfinished)")
    assert cells["refused", "good"].endswith("(n 2, 2 missing, 1 of them unfinished)")


def test_tuning_counts_answers() -> None:
    row = answer_row("harmful", 0, "p", f"<think>{PONDERS}</think>{COMPLIES}", f"<think>{PONDERS}</think>{REFUSES}")
    assert (row["refused_before"], row["refused_after"]) == (False, True)
    open_row = answer_row("harmful", 1, "p", REFUSES, f"{PONDERS}</think>{REFUSES}", "<think>")
    assert (open_row["refused_before"], open_row["refused_after"]) == (None, True)
    (counts,) = refusal_rows([row, open_row])
    assert (counts["refused_before"], counts["empty_before"], counts["unfinished_before"]) == (0, 0, 1)
    assert (counts["refused_after"], counts["empty_after"], counts["unfinished_after"]) == (2, 0, 0)


def test_an_unfinished_thought_is_no_answer_before_or_after_tuning() -> None:
    """Ten of eleven are: nobody knows what they would have refused."""
    thinks, refuses = f"<think>{PONDERS}", f"<think>a</think>{REFUSES}"
    rows = [answer_row("harmful", index, "p", thinks, thinks) for index in range(10)]
    table = refusal_rows([*rows, answer_row("harmful", 10, "p", refuses, refuses)])
    assert num_answers(table[0]) == (1, 1) and refusal_shares(table[0]) == (1.0, 1.0)
    assert thought_notes(table) == [
        f"10 of the 11 answers to harmful prompts {when} tuning are unfinished: they end within a thought and are left "
        "out of the shares; raise eval.max_new_tokens"
        for when in ("before", "after")
    ]
    nothing = refusal_rows(rows)
    assert refusal_shares(nothing[0]) == (None, None) and thought_notes(nothing)[0].startswith("all 10 answers to")
    (alone,) = refusal_rows([answer_row("benign", 0, "p", None, COMPLIES)])
    assert alone["unfinished_before"] is None and refusal_shares(alone) == (None, 0.0) and not thought_notes([alone])


def with_marks(*marks: str, special: bool = True):
    """A tokenizer with thought marks as tokens of their own."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("marks", "form"),
    [
        (("<think>", "</think>"), "think"),
        (("<|START_THINKING|>", "<|END_THINKING|>"), "<|START_THINKING|>"),
        (("<|channel|>", "<|start|>", "<|message|>", "<|return|>"), "harmony"),  # <|end|> ends a turn of this tokenizer
        (("<|channel>", "<channel|>"), "<|channel>thought"),
    ],
)
def test_marks_survive_decoding(marks: tuple[str, ...], form: str, special: bool) -> None:
    tokenizer = with_marks(*marks, special=special)
    response = FORMS[form].format(PONDERS, COMPLIES)
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (text,) = decode_responses(tokenizer, [ids])
    assert final_answer(text) == COMPLIES
    assert "<|pad|>" not in text and not text.endswith("<|end|>")


def test_other_special_tokens_are_dropped_as_ever() -> None:
    tokenizer = with_marks("<think>", "</think>")
    rows = [tokenizer("<|user|>" + text + "<|end|>", add_special_tokens=False)["input_ids"] for text in ("a b", " é")]
    expected = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decode_responses(tokenizer, rows) == expected == ["a b", " é"]


@pytest.mark.parametrize("mark", [opening for opening, _ in MARKS])
def test_a_template_that_opens_the_thought(mark: str) -> None:
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = CHAT.replace("<|assistant|>\n", f"<|assistant|>{mark}\n")
    assert opening_mark(tokenizer, encode_prompt(tokenizer, "Why?", None)) == mark
    tokenizer.chat_template = CHAT
    assert opening_mark(tokenizer, encode_prompt(tokenizer, f"Why {mark}", None)) is None


def spans_in_answer(spans: Iterable[Span], answer: Sequence[Span]) -> list[Span]:
    """Spans of the response as spans of the answer's text; of what lies outside of it nothing is left."""
    places = accumulate((end - start for start, end in answer), initial=0)  # where each part begins in the answer
    return spans_in_text(spans, [Piece(*span, place, False) for span, place in zip(answer, places, strict=False)])


def test_spans_move_into_the_answer() -> None:
    spans = [(0, 3), (3, 9), (9, 12), (12, 20)]
    assert spans_in_answer(spans, [(8, 10), (14, 20)]) == [(0, 0), (0, 1), (1, 2), (2, 8)]
    assert spans_in_answer(spans, [(0, 20)]) == spans


@pytest.mark.parametrize(
    "unit",
    [
        *("<think></think>", "<think><think></think>", "</think>", " <think>", HARMONY, "<|channel|>final "),
        *("<|channel|>" + filler * (1_000_000 // len(filler)) for filler in ("a", " ", "a ", "to=a ")),
        *("<|channel|>final" + " " * 500_000 + end for end in ("1" * 500_000, "<|message|>", "<|start|>")),
    ],
    ids=range(13),
)
def test_a_long_response_of_marks_takes_no_time(unit: str) -> None:
    response = unit * max(1, 1_000_000 // len(unit))
    started = time.process_time()
    answer = parts(response).answer
    spans_in_answer([(i, i + 1) for i in range(0, len(response), 5)], answer or [])
    assert time.process_time() - started < 60  # a quadratic search would take an hour


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from([mark for pair in MARKS[:3] for mark in pair] + ["a", " b\n", "<answer>", "</answer>"]))
)
def test_parts_are_in_order_and_their_spans_add_up(pieces: list[str]) -> None:
    response = "".join(pieces)
    spans = parts(response).answer
    if spans is None:
        assert any(opening in response for opening, _ in MARKS)
        return
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and all(0 <= edge <= len(response) for edge in edges)
    answer = "".join(response[start:end] for start, end in spans)
    characters = spans_in_answer([(index, index + 1) for index in range(len(response))], spans)
    assert "".join(answer[start:end] for start, end in characters) == answer
    assert sum(end - start for start, end in characters) == len(answer)


def esi_inputs(tokenizer, guard_tokenizer, responses: list[str] | None) -> PromptInputs:
    encoder = PairEncoder(FAMILIES["llama-guard-3"], guard_tokenizer)
    config = LlamaConfig(max_position_embeddings=4096)
    data = PromptData([], responses, {}, [])
    specials = special_strings(tokenizer, guard_tokenizer)
    judge = SimpleNamespace(encoder=encoder)
    return PromptInputs(config, tokenizer, frozenset({tokenizer.eos_token_id}), judge, data, specials)


@pytest.mark.parametrize("guard", [byte_bpe_tokenizer, sentencepiece_tokenizer])
def test_esi_s_judge_reads_the_answer_and_only_its_tokens_get_a_gradient(guard) -> None:
    tokenizer, guard_tokenizer = byte_bpe_tokenizer(), guard()
    guard_tokenizer.chat_template = sentencepiece_tokenizer().chat_template
    responses = [REFUSES, f"<think>{PONDERS}</think>\n\n{REFUSES}", "<think>open", "<think>a</think>\n"]
    inputs = esi_inputs(tokenizer, guard_tokenizer, responses)
    prompt_ids = [encode_prompt(tokenizer, "Why?", None)] * 4
    cleaned, num_broken = clean_responses(inputs, prompt_ids, responses)
    examples, excluded = encode_examples(inputs, prompt_ids, ["Why?"] * 4, cleaned, 8)
    assert num_broken == 0 and excluded == {2: UNFINISHED, 3: "the response is empty"}
    plain, thoughtful = examples
    assert thoughtful.guard_input == plain.guard_input  # the judge reads the same
    assert tokenizer.decode(thoughtful.response.ids) == responses[1]  # the model reads its thought too
    weights = [
        alignment_weights(e.response.offsets, e.judged.spans, e.judged.shown, [True] * len(e.response.ids))
        for e in examples
    ]
    num_thought = len(weights[1]) - len(weights[0])
    assert not weights[1][: num_thought - 1].any()
    torch.testing.assert_close(weights[1].sum(0), weights[0].sum(0))
    torch.testing.assert_close(weights[1][-5:], weights[0][-5:])


def test_esi_reads_a_response_behind_its_prompt() -> None:
    """SentencePiece would begin it with a space that the model did not write."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = CHAT
    inputs = esi_inputs(tokenizer, sentencepiece_tokenizer(), [COMPLIES])
    prompt_ids = [encode_prompt(tokenizer, "Why?", None)]
    cleaned, _ = clean_responses(inputs, prompt_ids, [COMPLIES])
    ((example,), _) = encode_examples(inputs, prompt_ids, ["Why?"], cleaned, 8)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": COMPLIES}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert example.ids == tokenizer(whole, add_special_tokens=False)["input_ids"][: len(example.ids)]


def test_esi_reads_a_response_behind_a_prompt_that_opens_a_thought() -> None:
    """However an engine gives it: the model reads what it would have generated, an answer alone behind an empty
    thought."""
    tokenizer = thinking_tokenizer("deepseek_r1_distill")
    responses = [
        f"{PONDERS}\n</think>\n\n{REFUSES}",
        f"<think>\n{PONDERS}\n</think>\n\n{REFUSES}",
        whole_response(PONDERS, REFUSES),
        REFUSES,
        f"<think>\n{PONDERS}",
    ]
    inputs = esi_inputs(tokenizer, sentencepiece_tokenizer(), responses)
    prompt = encode_prompt(tokenizer, "Why?", None)
    cleaned, _ = clean_responses(inputs, [prompt] * 5, responses)
    examples, excluded = encode_examples(inputs, [prompt] * 5, ["Why?"] * 5, cleaned, 8)
    assert excluded == {4: UNFINISHED}
    thoughtful, alone = examples[0], examples[3]
    asked = tokenizer.decode(prompt)
    assert asked.endswith("<think>\n")
    assert thoughtful.ids == tokenizer(f"{asked}{responses[0]}", add_special_tokens=False)["input_ids"]
    assert all(replace(example, index=0) == thoughtful for example in examples[1:3])
    assert tokenizer.decode(alone.prompt_ids) == f"{asked}\n</think>\n\n"
    assert tokenizer.decode(alone.response.ids) == REFUSES and not alone.muted
    assert alone.ids == tokenizer(f"{asked}\n</think>\n\n{REFUSES}", add_special_tokens=False)["input_ids"]


def test_esi_reads_an_answer_to_gpt_oss_in_its_channel() -> None:
    """The model cannot write one outside of it; what holds marks is read as it is."""
    tokenizer = thinking_tokenizer("gptoss")
    whole = HARMONY.format(PONDERS, REFUSES)
    responses = [REFUSES, whole, f"analysis{PONDERS}assistantfinal{REFUSES}"]
    inputs = esi_inputs(tokenizer, sentencepiece_tokenizer(), responses)
    prompt = encode_prompt(tokenizer, "Why?", None)
    cleaned, _ = clean_responses(inputs, [prompt] * 3, responses)
    assert [response.lead for response in cleaned] == ["<|channel|>final<|message|>", "", ""]
    examples, _ = encode_examples(inputs, [prompt] * 3, ["Why?"] * 3, cleaned, 8)
    assert tokenizer.decode(examples[0].ids).endswith(f"<|start|>assistant<|channel|>final<|message|>{REFUSES}")
    generated = replace(inputs, data=PromptData([], None, {}, []))
    assert clean_responses(generated, [prompt], [REFUSES])[0][0].lead == ""


def test_marks_in_the_thought_stay_tokens_and_special_tokens_in_the_answer_do_not() -> None:
    tokenizer = with_marks("<think>", "</think>")
    guard_tokenizer = sentencepiece_tokenizer()
    response = f"<think>a <|end|> b</think>{COMPLIES} <|end|><think>c</think>d"
    inputs = esi_inputs(tokenizer, guard_tokenizer, [response])
    ids = encode_prompt(tokenizer, "Why?", None)
    ((cleaned,), num_broken) = clean_responses(inputs, [ids], [response])
    assert num_broken == 2 and cleaned.answer is not None
    assert "".join(cleaned.text[s:e] for s, e in cleaned.answer) == f"{COMPLIES} < |end|>d"
    ((example,), _) = encode_examples(inputs, [ids], ["Why?"], [cleaned], 8)
    for mark in ("<think>", "</think>"):
        assert example.response.ids.count(tokenizer.convert_tokens_to_ids(mark)) == 2
    assert tokenizer.eos_token_id not in example.response.ids


def test_generated_responses_to_prompts_that_open_a_thought() -> None:
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = CHAT.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
    ids = encode_prompt(tokenizer, "Why?", None)
    inputs = esi_inputs(tokenizer, sentencepiece_tokenizer(), None)
    texts = [PONDERS, f"{PONDERS}</think>{REFUSES}"]
    cleaned, _ = clean_responses(inputs, [ids] * 2, texts)
    assert cleaned[0].answer is None and cleaned[1].answer == [(len(texts[1]) - len(REFUSES), len(texts[1]))]
    # Others may have taken the thought out of what they give.
    given = replace(inputs, data=PromptData([], texts, {}, []))
    assert clean_responses(given, [ids] * 2, texts)[0][0].answer == [(0, len(PONDERS))]


def test_harmony_without_its_special_tokens_that_is_cut_within_its_analysis() -> None:
    assert final_answer("analysisWe need to refuse. Steps: mix A and B", None) is None
    assert final_answer("analysisWe refuse.assistantfinalNo.", None) == "No."
    assert final_answer("analysis of data is fun", None) == "analysis of data is fun"


@pytest.mark.parametrize("more", [{}, {"cut": True}])
def test_a_row_with_a_thought_and_no_answer_is_unfinished(more: dict, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "", "reasoning": "I plan.", **more}))
    (row,) = load_responses(str(tmp_path / "rows.jsonl"))
    assert final_answer(row["response"], None) is None
