"""Run by the tests beside it under a launcher: one process group scores many models, guards and batch sizes.

argv: a JSON list of cases {"name", "config" (mapping), "poison" (optional), "error" (optional), "wrong_fisher"
(optional), "export" (optional), "frees" (optional), "killed_at" (optional), "killed_in" (optional), "stopped_in"
(optional)}; each case writes
<output_dir>/scores and <output_dir>/mask through the stage itself, without report, and with export <output_dir>/model;
with frees the stage must free all memory. killed_at is a criterion whose mask the first attempt dies at, killed_in an
objective in whose pass it dies, after a micro-batch, stopped_in one in whose pass the last rank gets a SIGTERM; a
second one goes on. poison
{"gradient" | "score": index} makes one prompt's gradient or judge score not finite, {"tuning" | "benign": row} one
row's gradient, {"silence": true} makes every row's gradient zero; error is a text that the UserError the case must end
in holds. wrong_fisher squares after the reduction, which is the mistake that the tests must notice. Grouped
products leave garbage in the gradients of experts without tokens. In every case the judge must be freed before weights
are selected.
"""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import ask_each_model_once, frees_all, replace, run_cases, take_a_second
from idle_kernels import spoil_kernels
from transformers import AutoTokenizer

from esi_ds.artifacts import RunFolder
from esi_ds.config import validate
from esi_ds.core.mask import Mask
from esi_ds.core.surrogate import estimate
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import Interrupted, UserError
from esi_ds.judge.guard import Guard, Judgement, WholeWeights
from esi_ds.models.folder import ModelSource
from esi_ds.options import Options
from esi_ds.stages import interrupt
from esi_ds.stages import run as stage_run
from esi_ds.stages.esi import finish, masks, objectives, score
from esi_ds.stages.esi import work as esi_work
from esi_ds.stages.esi.objectives import MeanLoss, SquaredRowGradients
from esi_ds.stages.esi.prepare import encode_examples, prepare
from esi_ds.stages.esi.score import ScoringPass
from esi_ds.stages.esi.work import EsiRun
from esi_ds.tensor_files import tensor_folders
from esi_ds.zero import gradients, routing, runtime
from esi_ds.zero.engine import load_sharded
from esi_ds.zero.export import export_model
from esi_ds.zero.files import write_mask
from esi_ds.zero.gradients import GradientShards, SquaredGradientShards

plain_judge = Guard.judge
plain_totals = {"tuning": MeanLoss.total, "benign": SquaredRowGradients.total}
plain_methods = {name: SquaredGradientShards.__dict__[name] for name in ("contribution", "norm_squared")}


def check_mask_reading(folder: Path, ranks: int) -> None:
    """Every rank reads its own part of the mask and nothing else; together the parts are the mask."""
    for path in [folder / "mask" / name for name in tensor_folders(folder / "mask")] or [folder / "mask"]:
        mask = Mask.load(path)
        for name in mask.names:
            size = -(-mask.numel(name) // ranks)
            low = min(runtime.rank() * size, mask.numel(name))
            high = min(low + size, mask.numel(name))
            assert torch.equal(mask.bits(name, low, high), mask.bits(name)[low:high])


def poisoned(poison: dict[str, int]) -> None:
    """Replace the functions that could bring in what is not finite by ones that do."""

    def bad_estimate(*arguments, **options):
        value, gradient = estimate(*arguments, **options)
        if options["prompt_index"] == poison.get("gradient"):
            gradient = torch.full_like(gradient, torch.inf)
        return value, gradient

    def bad_encode(*arguments):
        examples, excluded = encode_examples(*arguments)
        bad = [example.guard_input for example in examples if example.index == poison.get("score")]

        def judge(self, inputs, device):
            judgements = plain_judge(self, inputs, device)
            return [
                Judgement(float("nan"), judgement.gradient) if any(entry is one for one in bad) else judgement
                for entry, judgement in zip(inputs, judgements, strict=True)
            ]

        Guard.judge = judge
        return examples, excluded

    def bad_total(name: str):
        def total(self, losses, examples):
            guilty = any(example.row == poison.get(name) for example in examples)
            factor = 0.0 if poison.get("silence") else torch.inf if guilty else 1.0
            return plain_totals[name](self, losses, examples) * factor

        return total

    objectives.estimate, esi_work.encode_examples = bad_estimate, bad_encode
    for name, objective in (("tuning", MeanLoss), ("benign", SquaredRowGradients)):
        if name in poison or "silence" in poison:
            objective.total = bad_total(name)


def unpoisoned() -> None:
    objectives.estimate, esi_work.encode_examples, Guard.judge = estimate, encode_examples, plain_judge
    MeanLoss.total, SquaredRowGradients.total = plain_totals["tuning"], plain_totals["benign"]
    for name, method in plain_methods.items():
        setattr(SquaredGradientShards, name, method)
    SquaredGradientShards.receive = GradientShards.receive


def square_after_the_reduction() -> None:
    SquaredGradientShards.contribution = lambda self, gradient: gradient
    SquaredGradientShards.receive = lambda self, parameter, local: GradientShards.receive(
        self, parameter, local.square()
    )


class Killed(Exception):
    """Stands for a kill: nothing of the run catches it."""


def kill_at(criterion: str, start: Callable[[], None]) -> None:
    """A first attempt that dies on all ranks before a criterion's mask is written."""

    def dying(folder: Path, *arguments) -> None:
        if folder.name == criterion:
            raise Killed
        write_mask(folder, *arguments)

    masks.write_mask = dying
    try:
        start()
    except Killed:
        return
    finally:
        masks.write_mask = write_mask
    raise AssertionError(f"no mask of {criterion} was to be written")


def kill_in(name: str, start: Callable[[], None]) -> None:
    """A first attempt that dies on all ranks in the second micro-batch of an objective's pass."""
    plain_step = ScoringPass._step

    def dying(self: ScoringPass) -> int:
        if self.objective.name == name and self.state.position > 0:
            raise Killed
        return plain_step(self)

    ScoringPass._step = dying
    try:
        start()
    except Killed:
        return
    finally:
        ScoringPass._step = plain_step
    raise AssertionError(f"the pass of {name} had no second micro-batch")


def stop_in(name: str, first: EsiRun, second: EsiRun) -> None:
    """A SIGTERM on the last rank in the first micro-batch of an objective's pass: all ranks stop behind it, and a
    second attempt goes on there."""
    plain_step, positions = ScoringPass._step, list[int]()

    def signalled(self: ScoringPass) -> int:
        if self.objective.name == name:
            positions.append(self.state.position)
            if positions == [0] and runtime.rank() == runtime.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(self)

    ScoringPass._step = signalled
    try:
        with pytest.raises(Interrupted):
            first.run()
        assert positions == [0], positions
        interrupt._stop_requested.clear()  # the second attempt is another process
        second.run()
    finally:
        ScoringPass._step = plain_step
    assert len(positions) > 1 and positions == sorted(set(positions)), positions


def run_case(case: dict) -> None:
    config = validate(case["config"])
    folder = RunFolder(config.run.output_dir)
    settings = resolve_deepspeed(config, runtime.world_size())
    unpoisoned()
    if "poison" in case:
        poisoned(case["poison"])
    if case.get("wrong_fisher"):
        square_after_the_reduction()
    try:
        with frees_all() if case.get("frees") else nullcontext():
            inputs = prepare(config)
            attempt = partial(EsiRun, config, Options(), inputs, folder, settings, inputs.source)
            if "killed_at" in case:
                kill_at(case["killed_at"], attempt().run)
            if "killed_in" in case:
                kill_in(case["killed_in"], attempt().run)
            if "stopped_in" in case:
                stop_in(case["stopped_in"], attempt(), attempt())
            else:
                attempt().run()
            del attempt, inputs
    except UserError as error:
        assert case.get("error") and case["error"] in str(error), error
        return
    assert "error" not in case
    check_mask_reading(folder.path, runtime.world_size())
    if case.get("export"):
        path = config.model.path
        model = load_sharded(ModelSource(path), config.model.dtype, settings)
        export_model(model, folder.path / "model", AutoTokenizer.from_pretrained(path), "")
        model.close()


KEPT = ("units", "selection", "score_histogram", "score_histograms_by_role", "further_masks", "overlaps")  # of a report


def watch_judges() -> None:
    """A judge is placed as the config says, and gone once everything is scored, also one of which every rank has a
    whole copy. (Modules of sharded ones stay, without tensors.)"""
    plain_load, plain_finish = EsiRun._load_guard, esi_work.finish_esi
    judges: list[weakref.ref] = []

    def load(self: EsiRun, judge) -> Guard:
        guard = plain_load(self, judge)
        is_whole, placement = isinstance(guard._weights, WholeWeights), judge.section.placement
        assert placement == "auto" or is_whole == (placement == "replicated")
        judges[:] = [weakref.ref(guard.model)] if is_whole else []
        return guard

    def finish_without_judge(*arguments) -> None:
        assert all(judge() is None for judge in judges)
        plain_finish(*arguments)

    replace(EsiRun, "_load_guard", load)
    replace(esi_work, "finish_esi", finish_without_judge)


def keep_units(folder: Path, report: dict) -> None:
    (folder / "report.json").write_text(json.dumps({key: report[key] for key in KEPT if key in report}))


def leave_out_pages() -> None:
    """Of a report nothing but ``KEPT`` is written: pages and pictures are tested elsewhere."""
    replace(stage_run, "write_report", keep_units)
    replace(finish, "publish", lambda *arguments: None)


def main() -> None:
    spoil_kernels()
    replace(gradients, "BUCKET_NUMEL", 2000)  # of models this small, so that several reductions are in flight
    leave_out_pages()
    watch_judges()
    take_a_second(score)
    ask_each_model_once(esi_work, routing)
    run_cases(run_case)


if __name__ == "__main__":
    main()
