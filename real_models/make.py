"""Make the real models: python -m real_models.make --output runs/real-models --data ../shared/data

The base model comes from the package registry. It answers the prompts; the twin is tuned and answers too; the judges
learn from all answers; everything is measured, and cards and figures.json are written. Each step is done once: a start
after a kill goes on where the last one stopped, within a training from its checkpoint, within answers from the last
batch. Another seed, other sizes or other data want another folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esi_ds.errors import UserError

if TYPE_CHECKING:
    from real_models.answers import Answers
    from real_models.recipe import Material, Settings

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_DATA = ROOT.parent / "shared/data"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; parsed before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/real-models", help="folder of models and answers")
    parser.add_argument(
        "--data",
        type=Path,
        default=DEFAULT_DATA if DEFAULT_DATA.is_dir() else None,
        help="folder of the data sets' files (default: ../shared/data, if there; else the hub)",
    )
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=PATH", help="another file or hub id for one set"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda ...")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU (default: every core)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of rows, for quick trials")
    return parser.parse_args(argv)


def other_sources(listed: list[str]) -> dict[str, str]:
    """NAME=PATH as a table. Raises UserError for a name that is no set."""
    from real_models.sources import SOURCES

    pairs = dict(text.partition("=")[::2] for text in listed)
    for name, path in pairs.items():
        if name not in SOURCES or not path:
            raise UserError("--source", f"{name}={path}", "is not NAME=PATH", f"NAME is one of {', '.join(SOURCES)}")
    return pairs


class Making:
    """The steps in their order; ``phases`` has the seconds of those done in this or an earlier start."""

    def __init__(self, output: Path, material: Material, settings: Settings, device: str):
        self.output, self.material, self.settings, self.device = output, material, settings, device
        self._phases_file = output / "phases.json"
        self.phases: dict[str, Any] = json.loads(self._phases_file.read_text()) if self._phases_file.exists() else {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a step and add its wall and CPU seconds; what a kill cut off is not counted."""
        from esi_ds.artifacts import write_json_atomic

        wall, cpu = time.monotonic(), time.process_time()
        result = work()
        before = self.phases.get(name, {"wall_s": 0.0, "cpu_s": 0.0, "starts": 0})
        seconds = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu, "starts": 1}
        self.phases[name] = {key: round(before[key] + value, 1) for key, value in seconds.items()}
        write_json_atomic(self._phases_file, self.phases)
        return result

    def model(self, name: str, work: Callable[[], Any]) -> None:
        """Make a model's folder unless it is there; a folder is whole or not there."""
        if not (self.output / name).is_dir():
            self.timed(name, work)
            shutil.rmtree(self.output / "checkpoints" / name, ignore_errors=True)

    def answers(self, model: str, sets: tuple[str, ...]) -> Answers:
        """A model's answers to sets of prompts."""
        from real_models.answers import answer_all

        file = self.output / "answers" / f"{model}.jsonl"
        file.parent.mkdir(exist_ok=True)
        prompts = self.material.asked(sets)
        result: Answers = self.timed(
            f"answers of {model}", lambda: answer_all(self.output / model, file, prompts, self.device)
        )
        return result

    def run(self) -> dict[str, Any]:
        """All steps; the figures."""
        from real_models import pairs
        from real_models.convert import make_base
        from real_models.judges import make_judge
        from real_models.measure import measure
        from real_models.recipe import BASE, CLASSIFIER, GUARD, PROMPT_SETS, TWIN
        from real_models.twin import make_twin

        output, material, settings, device = self.output, self.material, self.settings, self.device
        self.model(BASE, lambda: make_base(output / "downloads", output / BASE))
        base = self.answers(BASE, (*PROMPT_SETS, "easy"))
        self.model(TWIN, lambda: make_twin(output, material, base, settings, device))
        twin = self.answers(TWIN, ("own_refusals", "attacks_heldout", "advbench", "xstest_safe"))
        texts = pairs.texts_of("train", material, base, twin)
        judged = pairs.pairs_to_learn(texts, settings.sizes.judged_train, settings.seed)
        for name in (CLASSIFIER, GUARD):
            self.model(name, partial(make_judge, name, output, judged, settings, device))
        answers = {BASE: base, TWIN: twin}
        figures: dict[str, Any] = self.timed("measuring", lambda: measure(output, material, answers, settings, device))
        return figures


def hardware(device: str) -> dict[str, Any]:
    """Where it was made."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": device, "name": name, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}


def make(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Make, measure and describe everything in ``args.output``; the goals. Raises UserError."""
    import torch

    from esi_ds.artifacts import versions, write_json_atomic
    from real_models.cards import write_cards
    from real_models.recipe import Settings, Sizes, material, record
    from real_models.sources import Data

    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    data = Data(args.data, other_sources(args.source))
    data.check()
    settings = Settings(Sizes().scaled(args.scale) if args.scale != 1.0 else Sizes(), args.seed)
    texts = material(data, settings)
    recipe = record(args.output, settings, texts)
    making = Making(args.output, texts, settings, args.device)
    figures = making.run()
    facts = {"seed": args.seed, "versions": versions(), "hardware": hardware(args.device), "phases": making.phases}
    figures = {**facts, **recipe, **figures}
    write_json_atomic(args.output / "figures.json", figures)
    write_cards(args.output, figures)
    listed: list[dict[str, Any]] = figures["goals"]
    return listed


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 with a message for a mistake of the user's. A goal that is missed is printed."""
    args = parse(argv)
    try:
        goals = make(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for goal in goals:
        kind = "at least" if goal["at_least"] else "at most"
        measured = "nothing" if goal["measured"] is None else f"{goal['measured']:.3f}"
        print(f"{'met' if goal['is_met'] else 'MISSED'}: {goal['name']}: {measured}, {kind} {goal['limit']}")
    print(f"models, cards and figures.json: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
