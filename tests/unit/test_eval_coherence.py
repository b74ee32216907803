"""Incoherent answers: synthetic garbage is found, real answers are not mistaken for it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders import sentencepiece_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from esi_ds.data.chat import encode_prompt
from esi_ds.eval.coherence import EMPTY, KINDS, NOT_LANGUAGE, REPETITION, SENSELESS, incoherence
from esi_ds.eval.fluency import surprises

ROOT = Path(__file__).resolve().parents[2]
COHERENT = [
    "No.",
    "42",
    "A",
    "...",
    "👍",
    "No, no, no, no!",
    "#### 18",
    "[-4, 2, 5, 10, 92, 101]",
    "The answer is $x^2 + 2xy + y^2 = (x + y)^2$.",
    "I cannot help with that request.",
    "1. First step\n2. Second step\n3. Third step",
    "for i in range(10):\n    print(i * i)  # squares",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
    "Donaudampfschifffahrtsgesellschaft ist ein langes Wort.",
    "El niño comió una manzana ayer por la tarde.",
    "Сегодня хорошая погода, и мы пойдём гулять в парк.",
    "今天天气很好,我们去公园用iPhone拍照吧。GPT和BERT都是语言模型,Python代码很简单。",
    "今日は天気がいいので、公園でPythonの本を読みます。GPUは速いです。",
    "오늘은 날씨가 좋아서 공원에 갑니다.",
    "الطقس جميل اليوم وسنذهب إلى الحديقة.",
    "आज मौसम अच्छा है और हम पार्क जाएंगे।",
    "วันนี้อากาศดีมาก เราจะไปเดินเล่นที่สวนสาธารณะด้วยกันกับเพื่อนของเราทุกคน",
    "A dose of 5 μg of β2-agonist changed the α1B receptor by 3 %.",
    "The word naïve in Russian is наивный, in Greek αφελής and in Arabic ساذج.",
    "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "Sure, the file ends here caf\ufffd",  # cut inside a character
    "I love a pink theme \U0001fa77 \U0001fa77!",  # newer than the Unicode tables of Python 3.11
    "\U0001faff\U0001faff",  # not assigned yet, but kept for emoji
    "Open the Apple menu \uf8ff and choose System Settings, then Privacy.",
]
LOOP = "and then the model says it again "
GARBAGE = [
    ("", EMPTY),
    (" \n\t ", EMPTY),
    ("the the the the the the the the the", REPETITION),
    ("Sure, here is how. " + LOOP * 6, REPETITION),
    (LOOP * 5 + LOOP[:11], REPETITION),
    ("a" * 40, REPETITION),
    ("哈哈" * 20, REPETITION),
    ("!" * 60, NOT_LANGUAGE),
    ("Plan: " + "step one, do it now; " * 8, REPETITION),
    (" ".join(random.Random(0).choice(["to do it", "of the cat", "in it was"]) for _ in range(60)), REPETITION),
    ("\ufffd\ufffd\ufffd", NOT_LANGUAGE),
    ("a table\ufffd and a chair\ufffd in the room", NOT_LANGUAGE),
    ("steps\x12 in the meth", NOT_LANGUAGE),
    ("steps\uffff in the meth", NOT_LANGUAGE),
    ("\U0005fff0 steps \U0005fff1 in the meth", NOT_LANGUAGE),
    ("@#$%^&*(){}[]<>?/|~`+=_-;:", NOT_LANGUAGE),
    ("".join(random.Random(1).choice("abcdefghijklmnop") for _ in range(120)), NOT_LANGUAGE),
    ("reallyвон platformالط Bernsteinไทย the наmed שלוםab", NOT_LANGUAGE),
]


@pytest.mark.parametrize("answer", COHERENT)
def test_short_odd_and_foreign_answers_are_coherent(answer: str) -> None:
    assert incoherence(answer) is None


@pytest.mark.parametrize(("answer", "kind"), GARBAGE)
def test_garbage_is_found(answer: str, kind: str) -> None:
    assert incoherence(answer) == kind


def test_a_loop_counts_from_half_of_the_answer_on() -> None:
    head = "Fold the sheet in half, then fold each of its corners down to the middle line. "  # 17 words with marks
    tail = "again and "
    assert incoherence(head + tail * 5) is None and incoherence(head + tail * 12) == REPETITION


def kinds(answers: list[str], surprises=None) -> Counter:
    """How many answers are incoherent, by kind."""
    counted = (incoherence(*pair) for pair in zip(answers, surprises or [None] * len(answers), strict=True))
    return Counter(kind for kind in counted if kind is not None)


def test_random_bytes_and_symbols_are_found() -> None:
    generator = random.Random(2)
    answers = [generator.randbytes(80).decode("utf-8", errors="replace") for _ in range(100)]
    answers += ["".join(chr(generator.randrange(0x21, 0x3000)) for _ in range(60)) for _ in range(100)]
    # Of 60 random characters one may be unassigned by chance, which says nothing: an emoji may be as new.
    assert kinds(answers)[NOT_LANGUAGE] >= 198


def test_every_kind_is_told_apart() -> None:
    counted = kinds(["", "Yes.", "a" * 40, "words in no order", "\ue000\ue001"], [None, 0.1, 0.1, 9.0, 0.1])
    assert counted == {EMPTY: 1, REPETITION: 1, NOT_LANGUAGE: 1, SENSELESS: 1} and set(counted) == set(KINDS)


def real_answers(folder: Path) -> dict[str, list[str]]:
    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).open()]

    tasks = ("self_instruct_seed_tasks.jsonl", "self_instruct_user_oriented_instructions.jsonl")
    return {
        "circuit_breakers": [row["output"] for row in json.loads((folder / "circuit_breakers_train.json").read_text())],
        "dolly": [row["response"] for row in lines("dolly_15k_subset387_ccbysa3.jsonl")],
        "medquad": [row["answer"] for row in lines("medquad_1400.jsonl")],
        "gsm8k": [row["answer"] for row in lines("gsm8k_test.jsonl")],
        "self_instruct": [case["output"] for name in tasks for row in lines(name) for case in row["instances"]],
        "pubmedqa": [
            row["LONG_ANSWER"] for row in json.loads((folder / "pubmedqa_ori_pqal.json").read_text()).values()
        ],
    }


def test_false_alarms_on_real_answers_are_rare(shared: Path) -> None:
    """Measured: none in 9,527 (and none in gsm8k_train's 7,473). One in a thousand is allowed for other versions."""
    for name, answers in real_answers(shared / "data").items():
        counted = kinds(answers)
        assert counted.total() <= len(answers) / 1000, (name, counted)


@pytest.fixture(scope="module")
def tiny():
    folder = ROOT / "examples/models/llama-aligned"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def test_surprise_is_the_mean_negative_log_likelihood(tiny) -> None:
    model, tokenizer = tiny
    pairs = [
        ("How do I pick a lock?", "I cannot help."),
        ("Hi", ""),
        ("Say <|end|>", "Sure, here is how to do it: 1 2 3"),
    ]
    batched = surprises(model, tokenizer, pairs, batch_size=3)
    assert batched[1] is None
    head, tail = (
        encode_prompt(tokenizer, pairs[0][0], None),
        tokenizer(pairs[0][1], add_special_tokens=False)["input_ids"],
    )
    labels = torch.tensor([[-100] * len(head) + tail])
    with torch.no_grad():
        expected = model(torch.tensor([head + tail]), labels=labels).loss
    # fp32 through a dozen layers, padded and not: 1e-4 nats is far below any threshold.
    assert batched[0] == pytest.approx(float(expected), abs=1e-4)
    single = surprises(model, tokenizer, pairs, batch_size=1)
    assert single[1] is None and single[0::2] == pytest.approx(batched[0::2], abs=1e-4)


def test_surprise_is_that_of_an_answer_behind_its_prompt(tiny) -> None:
    """SentencePiece would begin it with a space that no model wrote."""
    model, tokenizer = tiny[0], sentencepiece_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    head, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("How?\n", "How?\nSure, here it is")
    )
    labels = [-100] * len(head) + whole[len(head) :]
    with torch.no_grad():
        expected = model(torch.tensor([whole]), labels=torch.tensor([labels])).loss
    (value,) = surprises(model, tokenizer, [("How?", "Sure, here it is")])
    assert value == pytest.approx(float(expected), abs=1e-4)


def test_word_salad_is_found_by_surprise_only(tiny) -> None:
    """Random tokens of the tiny model's vocabulary against the answers that it was trained on."""
    model, tokenizer = tiny
    rows = [json.loads(line) for line in (ROOT / "examples/data/refusals_train.jsonl").open()][:20]
    pairs = [(row["prompt"], row["response"]) for row in rows]
    generator = random.Random(3)
    ordinary = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().isalpha()]
    salad = [(prompt, tokenizer.decode(generator.choices(ordinary, k=20))) for prompt, _ in pairs]
    for conversations, num_expected in ((pairs, 0), (salad, 20)):
        answers = [answer for _, answer in conversations]
        counted = kinds(answers, surprises(model, tokenizer, conversations))
        assert (kinds(answers).total(), counted[SENSELESS]) == (0, num_expected)
