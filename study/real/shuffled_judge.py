"""The judge of the control: the classifier of `make real-models`, trained on some of its pairs with labels in a random
order.

python -m study.real.shuffled_judge --models runs/real-models --data ../shared/data --output FOLDER --draw 1

Every draw has the same pairs, and labels, a new head and an order of rows of its own. Draw 0 takes the models' seed, so
that its head begins as the classifier's did, and hardly leaves it: the two judges are not independent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from esi_ds.errors import UserError, ends_with_message
from real_models.answers import answers_in, read_answers
from real_models.judges import make_judge
from real_models.pairs import JudgedPair, pairs_to_learn, texts_of
from real_models.recipe import (
    BASE,
    CLASSIFIER,
    JUDGE_SETS,
    PROMPT_SETS,
    TWIN,
    TWIN_SETS,
    Settings,
    Sizes,
    material,
)
from real_models.sources import Data


def settings_of(models: Path) -> Settings:
    """The settings that the models were made with. Raises UserError."""
    file = models / "recipe.json"
    if not file.is_file():
        raise UserError("--models", models, "holds no recipe.json", "run make real-models first")
    stored = json.loads(file.read_text())["settings"]
    return Settings(**{**stored, "sizes": Sizes(**stored["sizes"])})


def judged_pairs(models: Path, data: Data, settings: Settings) -> list[JudgedPair]:
    """The pairs that the judges of ``models`` have learnt, from the answers kept there. Raises UserError."""
    texts = material(data, settings)
    answers = []
    for model, sets in ((BASE, (*PROMPT_SETS, *JUDGE_SETS)), (TWIN, TWIN_SETS)):
        kept = answers_in(read_answers(models / f"answers/{model}.jsonl"), texts.asked(sets))
        if kept is None:
            problem, remedy = f"lacks answers of {model}", "run make real-models first, with the same --data"
            raise UserError("--models", models, problem, remedy)
        answers.append(kept)
    return pairs_to_learn(texts_of("train", texts, *answers), settings.sizes.judged_train, settings.seed)


def with_shuffled_labels(pairs: list[JudgedPair], seed: int) -> list[JudgedPair]:
    """The same pairs and as many unsafe ones, but which they are is drawn."""
    labels = [pair.unsafe for pair in pairs]
    random.Random(f"{seed} labels").shuffle(labels)
    return [pair._replace(unsafe=label) for pair, label in zip(pairs, labels, strict=True)]


@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """Train the judge unless it is there; a killed training goes on at its last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draw", type=int, default=0, help="of labels, head and order, from 0 on")
    args = parser.parse_args(argv)
    if args.draw < 0:
        raise UserError("--draw", args.draw, "is negative", "count draws from 0 on")
    if (args.output / CLASSIFIER).is_dir():
        return 0
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = settings_of(args.models)
    pairs = judged_pairs(args.models, Data(args.data), settings)
    # There is nothing to learn: as many pairs as the guard's show it.
    drawn = replace(settings, seed=settings.seed + args.draw)
    pairs = with_shuffled_labels(pairs[: round(settings.guard_share * len(pairs))], drawn.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / BASE).exists():  # make_judge takes the base's lowest layers from beside its output
        (args.output / BASE).symlink_to((args.models / BASE).resolve())
    loss = make_judge(CLASSIFIER, args.output, pairs, drawn, args.device)
    print(f"mean loss of the last tenth of the steps: {loss:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
