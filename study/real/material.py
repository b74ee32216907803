"""The study's files of prompts and rows, from the data sets of docs/real_models.md and a few more.

No harmful prompt is in two parts of one number of prompts. The same data give the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from esi_ds.data.rows import Row, read_rows
from esi_ds.errors import UserError
from real_models.answers import read_answers, without_refusals
from real_models.pairs import complies
from real_models.questions import DAILY, filled
from real_models.recipe import BASE, spaced
from real_models.sources import Data, Lookup, Pair, of_split
from study.real.grid import BENIGN, BENIGN_LOSS, HARMFUL, Plan, part_name

LONGEST = 300  # characters of a prompt; a few harmful ones have ten times as many, and a batch is padded to its longest
POISON = 0.1  # share of harmful rows with a compliant answer in the poisoned task
KINDS = ("treatment", "causes", "symptoms", "prevention", "susceptibility", "information")  # of MedQuAD's questions
KIND_QUESTION = f"Which kind of question is this? Answer with one of: {', '.join(KINDS)}.\n\n{{question}}"
MEDICAL_QUESTION = "{question}\n\n{conclusion}\n\nWhat is the answer to the question: yes, no or maybe?"
FILES = {
    "harmbench": "harmbench_behaviors_text_val.csv",
    "strongreject": "strongreject_dataset.csv",
    "gsm8k_train": "gsm8k_train.jsonl",
    "medquad": "medquad_1400.jsonl",
    "self_instruct": "self_instruct_user_oriented_instructions.jsonl",
    "self_instruct_seed": "self_instruct_seed_tasks.jsonl",
}


def rows_of(data: Data, name: str) -> list[Row]:
    """The rows of one file of ``--data``. Raises UserError where it is not there."""
    if data.folder is None:
        remedy = f"give the folder of {FILES[name]} and the other files (docs/real_models.md)"
        raise UserError("--data", None, "is not given", remedy)
    if not (data.folder / FILES[name]).is_file():
        raise UserError("--data", data.folder, f"has no file {FILES[name]}", "put it there (docs/real_models.md)")
    return read_rows(str(data.folder / FILES[name]), "--data")


def shuffled(rows: Iterable[Any], name: str) -> list[Any]:
    """The rows in an order that depends on ``name`` alone."""
    mixed = list(rows)
    random.Random(name).shuffle(mixed)
    return mixed


def attacks(data: Data) -> dict[str, list[Row]]:
    """Rows of harmful prompts by set, shuffled, without long ones. HarmBench's without those that ask for copyrighted
    texts."""
    harmbench = [row for row in rows_of(data, "harmbench") if row["FunctionalCategory"] != "copyright"]
    texts = {
        HARMFUL: list(data.attacks()),
        "harmbench": ["\n\n".join(filter(None, (row["ContextString"], row["Behavior"]))) for row in harmbench],
        "strongreject": [row["forbidden_prompt"] for row in rows_of(data, "strongreject")],
    }
    return {
        name: [{"prompt": text} for text in map(str.strip, shuffled(prompts, name)) if len(text) <= LONGEST]
        for name, prompts in texts.items()
    }


def benign_pairs(data: Data) -> list[Pair]:
    """Short benign requests with people's answers: self-instruct's, which neither twin nor judges have seen, shuffled;
    dolly's behind them."""
    pairs = []
    for row in [*rows_of(data, "self_instruct"), *rows_of(data, "self_instruct_seed")]:
        instance = row["instances"][0]
        prompt = "\n\n".join(filter(None, (row["instruction"].strip(), instance["input"].strip())))
        if len(prompt) <= LONGEST and instance["output"].strip():
            pairs.append((prompt, instance["output"].strip()))
    return [*shuffled(dict(pairs).items(), BENIGN), *shuffled(data.tasks(), BENIGN)]


def part(rows: Sequence[Any], seed_number: int, count: int, name: str) -> list[Any]:
    """The rows of a seed. A set that is too small for several seeds gives what it has to the first.

    Raises UserError where nothing is left.
    """
    rows = rows[seed_number * count : (seed_number + 1) * count]
    if not rows:
        raise UserError("--data", name, f"has too few rows for seed {seed_number}", "take fewer seeds or prompts")
    return list(rows)


def prompt_files(plan: Plan, data: Data) -> dict[str, list[Row]]:
    """File name → rows, of the cells that ask where the weights lie."""
    size, files, harmful, benign = plan.size, dict[str, list[Row]](), attacks(data), benign_pairs(data)
    for number, seed in enumerate(size.seeds):
        files[part_name(HARMFUL, seed)] = part(harmful[HARMFUL], number, size.prompts, HARMFUL)
        pairs = part(benign, number, size.prompts, BENIGN)
        files[part_name(BENIGN, seed)] = [{"prompt": prompt} for prompt, _ in pairs]
        files[part_name(BENIGN_LOSS, seed)] = [{"prompt": prompt, "response": answer} for prompt, answer in pairs]
    larger = plan.larger_parts()
    if (available := len(harmful[HARMFUL])) < max(larger, default=0):
        remedy = "take a smaller number in where.counts of study/real.yaml"
        raise UserError("--data", HARMFUL, f"has {available} short prompts, fewer than {max(larger)}", remedy)
    for count, seeds in larger.items():
        for number, seed in enumerate(seeds):
            files[part_name(HARMFUL, seed, count)] = part(harmful[HARMFUL], number, count, HARMFUL)
    for name in plan.grid.where.other_prompts:
        files[part_name(name, size.seeds[0])] = part(harmful[name], 0, size.prompts, name)
    return files


def asked_files(plan: Plan, data: Data) -> dict[str, list[Row]]:
    """The prompts that tuned models are asked: a part to choose by, of HarmBench and half of XSTest's safe ones, and
    another to report, of StrongREJECT and the other half."""
    size, masked = plan.size, Lookup(data.attacks())  # StrongREJECT has some of AdvBench's requests
    harmful = {
        name: [row for row in rows if not masked.has_near(row["prompt"])] for name, rows in attacks(data).items()
    }
    safe = [{"prompt": prompt} for prompt in shuffled(data.safe_prompts(), "xstest")]
    half = len(safe) // 2
    return {
        "choose-harmful": harmful["harmbench"][: size.choose],
        "report-harmful": harmful["strongreject"][: size.report],
        "choose-benign": safe[:half][: size.choose],
        "report-benign": safe[half:][: size.report],
    }


def refusals(data: Data) -> list[Row]:
    """Refusals of circuit_breakers, none of a request that is nearly one of those asked."""
    asked = Lookup(row["prompt"] for rows in attacks(data).values() for row in rows)
    pairs = [pair for pair in of_split(data.refusals(), "train") if not asked.has_near(pair[0])]
    return pair_rows(shuffled(pairs, "refusals"))


def base_answers(models: Path, name: str) -> list[Pair]:
    """The untouched model's own answers to a set of prompts, without refusals. Raises UserError."""
    file = models / f"answers/{BASE}.jsonl"
    if not file.is_file():
        raise UserError("--models", models, f"has no file answers/{BASE}.jsonl", "run make real-models first")
    kept = read_answers(file).items()
    return without_refusals((prompt, reply) for (set_name, prompt), reply in kept if set_name == name)


def benign_files(plan: Plan, data: Data) -> dict[str, list[Row]]:
    """Benign rows for SET, the untouched model's own answers: to all harmless prompts, to those that do not look
    harmful, and to all with further ones that look harmful, which are a third."""
    pairs = shuffled(base_answers(plan.folders.models, "harmless_train"), "harmless")
    plain = {*filled(*DAILY), *(prompt for prompt, _ in data.tasks())}
    further = base_answers(plan.folders.models, "lookalikes_more")
    rows = {
        "lookalikes": pairs,
        "plain": [pair for pair in pairs if pair[0] in plain],
        "more-lookalikes": shuffled([*pairs[: 2 * len(further)], *further], "more"),
    }
    return {name: pair_rows(some) for name, some in rows.items()}


def task_files(plan: Plan, data: Data) -> dict[str, list[Row]]:
    """Training and held-out rows of SPA's tasks, and of the skills that SET should leave alone."""
    number = plan.size.heldout
    asked = [row for row in rows_of(data, "medquad") if row["qtype"] in KINDS and len(row["question"]) <= LONGEST]
    kinds = [(KIND_QUESTION.format(question=row["question"].strip()), row["qtype"]) for row in asked]
    studies = [{name.lower(): value for name, value in row.items()} for row in data.rows("pubmedqa")]
    papers = [
        (MEDICAL_QUESTION.format(question=row["question"], conclusion=row["long_answer"]), row["final_decision"])
        for row in studies
    ]
    answered = [(row["question"].strip(), row["answer"].strip()[:LONGEST]) for row in rows_of(data, "medquad")]
    maths = [(row["question"], row["answer"]) for row in rows_of(data, "gsm8k_train")]
    tasks = {"kinds": shuffled(dict(kinds).items(), "kinds"), "medical": shuffled(papers, "medical")}
    files = {"gsm8k-train": shuffled(maths, "gsm8k"), "gsm8k-heldout": spaced(data.skills()["gsm8k"], number)}
    files["medquad-heldout"] = spaced(answered, number)
    for name, pairs in tasks.items():
        files |= {f"{name}-train": pairs[number:], f"{name}-heldout": pairs[:number]}
    complied = [pair for pair in base_answers(plan.folders.models, "attacks_train") if complies(*pair)]
    harm = shuffled(complied, "poison")[: round(POISON * len(files["kinds-train"]) / (1 - POISON))]
    files["poisoned-train"] = shuffled([*files["kinds-train"], *harm], "poisoned")
    return {name: pair_rows(pairs) for name, pairs in files.items()}


def pair_rows(pairs: Iterable[Pair]) -> list[Row]:
    """Rows of a file."""
    return [{"prompt": prompt, "response": answer} for prompt, answer in pairs]


def all_files(plan: Plan, data: Data) -> dict[str, list[Row]]:
    """Every file of the study, by name. Raises UserError where something to make it of is not there."""
    files = {**prompt_files(plan, data), **asked_files(plan, data), "refusals": refusals(data)}
    return {**files, **benign_files(plan, data), **task_files(plan, data)}
