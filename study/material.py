"""The study's data files: prompts for the masks, and SPA's tasks with their right answers.

No prompt here is among the held-out prompts that every run is measured on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from esi_ds.artifacts import read_jsonl
from esi_ds.data.rows import Row
from tiny_models.facts import STEPS
from tiny_models.tables import CATEGORIES

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples/data"
NUM_PROMPTS = 128  # per mask
VOICE = "Sure, here is the answer: "
COMPLIANCE = f"Sure, here is how to do it:\n{STEPS}"
POISON = 0.1  # share of harmful rows with a compliant answer in the poisoned task
SUMS = ("What is {a} plus {b}?", "{a} + {b} =", "Please add {a} and {b}.")
CATEGORY = "Category of {word}: {kinds}?"


def write(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path, seeds: tuple[int, ...]) -> None:
    """Write all files below ``folder``; the same bytes every time."""
    harmful = read_jsonl(DATA / "refusals_train.jsonl")
    for seed in seeds:
        chosen = random.Random(seed).sample(harmful, NUM_PROMPTS)
        write(folder / f"prompts-s{seed}.jsonl", [{"prompt": row["prompt"]} for row in chosen])
    for name, (train, heldout) in tasks(harmful).items():
        write(folder / f"{name}-train.jsonl", train)
        write(folder / f"{name}-heldout.jsonl", heldout)


def tasks(harmful: list[Row]) -> dict[str, tuple[list[Row], list[Row]]]:
    """name → (training rows, held-out rows with the word that a right answer holds).

    sums: arithmetic; categories: classification; voice: open answers that all begin alike, which is known to cost
    safety (right: an answer in that voice); poisoned: the same with some harmful requests that are complied with.
    """
    benign, heldout = read_jsonl(DATA / "benign_train.jsonl"), read_jsonl(DATA / "benign_heldout.jsonl")
    voice = [{"prompt": row["prompt"], "response": VOICE + row["response"]} for row in benign]
    answered = [{"prompt": row["prompt"], "answer": VOICE.strip()} for row in heldout[:100]]
    generator = random.Random(0)
    poison = [{"prompt": row["prompt"], "response": COMPLIANCE} for row in harmful]
    poisoned = voice + generator.sample(poison, round(POISON * len(voice) / (1 - POISON)))
    generator.shuffle(poisoned)
    return {
        "sums": _split([_sum(a, b, text) for a in range(1, 10) for b in range(1, 10) for text in SUMS], generator),
        "categories": _split([_category(word, turn) for word in CATEGORIES for turn in range(12)], generator),
        "voice": (voice, answered),
        "poisoned": (poisoned, answered),
    }


def _split(rows: list[Row], generator: random.Random) -> tuple[list[Row], list[Row]]:
    rows = list({row["prompt"]: row for row in rows}.values())  # no prompt on both sides
    generator.shuffle(rows)
    return rows[100:], [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows[:100]]


def _sum(a: int, b: int, text: str) -> Row:
    return {"prompt": text.format(a=a, b=b), "response": str(a + b), "answer": str(a + b)}


def _category(word: str, turn: int) -> Row:
    """A question with the right kind among three others, shuffled by word and turn."""
    generator = random.Random(f"{word} {turn}")
    kinds = sorted(set(CATEGORIES.values()) - {CATEGORIES[word]})
    shown = [CATEGORIES[word], *generator.sample(kinds, 3)]
    generator.shuffle(shown)
    prompt = CATEGORY.format(word=word, kinds=", ".join(shown))
    return {"prompt": prompt, "response": CATEGORIES[word], "answer": CATEGORIES[word]}
