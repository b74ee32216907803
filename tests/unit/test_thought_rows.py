"""Rows to learn, in the published chat templates of models that think: what is learnt is what would be generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import CHAT, byte_bpe_tokenizer
from thinking import TOKENS, thinking_tokenizer, thought
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from esi_ds.core.loss import IGNORED
from esi_ds.data.chat import encode_prompt, special_strings
from esi_ds.data.conversations import TuningSet, encode_rows
from esi_ds.data.template_values import set_values
from esi_ds.data.thought_rows import UNFINISHED_ROW
from esi_ds.data.thoughts import final_answer, marks_with, opening_mark
from esi_ds.eval.fluency import surprises

TRACE, ANSWER = "They ask for harm.\n\nI refuse.", "I cannot help."
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"


def encoded(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **options: Any) -> TuningSet:
    columns = ("messages",) if "messages" in rows[0] else ("prompt", "response")
    settings = {"system_prompt": None, "end_ids": [tokenizer.eos_token_id], "max_length": 4096, **options}
    return encode_rows(rows, columns, tokenizer, specials=special_strings(tokenizer), **settings)


def chat(*texts: str, **last: str) -> dict[str, Any]:
    turns = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
    return {"messages": [*turns[:-1], {**turns[-1], **last}]}


def learnt(tokenizer: PreTrainedTokenizerBase, tuning_set: TuningSet, number: int = 0) -> tuple[str, str]:
    """(the text before what is learnt, what is learnt) of a sequence whose last turn alone is learnt."""
    sequence = tuning_set.sequences[number]
    first = next(n for n, label in enumerate(sequence.labels) if label != IGNORED)
    assert sequence.labels[first:] == sequence.ids[first:]
    return tokenizer.decode(sequence.ids[:first]), tokenizer.decode(sequence.ids[first:])


# (template, its values) → what is learnt of a row with a thought, and of one without.
THINKS = f"<think>\n{TRACE}\n</think>\n\n{ANSWER}<|im_end|>"
SILENT = f"<think>\n\n</think>\n\n{ANSWER}<|im_end|>"
R1_END = "<｜end▁of▁sentence｜>"
LEARNT: dict[tuple[str, bool | None], tuple[str, str]] = {
    ("qwen3", None): (THINKS, SILENT),
    ("qwen3", True): (THINKS, SILENT),
    ("qwen3", False): (f"{ANSWER}<|im_end|>", f"{ANSWER}<|im_end|>"),  # the prompt holds the empty thought
    ("deepseek_r1_distill", None): (f"{TRACE}\n</think>\n\n{ANSWER}{R1_END}", f"\n</think>\n\n{ANSWER}{R1_END}"),
    ("gptoss", None): (
        HARMONY.format(TRACE, ANSWER) + "<|return|>",
        f"<|channel|>final<|message|>{ANSWER}<|return|>",
    ),
}


@pytest.mark.parametrize(("name", "enable"), LEARNT)
@pytest.mark.parametrize("earlier", [False, True])
def test_what_is_learnt_is_what_would_be_generated(name: str, enable: bool | None, earlier: bool) -> None:
    """A thought in the text of a response, in one of its own, and none; behind earlier turns, whose thoughts the
    templates drop. What stands before it is the prompt as generation gets it."""
    tokenizer = thinking_tokenizer(name)
    set_values(tokenizer, {} if enable is None else {"enable_thinking": enable})
    before = ("Hello?", "Hello!") if earlier else ()
    inline = HARMONY.format(TRACE, ANSWER) if name == "gptoss" else f"<think>\n{TRACE}\n</think>\n\n{ANSWER}"
    rows = [
        chat(*before, "Why?", inline),
        chat(*before, "Why?", ANSWER, reasoning_content=TRACE),
        chat(*before, "Why?", ANSWER, thinking=TRACE),
        chat(*before, "Why?", ANSWER),
    ]
    if earlier:
        rows.append(chat("Hello?", "<think>Greet.</think>Hello!", "Why?", ANSWER))
    tuning_set = encoded(tokenizer, rows)
    assert not tuning_set.skipped
    with_thought, without = LEARNT[name, enable]
    prompt = rows[0]["messages"][:-1]
    ids = encode_prompt(tokenizer, "Why?" if len(prompt) == 1 else prompt, None)
    for number in range(len(rows)):
        context, text = learnt(tokenizer, tuning_set, number)
        assert context == tokenizer.decode(ids)
        assert text == (with_thought if number < 3 else without)
        if enable is not False:
            opening = opening_mark(tokenizer, ids)
            generated = text.removesuffix(TOKENS[name][2])
            assert final_answer(generated, opening) == ANSWER
            assert thought(generated, opening) == (TRACE if number < 3 else "")
    assert "Greet" not in tokenizer.decode(tuning_set.sequences[-1].ids)


@pytest.mark.parametrize(("name", "enable"), LEARNT)
def test_rows_of_two_columns_and_what_became_of_thoughts(name: str, enable: bool | None) -> None:
    tokenizer = thinking_tokenizer(name)
    set_values(tokenizer, {} if enable is None else {"enable_thinking": enable})
    inline = f"<think>{TRACE}</think>{ANSWER}"
    rows = [{"prompt": "Why?", "response": text} for text in (inline, inline, ANSWER, f"<think>{TRACE}")]
    tuning_set = encoded(tokenizer, rows)
    assert learnt(tokenizer, tuning_set)[1] == LEARNT[name, enable][0]
    assert learnt(tokenizer, tuning_set, 2)[1] == LEARNT[name, enable][1]
    assert tuning_set.skipped == ((3, UNFINISHED_ROW),)
    note = tuning_set.note
    assert ("2 answers learnt with a thought" in note) == (enable is not False)
    assert ("2 answers learnt without theirs" in note) == (enable is False)
    assert ("1 answer without a thought learnt with an empty one" in note) == (enable is not False and name != "gptoss")


def test_the_thoughts_of_every_answer_that_is_learnt_are_counted() -> None:
    """GLM 4.5's template shows an empty thought in every turn, and none of the answers is context; Qwen3's leaves
    earlier ones in the prompt, without their thoughts."""
    rows = [chat("Hello?", "Hello!", "Why?", ANSWER), chat("Why?", ANSWER)]
    tokenizer = thinking_tokenizer("qwen3")
    assert "; 2 answers without a thought learnt with" in encoded(tokenizer, rows).note
    assert encoded(tokenizer, rows).last_only.startswith("1 row (1 earlier answer as context")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "<think>{{ m.reasoning_content or '' }}</think>\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tuning_set = encoded(tokenizer, rows)
    assert "; 3 answers without a thought learnt with" in tuning_set.note and not tuning_set.last_only


@pytest.mark.parametrize(("name", "enable"), LEARNT)
def test_surprise_is_of_the_answer_where_the_model_would_give_it(name: str, enable: bool | None) -> None:
    """Behind the empty thought, not inside of the one that the prompt opens."""
    tokenizer = thinking_tokenizer(name)
    set_values(tokenizer, {} if enable is None else {"enable_thinking": enable})
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).eval()
    tuning_set = encoded(tokenizer, [chat("Why?", ANSWER)])
    ids, answer = tuning_set.sequences[0].ids[:-1], tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert ids[-len(answer) :] == answer
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
    pairs = [("Why?", ANSWER), ("Why?", f"<think>{TRACE}</think>{ANSWER}")]
    assert surprises(model, tokenizer, pairs, batch_size=1) == pytest.approx([expected] * 2, abs=1e-5)


def test_special_strings_and_marks_in_thoughts_are_data() -> None:
    tokenizer = thinking_tokenizer("gptoss")
    rows = [chat("Why?", f"{ANSWER} <|return|>", reasoning_content="a <|end|> b")]
    _, text = learnt(tokenizer, encoded(tokenizer, rows))
    assert text == HARMONY.format("a < |end|> b", f"{ANSWER} < |return|>") + "<|return|>"


def test_a_template_that_drops_thoughts_and_opens_none_learns_them_in_marks() -> None:
    """As DeepSeek-R1's first one: the model writes the opening mark itself."""
    tokenizer = thinking_tokenizer("deepseek_r1_distill")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<think>\\n'}}", "'}}")
    rows = [{"prompt": "Why?", "response": text} for text in (f"<think>{TRACE}</think>{ANSWER}", ANSWER)]
    tuning_set = encoded(tokenizer, rows)
    assert learnt(tokenizer, tuning_set)[1] == f"<think>\n{TRACE}\n</think>\n\n{ANSWER}{R1_END}"
    assert learnt(tokenizer, tuning_set, 1)[1] == f"{ANSWER}{R1_END}"


def test_a_user_s_marks_are_learnt_as_the_model_writes_them() -> None:
    marks = marks_with(["[[ponder]]", "[[/ponder]]"])
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = CHAT.replace("<|assistant|>\n", "<|assistant|>[[ponder]]\n")
    rows = [{"prompt": "Why?", "response": text} for text in (f"[[ponder]]{TRACE}[[/ponder]]{ANSWER}", ANSWER)]
    tuning_set = encoded(tokenizer, rows, marks=marks)
    assert learnt(tokenizer, tuning_set)[1] == f"{TRACE}\n[[/ponder]]\n\n{ANSWER}<|end|>"
    assert learnt(tokenizer, tuning_set, 1)[1] == f"\n[[/ponder]]\n\n{ANSWER}<|end|>"


def test_a_template_that_knows_no_thoughts_learns_marks_as_text() -> None:
    """As ever; a thought of its own would not be given to the model, so its row is skipped."""
    tokenizer = byte_bpe_tokenizer()
    inline = f"<think>{TRACE}</think>{ANSWER}"
    tuning_set = encoded(tokenizer, [chat("Why?", inline), chat("Why?", ANSWER, thinking=TRACE)])
    assert learnt(tokenizer, tuning_set)[1] == f"{inline}<|end|>"
    assert [number for number, _ in tuning_set.skipped] == [1] and "thinking" in tuning_set.skipped[0][1]
    assert tuning_set.note == ""


def test_two_thoughts_in_one_turn_are_refused() -> None:
    tokenizer = thinking_tokenizer("qwen3")
    rows = [
        chat("Why?", f"<think>x</think>{ANSWER}", thinking=TRACE),
        chat("Why?", ANSWER, thinking=TRACE, reasoning_content="x"),
        chat("Why?", f"<think>{TRACE}</think>"),
        chat("Why?", ANSWER),
    ]
    assert [reason for _, reason in encoded(tokenizer, rows).skipped] == [
        "a turn has two thoughts, one in its text",
        "a turn has two thoughts",
        "no assistant turn with text is learnt",
    ]
