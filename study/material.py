"""The study's data files: prompts for the masks, and SPA's tasks with their right answers.

No prompt here is among the held-out prompts that every run is measured on.
"""

from __future__ import annotations

import random
from pathlib import Path

from esi_ds.artifacts import jsonl, read_jsonl, write_text_atomic
from esi_ds.data.rows import Row
from esi_ds.errors import UserError
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


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    """Write a study's files, name → rows. Raises UserError, and writes none, where one is there that holds other rows:
    finished cells have read it."""
    texts = {folder / f"{name}.jsonl": jsonl(rows) for name, rows in files.items()}
    for file, text in texts.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            remedy = "give another --output, or the data and settings that its cells were run with"
            raise UserError("--output", file, "holds rows other than the current ones", remedy)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        if not file.exists():
            write_text_atomic(file, text)


def all_files(seeds: tuple[int, ...]) -> dict[str, list[Row]]:
    """Every file of the study, by name; the same rows every time."""
    harmful, files = read_jsonl(DATA / "refusals_train.jsonl"), dict[str, list[Row]]()
    for seed in seeds:
        chosen = random.Random(seed).sample(harmful, NUM_PROMPTS)
        files[f"prompts-s{seed}"] = [{"prompt": row["prompt"]} for row in chosen]
    for name, (train, heldout) in tasks(harmful).items():
        files |= {f"{name}-train": train, f"{name}-heldout": heldout}
    return files


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
