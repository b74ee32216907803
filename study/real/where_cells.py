"""The cells that ask where safety's weights lie: an estimator, beside the same on benign prompts, with a judge of
shuffled labels, and beside the loss on benign rows, which the main estimator's runs take as their ``control``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from study.real.grid import (
    BENIGN,
    BENIGN_LOSS,
    CLASSIFIER,
    HARMFUL,
    SHUFFLED,
    Cell,
    Plan,
    Step,
    part_name,
    shuffled_cell,
)


def shuffled_judge(plan: Plan, judge: str, data: tuple[str, ...]) -> Cell:
    """One of the control's judges; data: options that say where its pairs come from."""
    name, draw = shuffled_cell(judge), plan.shuffled_judges.index(judge)
    arguments = ("--models", str(plan.folders.models), "--output", str(plan.folders.output / name), *data)
    # The first has no --draw: its cell may have been finished before there were others.
    options = ("--device", plan.device, *(("--draw", str(draw)) if draw else ()))
    return Cell(name, "judge", (Step("shuffled_judge", None, (*arguments, *options), is_module=True),))


def name_of(model: str, prompts: str, seed: int, judge: str, estimator: str, count: int | None = None) -> str:
    """The cell's name; count: of prompts, where it is not that of a seed."""
    return f"where/{model}/{part_name(prompts, seed, count)}/{judge.removeprefix('judge-')}-{estimator}"


@dataclass(frozen=True)
class Objective:
    """What is scored: an estimator on a set of prompts by a judge. responses: of which cell; None: they are
    generated. count: of prompts, if not a seed's."""

    prompts: str
    judge: str
    estimator: str
    responses: str | None = None
    count: int | None = None


class WhereCells:
    """The cells of both models, the most telling first."""

    def __init__(self, plan: Plan):
        self.plan, self.where, self.size = plan, plan.grid.where, plan.size
        self.main = next(iter(plan.grid.where.estimators))

    def cells(self) -> Iterator[Cell]:
        """The main estimator and its controls seed by seed; more draws of the shuffled judge; the other estimators;
        other judges, prompts and numbers of them."""
        models, seeds = self.plan.models, self.size.seeds
        for seed in seeds:
            for model in models:
                yield from self.with_controls(model, seed, self.main)
        for judge in self.plan.shuffled_judges[1:]:
            for model in models:
                yield self.cell(model, seeds[0], self.on_answers(model, seeds[0], judge))
        for estimator in list(self.where.estimators)[1:]:
            for model in models:
                yield from self.with_controls(model, seeds[0], estimator)
        for model in models:
            yield from self.others(model, seeds[0])
        for model in models:
            yield from self.numbers(model, seeds)

    def answers(self, model: str, prompts: str, seed: int) -> str:
        """The cell whose responses all cells of these prompts read."""
        return name_of(model, prompts, seed, CLASSIFIER, self.main)

    def with_controls(self, model: str, seed: int, estimator: str) -> Iterator[Cell]:
        """An estimator on harmful prompts, on benign ones, and with the shuffled judge."""
        for prompts in (HARMFUL, BENIGN):
            responses = None if estimator == self.main else self.answers(model, prompts, seed)
            yield self.cell(model, seed, Objective(prompts, CLASSIFIER, estimator, responses))
        shuffled = Objective(HARMFUL, SHUFFLED, estimator, self.answers(model, HARMFUL, seed))
        yield self.cell(model, seed, shuffled)

    def on_answers(self, model: str, seed: int, judge: str) -> Objective:
        """The main estimator by another judge, on the responses that the classifier's cell has."""
        return Objective(HARMFUL, judge, self.main, self.answers(model, HARMFUL, seed))

    def others(self, model: str, seed: int) -> Iterator[Cell]:
        """The main estimator by other judges and on other prompts."""
        for judge in self.where.other_judges:
            yield self.cell(model, seed, self.on_answers(model, seed, judge))
        for prompts in self.where.other_prompts:
            yield self.cell(model, seed, Objective(prompts, CLASSIFIER, self.main))

    def numbers(self, model: str, seeds: list[int]) -> Iterator[Cell]:
        """The main estimator on fewer prompts of every seed; on the largest number, which is answered once, and on
        parts of it."""
        each = self.size.prompts
        for count in self.where.counts:
            if count < each:
                for seed in seeds:
                    responses = self.answers(model, HARMFUL, seed)
                    yield self.cell(model, seed, Objective(HARMFUL, CLASSIFIER, self.main, responses, count))
        answers: str | None = None
        for count, seeds_of_parts in reversed(self.plan.larger_parts().items()):
            for seed in seeds_of_parts:
                cell = self.cell(model, seed, Objective(HARMFUL, CLASSIFIER, self.main, answers, count))
                yield cell
                answers = answers or cell.name

    def cell(self, model: str, seed: int, objective: Objective) -> Cell:
        """One run of ESI."""
        o, estimator = objective, self.where.estimators[objective.estimator]
        name = name_of(model, o.prompts, seed, o.judge, o.estimator, o.count)
        config = self.plan.base_config(name, "esi", model, seed)
        config["judge"] = self.plan.judge(o.judge)
        config["data"] = self.data(o, seed)
        config["esi"] = {
            "estimator": estimator.estimator,
            "samples": estimator.samples,
            "max_new_tokens": self.size.max_new_tokens,
            "batch_size": self.size.batch_size,
            "generation_batch_size": self.size.answer_batch,
            # The seed-0 scores of the main estimator are selected from again: other ratios, and noise.
            "save_scores": o == Objective(HARMFUL, CLASSIFIER, self.main) and seed == self.size.seeds[0],
        }
        criteria = estimator.criteria
        if o == Objective(HARMFUL, CLASSIFIER, self.main):
            criteria = [*criteria, *self.where.against_control]
            config["control"] = {
                "rows": {"path": str(self.plan.folders.data / f"{part_name(BENIGN_LOSS, seed)}.jsonl")}
            }
        config["select"] = {"criterion": criteria, "ratio": self.where.ratio}
        needs = [o.responses] if o.responses is not None else []
        needs += [shuffled_cell(o.judge)] if o.judge in self.plan.shuffled_judges else []
        like = f"where {o.estimator} n{o.count or self.size.prompts}{'' if o.responses else ', answers'}"
        facts = {"model": model, "prompts": o.prompts, "seed": seed, "judge": o.judge, "estimator": o.estimator}
        facts |= {"count": o.count or self.size.prompts}
        return Cell(name, like, (Step("esi", config),), facts, tuple(needs))

    def data(self, objective: Objective, seed: int) -> dict[str, Any]:
        """The prompts, or the responses of another cell: all of them, or those to ``count`` prompts."""
        folders, count = self.plan.folders, objective.count
        is_more = count is not None and count > self.size.prompts
        name = part_name(objective.prompts, seed, count if is_more else None)
        prompts: dict[str, Any] = {"path": str(folders.data / f"{name}.jsonl")}
        if objective.responses is None:
            return {"prompts": prompts}
        responses = {"responses": str(folders.output / objective.responses / "esi/responses.jsonl")}
        if count is None:
            return responses
        return {"prompts": prompts if is_more else {**prompts, "limit": count}, **responses}
