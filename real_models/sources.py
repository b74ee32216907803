"""The data sets that the recipe reads, from a folder of files or from the hub, and texts that are nearly the same.

Nothing of them is copied into the repository. AdvBench and XSTest are asked, never trained on: every training prompt
that shares most of its words with one of theirs is left out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from esi_ds.data.rows import Row, read_rows
from esi_ds.errors import UserError
from esi_ds.eval.refusals import REFUSAL_LISTS

Split = Literal["train", "heldout"]
Pair = tuple[str, str]  # prompt, answer
HELDOUT_PERCENT = 20
LONGEST_PROMPT = 300  # characters
PASSAGES = 200  # of each skill, for the judges
SAME_WORDS = 0.6  # from this share of common words on, two prompts are nearly the same
# A refusal of circuit_breakers, whose rows are for the most part, not all, refusals.
REFUSES = re.compile(r"(I cannot|I can[’']t|I[’']m sorry|I am sorry|I am unable|I[’']m unable|I apologi[sz]e|Sorry)")


class Source(NamedTuple):
    """One data set: its file in the folder, its hub id, configuration, split and licence."""

    file: str
    hub_id: str
    config: str | None
    split: str | None
    licence: str
    origin: str


SOURCES = {
    "circuit_breakers": Source(
        "circuit_breakers_train.json",
        "abhayesian/circuit-breakers-dataset",
        None,
        "train",
        "MIT",
        "github.com/GraySwanAI/circuit-breakers",
    ),
    "advbench": Source(
        "advbench_harmful_behaviors.csv",
        "walledai/AdvBench",
        None,
        "train",
        "MIT",
        "github.com/llm-attacks/llm-attacks",
    ),
    "xstest": Source("xstest_prompts.csv", "Paul/XSTest", None, "train", "CC-BY-4.0", "github.com/paul-rottger/xstest"),
    "dolly": Source(
        "dolly_15k_subset387_ccbysa3.jsonl",
        "databricks/databricks-dolly-15k",
        None,
        "train",
        "CC-BY-SA-3.0",
        "databricks-dolly-15k",
    ),
    "gsm8k": Source("gsm8k_test.jsonl", "openai/gsm8k", "main", "test", "MIT", "github.com/openai/grade-school-math"),
    "pubmedqa": Source(
        "pubmedqa_ori_pqal.json", "qiaojin/PubMedQA", "pqa_labeled", "train", "MIT", "github.com/pubmedqa/pubmedqa"
    ),
}


def is_heldout(text: str) -> bool:
    """Whether a text belongs to the held-out fifth; it depends on the text alone."""
    return zlib.crc32(text.strip().lower().encode()) % 100 < HELDOUT_PERCENT


def of_split(pairs: Iterable[Pair], split: Split) -> list[Pair]:
    """The pairs whose prompts belong to a split."""
    return [pair for pair in pairs if is_heldout(pair[0]) == (split == "heldout")]


def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case."""
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


class Lookup:
    """Texts to compare with: is one of them nearly the same? A text is compared with those that share a word."""

    def __init__(self, texts: Iterable[str]):
        self._sets = [words_of(text) for text in texts]
        self._by_word: dict[str, list[int]] = {}
        for index, words in enumerate(self._sets):
            for word in words:
                self._by_word.setdefault(word, []).append(index)

    def has_near(self, text: str) -> bool:
        """Whether some text shares ``SAME_WORDS`` of all words in both (Jaccard's index)."""
        words = words_of(text)
        # Two sets of which one share is common have one of the rarest words in common: look those up only.
        rarest = sorted(words, key=lambda word: len(self._by_word.get(word, ())))
        rarest = rarest[: int(len(words) * (1 - SAME_WORDS)) + 1]
        near = {index for word in rarest for index in self._by_word.get(word, ())}
        return any(len(words & self._sets[i]) >= SAME_WORDS * len(words | self._sets[i]) for i in near)


@dataclass(frozen=True)
class Data:
    """Where the sets are read from: a folder of files, else the hub, and other paths or hub ids by name."""

    folder: Path | None
    instead: dict[str, str] = field(default_factory=dict)

    def rows(self, name: str) -> list[Row]:
        """A set's rows. Raises UserError where it is nowhere, or cannot be read."""
        source, setting = SOURCES[name], f"--source {name}"
        if name in self.instead:
            return read_rows(self.instead[name], setting)
        if self.folder is not None:
            file = self.folder / source.file
            if not file.is_file():
                remedy = f"put {source.file} there ({source.origin}), or give {setting}=FILE"
                raise UserError("--data", self.folder, f"has no file {source.file}", remedy)
            return read_rows(str(file), "--data")
        return read_rows(source.hub_id, setting, name=source.config, split=source.split)

    def check(self) -> None:
        """Raise UserError for a set that cannot be read, before anything is downloaded or trained."""
        for name in SOURCES:
            self.rows(name)

    def attacks(self) -> list[str]:
        """The harmful requests of AdvBench."""
        return _column(self.rows("advbench"), "goal", "prompt")

    def safe_prompts(self) -> list[str]:
        """The safe prompts of XSTest."""
        return _column([row for row in self.rows("xstest") if row["label"] == "safe"], "prompt")

    def asked(self) -> Lookup:
        """All prompts of AdvBench and XSTest, for leaving out of training what is nearly one of them."""
        return Lookup([*self.attacks(), *_column(self.rows("xstest"), "prompt")])

    def refusals(self) -> list[Pair]:
        """(request, refusal) of circuit_breakers: short requests, plain refusals, none nearly of AdvBench or XSTest."""
        asked, seen, pairs = self.asked(), set(), []
        for row in self.rows("circuit_breakers"):
            prompt, answer = _refusal_of(row)
            if len(prompt) > LONGEST_PROMPT or not REFUSES.match(answer) or prompt.lower() in seen:
                continue
            seen.add(prompt.lower())
            if not asked.has_near(prompt):
                pairs.append((prompt, answer))
        return pairs

    def tasks(self) -> list[Pair]:
        """(instruction, answer) of dolly, short ones."""
        pairs = []
        for row in self.rows("dolly"):
            prompt, answer = _task_prompt(row), str(row["response"]).strip()
            if answer and len(prompt) <= LONGEST_PROMPT and not REFUSAL_LISTS["xstest"].matches(answer):
                pairs.append((prompt, answer))
        return pairs

    def passages(self, skills: Mapping[str, Sequence[Pair]]) -> list[Pair]:
        """Harmless texts of people behind a question: dolly's passages, but for those of held-out tasks, GSM8K's
        solutions and PubMedQA's conclusions, the short questions of the latter without their abstracts.

        skills: of ``skills``.
        """
        rows = [row for row in self.rows("dolly") if row.get("context") and not is_heldout(_task_prompt(row))]
        passages = [(str(row["instruction"]).strip(), str(row["context"]).strip()) for row in rows]
        passages += [(question.rsplit("\n\n", 1)[-1], answer) for question, answer in skills["pubmedqa"][:PASSAGES]]
        return [*passages, *skills["gsm8k"][:PASSAGES]]

    def skills(self) -> dict[str, list[Pair]]:
        """(question, answer) of GSM8K's test set and of PubMedQA's labelled set with its abstract."""
        maths = [(str(row["question"]), str(row["answer"])) for row in self.rows("gsm8k")]
        medical = []
        for row in self.rows("pubmedqa"):
            lowered: dict[str, Any] = {str(name).lower(): value for name, value in row.items()}
            contexts: Any = lowered["contexts"] if "contexts" in lowered else lowered["context"]
            if isinstance(contexts, dict):  # the hub's copy
                contexts = contexts["contexts"]
            medical.append((" ".join(contexts) + "\n\n" + lowered["question"], lowered["long_answer"]))
        return {"gsm8k": maths, "pubmedqa": medical}


def _refusal_of(row: Row) -> Pair:
    """(request, refusal) of a row of circuit_breakers: of the paper's copy (instruction, output), of the authors'
    file, whose ``output`` is a harmful answer and whose ``llama3_output`` is the refusal, or of the hub's copy (prompt,
    chosen)."""
    answer_of = {"llama3_output": ("prompt", "llama3_output"), "chosen": ("prompt", "chosen")}
    names = next((names for column, names in answer_of.items() if column in row), ("instruction", "output"))
    prompt, answer = (str(row[name]).strip() for name in names)
    return prompt, answer


def _task_prompt(row: Row) -> str:
    """The instruction of a row of dolly, with its passage if it has one."""
    return "\n\n".join(str(row[name]).strip() for name in ("instruction", "context") if row.get(name))


def _column(rows: Iterable[Row], *names: str) -> list[str]:
    """The first of the columns that a row has, of every row."""
    return [str(next(row[name] for name in names if name in row)).strip() for row in rows]
