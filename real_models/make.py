"""Make the real models: python -m real_models.make --output runs/real-models --data ../shared/data

The base model comes from the package registry and answers the prompts. The twin is tuned and answers too, and the
judges learn from all answers. Then everything is measured, and cards and figures.json are written. If the command is
killed, give it again: it continues from the last batch of answers or the last checkpoint. Another seed, other sizes or
other data need another folder. Delete figures.json to measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from esi_ds.artifacts import jsonl, write_json_atomic, write_text_atomic
from esi_ds.errors import UserError, ends_with_message
from esi_ds.reading import first_line, reading

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
    parser.add_argument("--threads", type=int, default=None, help="threads of the CPU (every core)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (0)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of rows, for quick trials")
    return parser.parse_args(argv)


def other_sources(listed: list[str]) -> dict[str, str]:
    """NAME=PATH as a table. Raises UserError for a name that is not a set's."""
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
        """Do a step and add its wall and CPU seconds. ``starts`` is counted beforehand: with more than one, the seconds
        are those of the last start and of earlier steps alone, since a kill leaves none."""
        phase = {"wall_s": 0.0, "cpu_s": 0.0, "starts": 0} | self.phases.get(name, {})
        self.phases[name] = {**phase, "starts": phase["starts"] + 1}
        write_json_atomic(self._phases_file, self.phases)
        wall, cpu = time.monotonic(), time.process_time()
        result = work()
        seconds = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
        self.phases[name] |= {key: round(phase[key] + value, 1) for key, value in seconds.items()}
        write_json_atomic(self._phases_file, self.phases)
        return result

    def model(self, name: str, work: Callable[[], Any]) -> None:
        """Make a model's folder unless it is there; a folder is whole or not there."""
        if not (self.output / name).is_dir():
            self.timed(name, work)
            shutil.rmtree(self.output / "checkpoints" / name, ignore_errors=True)

    def answers(self, model: str, sets: tuple[str, ...]) -> Answers:
        """A model's answers to sets of prompts."""
        from real_models.answers import answer_all, answers_in, read_answers

        file = self.output / "answers" / f"{model}.jsonl"
        file.parent.mkdir(exist_ok=True)
        prompts = self.material.asked(sets)
        result = answers_in(read_answers(file), prompts)
        if result is None:
            ask = partial(answer_all, self.output / model, file, prompts, self.device)
            result = self.timed(f"answers of {model}", ask)
        return result

    def run(self) -> dict[str, Any]:
        """All steps; the figures."""
        from real_models import pairs
        from real_models.answers import without_refusals
        from real_models.convert import make_base
        from real_models.judges import make_judge
        from real_models.measure import measure
        from real_models.recipe import BASE, CLASSIFIER, GUARD, JUDGE_SETS, PROMPT_SETS, SET_SETS, TWIN, TWIN_SETS
        from real_models.twin import make_twin

        output, material, settings, device = self.output, self.material, self.settings, self.device
        self.model(BASE, lambda: make_base(output / "downloads", output / BASE))
        base = self.answers(BASE, (*PROMPT_SETS, "easy"))
        self.model(TWIN, lambda: make_twin(output, material, base, settings, device))
        twin = self.answers(TWIN, TWIN_SETS)
        base |= self.answers(BASE, JUDGE_SETS)
        harmless = [*base["harmless_train"], *self.answers(BASE, SET_SETS)["lookalikes_more"]]  # many look harmful
        rows = ({"prompt": prompt, "response": answer} for prompt, answer in without_refusals(harmless))
        write_text_atomic(output / "answers/harmless.jsonl", jsonl(rows))
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


def check(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be."""
    import torch

    if not args.scale > 0 or (args.threads is not None and args.threads < 1):
        option, value = ("--scale", args.scale) if not args.scale > 0 else ("--threads", args.threads)
        raise UserError(option, value, "is not positive", "leave it out for the whole recipe on every core")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        others = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise UserError("--device", args.device, f"cannot be used: {first_line(error)}", f"take {others}") from error


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Raises UserError where another process makes models in the folder, or where nobody may write."""
    with reading("--output", output, "give a folder that you may write to", "cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            problem, remedy = "is being filled by another process", "wait for it, or give another folder"
            raise UserError("--output", output, problem, remedy) from None
    try:
        yield
    finally:
        lock.release()


def make(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Make, measure and describe everything in ``args.output``, unless it is done; the goals. Raises UserError."""
    import torch
    from transformers import logging

    from esi_ds.versions import versions
    from real_models.cards import write_cards
    from real_models.recipe import Settings, Sizes, material, record
    from real_models.sources import Data

    check(args)
    logging.set_verbosity_error()  # a judge is a part of the base: a table of the layers left out says nothing new
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    data = Data(args.data, other_sources(args.source))
    data.check()
    settings = Settings(Sizes().scaled(args.scale) if args.scale != 1.0 else Sizes(), args.seed)
    texts, file = material(data, settings), args.output / "figures.json"
    with only_one(args.output):
        recipe = record(args.output, settings, texts)
        if not file.exists():
            making = Making(args.output, texts, settings, args.device)
            measured = making.run()
            facts = {"seed": args.seed, "versions": versions(), "hardware": hardware(args.device)}
            figures = {**facts, "phases": making.phases, **recipe, **measured}
            write_cards(args.output, figures)
            write_json_atomic(file, figures)  # last: with it all is done
    listed: list[dict[str, Any]] = json.loads(file.read_text())["goals"]
    return listed


@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """Make everything and print which goals are met; the exit code, 2 for a mistake of the user's."""
    args = parse(argv)
    for goal in make(args):
        kind = "at least" if goal["at_least"] else "at most"
        measured = "nothing" if goal["measured"] is None else f"{goal['measured']:.3f}"
        print(f"{'met' if goal['is_met'] else 'MISSED'}: {goal['name']}: {measured}, {kind} {goal['limit']}")
    print(f"models, cards and figures.json: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
