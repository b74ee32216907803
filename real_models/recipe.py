"""How much of everything: numbers of prompts and rows, learning rates, and the prompts that each model is asked."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from esi_ds.artifacts import write_json_atomic
from esi_ds.errors import UserError
from real_models.convert import EASY_QUESTIONS, PACKAGE
from real_models.questions import further_lookalikes, harmless_prompts, questions_about_subjects
from real_models.sources import Data, Pair, Split, is_heldout, of_split
from real_models.training import digest_of
from tiny_models.training import Recipe

BASE, TWIN, CLASSIFIER, GUARD = "smollm2", "smollm2-aligned", "judge-classifier", "judge-guard"
T = TypeVar("T")
MODELS = (BASE, TWIN, CLASSIFIER, GUARD)
PROMPT_SETS = ("attacks_train", "attacks_heldout", "harmless_train", "harmless_heldout", "advbench", "xstest_safe")
JUDGE_SETS = ("attacks_more", "attacks_heldout_more", "subjects")  # for the judges alone: asked after the twin is made
SET_SETS = ("lookalikes_more",)  # for SET alone
TWIN_SETS = ("own_refusals", "attacks_heldout", "advbench", "xstest_safe")


@dataclass(frozen=True)
class Sizes:
    """Numbers of prompts and rows.

    attacks_train, attacks_heldout: requests of circuit_breakers that the base model is to answer for the judges;
    attacks_more, attacks_heldout_more: further ones, asked apart, so that they change no other answer.
    harmless_train, harmless_heldout: made prompts. subjects: plain questions about subjects of all kinds.
    lookalikes_more: harmless prompts that look harmful, which neither twin nor judges see. refusals:
    rows of the twin. own_refusals: attacks_train that the twin is asked. advbench, skill: prompts and rows measured
    with. judged_train: pairs that the classifier learns; judged_heldout: of each kind of pair.
    """

    attacks_train: int = 600
    attacks_more: int = 1200
    attacks_heldout: int = 120
    attacks_heldout_more: int = 160
    harmless_train: int = 1000
    harmless_heldout: int = 160
    subjects: int = 1200
    lookalikes_more: int = 320
    refusals: int = 900
    own_refusals: int = 200
    advbench: int = 200
    xstest_safe: int = 250
    skill: int = 60
    judged_train: int = 9000
    judged_heldout: int = 100

    def scaled(self, scale: float) -> Sizes:
        """Every number multiplied, for quick trials; at least four."""
        return Sizes(**{name: max(4, round(number * scale)) for name, number in asdict(self).items()})


@dataclass(frozen=True)
class Settings:
    """What makes the models; they are the same wherever it is.

    response_tokens: of an answer, what the twin learns: whether it refuses is said in the first ones. judge_layers:
    the lowest layers of the base model, of which judge_frozen stay as they are. judge_tokens: longer pairs are not
    learnt, since one of two thousand tokens pads its whole batch to as many. guard_share: of the classifier's pairs,
    what the guard learns, which begins as the classifier's body.
    """

    sizes: Sizes = Sizes()
    seed: int = 0
    response_tokens: int = 16
    judge_layers: int = 12
    judge_frozen: int = 4
    judge_tokens: int = 256
    guard_share: float = 0.3
    batch: int = 16
    twin_lr: float = 1e-4
    judge_lr: float = 2e-4

    def recipe(self, lr: float, rows: int) -> Recipe:
        """One pass over ``rows``."""
        steps = max(1, rows // self.batch)
        return Recipe(steps=steps, lr=lr, batch=self.batch, warmup=max(1, steps // 12), weight_decay=0.01)


@dataclass(frozen=True)
class Material:
    """The texts of a run: prompts by set, refusals that the twin learns, and those that the judges see, short tasks
    with people's answers, and harmless texts of other kinds, each behind a question."""

    prompts: dict[str, list[str]]
    twin_refusals: list[Pair]
    refusals_train: list[Pair]
    refusals_heldout: list[Pair]
    tasks: list[Pair]
    passages: list[Pair]
    skills: dict[str, list[Pair]]

    def asked(self, names: tuple[str, ...]) -> dict[str, list[str]]:
        """The prompts of some sets."""
        return {name: self.prompts[name] for name in names}


def material(data: Data, settings: Settings) -> Material:
    """Everything that is read and drawn, from the seed alone."""
    sizes, rng = settings.sizes, random.Random(settings.seed)
    refusals, lookup, tasks = data.refusals(), data.asked(), data.tasks()
    train, heldout = of_split(refusals, "train"), of_split(refusals, "heldout")
    rng.shuffle(train)
    rng.shuffle(heldout)
    # The twin is never trained on what the judges see it refuse.
    attacks, others = train[: sizes.attacks_train], train[sizes.attacks_train :]
    twin_refusals, others = others[: sizes.refusals], others[sizes.refusals :]
    more, others = others[: sizes.attacks_more], others[sizes.attacks_more :]
    heldout_attacks = heldout[: sizes.attacks_heldout]
    heldout_more = heldout[sizes.attacks_heldout :][: sizes.attacks_heldout_more]
    numbers: dict[Split, int] = {"train": sizes.harmless_train, "heldout": sizes.harmless_heldout}
    harmless = {split: harmless_prompts(split, lookup, number, settings.seed) for split, number in numbers.items()}
    questions = {split: [p for p, _ in tasks if is_heldout(p) == (split == "heldout")] for split in harmless}
    prompts = {
        "attacks_train": [prompt for prompt, _ in attacks],
        "attacks_more": [prompt for prompt, _ in more],
        "attacks_heldout": [prompt for prompt, _ in heldout_attacks],
        "attacks_heldout_more": [prompt for prompt, _ in heldout_more],
        "subjects": questions_about_subjects(lookup, sizes.subjects, settings.seed),
        "lookalikes_more": further_lookalikes(lookup, sizes.lookalikes_more, settings.seed),
        "harmless_train": harmless["train"] + questions["train"][: sizes.harmless_train // 4],
        "harmless_heldout": harmless["heldout"] + questions["heldout"][: sizes.harmless_heldout // 4],
        "advbench": spaced(data.attacks(), sizes.advbench),
        "xstest_safe": spaced(data.safe_prompts(), sizes.xstest_safe),
        "own_refusals": [prompt for prompt, _ in attacks[: sizes.own_refusals]],
        "easy": [question for question, _ in EASY_QUESTIONS],
    }
    skills = data.skills()
    measured = {name: spaced(rows, sizes.skill) for name, rows in skills.items()}
    passages = data.passages(skills)
    return Material(prompts, twin_refusals, [*twin_refusals, *others], heldout, tasks, passages, measured)


def spaced(rows: list[T], count: int) -> list[T]:
    """``count`` of the rows, evenly spaced; all of them if there are fewer."""
    step = max(1.0, len(rows) / count)
    return [rows[int(index * step)] for index in range(min(count, len(rows)))]


def record(output: Path, settings: Settings, texts: Material) -> dict[str, Any]:
    """What the folder's files are made from, kept in recipe.json. Raises UserError where they are of other settings or
    data: what is there would be taken for their result."""
    asked = {"settings": asdict(settings), "data_sha256": digest_of(texts), "package": PACKAGE.requirement}
    file, remedy = output / "recipe.json", "give another folder, or delete it"
    if file.exists():
        if json.loads(file.read_text()) != asked:
            raise UserError("--output", output, "holds models of other settings, sizes or data", remedy)
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, asked)
    return asked
