"""The cells that tune with masks and put noise on them: SET on the untouched model, SPA and noise on the twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from study.real.grid import BENIGN, BENIGN_LOSS, CLASSIFIER, HARMFUL, SHUFFLED, Cell, Method, Plan, Step, part_name
from study.real.where_cells import name_of

CHOOSE, REPORT = "choose", "report"  # parts of the prompts asked: to choose by, and to report
SKILLS = ("gsm8k", "medquad")  # that SET should leave alone
TASKS = ("kinds", "gsm8k", "medical")
POISONED = "poisoned"
LONG_ANSWER = 128  # tokens within which GSM8K's answers come to their number
NOTHING = "nothing"


def mask_cell_name(model: str, kind: str, seed: int) -> str:
    """The cell that makes masks besides those of the ``where`` cells."""
    return f"masks/{model}/{kind}-s{seed}"


class TuneCells:
    """SET, SPA and noise; masks come from the main estimator's cells, or from cells of their own."""

    def __init__(self, plan: Plan):
        self.plan, self.size = plan, plan.size
        self.aligned, self.untouched = plan.models
        self.main = next(iter(plan.grid.where.estimators))

    def run_folder(self, cell: str, stage: str = "esi") -> Path:
        """A stage's run folder."""
        return self.plan.folders.output / cell / stage

    def where_cell(self, model: str, seed: int) -> str:
        """ESI, grad and SNIP on AdvBench."""
        return name_of(model, HARMFUL, seed, CLASSIFIER, self.main)

    # ------------------------------------------------------------ masks

    def masks(self, seed: int) -> Iterator[Cell]:
        """Masks of criteria with losses or no gradient, divided by the benign Fisher, against the control, over each
        matrix's mean, and of the lowest scores."""
        model, data = self.untouched, self.plan.folders.data
        tuning = {"path": str(data / "refusals.jsonl"), "limit": self.size.rows}
        benign = {"path": str(data / f"{part_name(BENIGN_LOSS, seed)}.jsonl"), "limit": self.size.rows}
        plain = {"criterion": ["tuning_grad", "magnitude", "random"]}
        yield self.mask_cell("plain", seed, {"tuning": tuning}, plain)
        responses = str(self.run_folder(self.where_cell(model, seed)) / "responses.jsonl")
        contrastive = {"criterion": ["esi", "tuning_grad"], "contrastive": True}
        data_section = {"responses": responses, "tuning": tuning, "benign": benign}
        yield self.mask_cell("contrastive", seed, data_section, contrastive)
        exclusive = {"criterion": ["directed", "exclusive"]}
        control = {"rows": {"path": str(data / f"{part_name(BENIGN_LOSS, seed)}.jsonl")}}
        yield self.mask_cell("exclusive", seed, {"responses": responses, "tuning": tuning}, exclusive, control)
        by_matrix = {"criterion": ["esi", "grad"], "normalise": "matrix"}
        yield self.mask_cell("by-matrix", seed, {"responses": responses}, by_matrix)
        lowest = {"criterion": ["esi"], "order": "bottom"}
        yield self.mask_cell("bottom", seed, {"responses": responses}, lowest)

    def mask_cell(
        self, kind: str, seed: int, data: dict[str, Any], select: dict[str, Any], control: dict[str, Any] | None = None
    ) -> Cell:
        """One run of ESI on the untouched model; it needs the responses of the ``where`` cell if it reads them."""
        name, model = mask_cell_name(self.untouched, kind, seed), self.untouched
        config = self.plan.base_config(name, "esi", model, seed)
        after: tuple[str, ...] = ()
        if "responses" in data:
            config["judge"], after = self.plan.judge(CLASSIFIER), (self.where_cell(model, seed),)
        config |= {"data": data, "control": control, "select": {"ratio": self.plan.grid.where.ratio, **select}}
        config["esi"] = {"batch_size": self.size.batch_size, "save_scores": False}
        return Cell(name, f"masks {kind}", (Step("esi", config),), {"model": model, "seed": seed}, after)

    def mask_of(self, method: Method, seed: int) -> tuple[str, tuple[str, ...]]:
        """(mask folder, cells needed)."""
        model = self.untouched
        cell = self.where_cell(model, seed) if method.masks == "where" else mask_cell_name(model, method.masks, seed)
        return str(self.run_folder(cell) / "mask" / method.criterion), (cell,)

    # ------------------------------------------------------------ SET

    def set_cells(self) -> Iterator[Cell]:
        """The first seed, method by method: its masks, the rates from the middle outwards, and the ends of the range
        where the finished cells ask for them."""
        seed, masks = self.size.seeds[0], {cell.name: cell for cell in self.masks(self.size.seeds[0])}
        for name, method in self.plan.grid.set.methods.items():
            if method.kind == "mask":
                yield from (masks.pop(need) for need in self.mask_of(method, seed)[1] if need in masks)
            last = len(method.rates) - 1
            for index in sorted(range(last + 1), key=lambda index: abs(index - last // 2)):
                yield self.set_cell(name, method, method.rates[index], seed, "end" if index in (0, last) else "")

    def further_seeds(self) -> Iterator[Cell]:
        """Every method at the rates at which it is compared, with masks of other prompts and rows in another order."""
        for seed in self.size.seeds[1:]:
            yield from self.masks(seed)
            for name, method in self.plan.grid.set.methods.items():
                for rate in method.rates:
                    yield self.set_cell(name, method, rate, seed, "seed")

    def set_cell(self, method_name: str, method: Method, rate: float, seed: int, only_if: str) -> Cell:
        """Tuning, evaluation and the loss on held-out skills.

        only_if: "end": of the range, run where the rate beside it is the best; "seed": at the best rate alone.
        """
        name = f"set/{method_name}-{rate:g}-s{seed}"
        config = self.plan.base_config(name, "set", self.untouched, seed)
        needs: tuple[str, ...] = ()
        if method.kind == "mask":
            mask, needs = self.mask_of(method, seed)
        else:
            mask = "none"
        config["tune"] = {
            "mask": mask,
            **self.tune_section(
                rate, self.size.set_steps, method.batch_factor * self.size.set_batch, self.size.set_length
            ),
            "data": self.set_rows(method),
        }
        facts = {"method": method_name, "lr": rate, "seed": seed, "rates": method.rates, "only_if": only_if}
        if method.kind == "mask":
            steps = [Step("set", config)]
        elif method.kind == "all":  # SPA that freezes nothing is plain tuning of all scored weights
            config["run"]["output_dir"] = str(self.run_folder(name, "spa"))
            steps = [Step("spa", config)]
        else:
            options = ("--rank", str(method.rank), "--targets", *method.targets)
            config["run"]["output_dir"] = str(self.run_folder(name, "lora"))
            steps = [Step("lora", config, options, is_module=True)]
        model = self.run_folder(name, steps[0].stage) / "model"
        steps += [self.evaluation(name, self.untouched, model, seed), self.skills(name, model, SKILLS)]
        like = f"set {method.kind}" + (f", {method.batch_factor} batches" if method.batch_factor > 1 else "")
        return Cell(name, like, tuple(steps), facts, needs, drops=(f"{steps[0].stage}/model",))

    def set_rows(self, method: Method) -> dict[str, Any]:
        """Refusals, and benign answers of the model's own."""
        data = self.plan.folders.data
        benign = {"path": str(data / f"{method.benign}.jsonl"), "fraction": method.fraction}
        return {"path": str(data / "refusals.jsonl"), "benign": benign}

    def tune_section(self, rate: float, steps: int, batch: int, longest: int) -> dict[str, Any]:
        """What all tuning has in common. The tuned model is dropped once it is evaluated: no patch is written."""
        section = {"max_steps": steps, "lr": rate, "batch_size": batch, "max_length": longest}
        return {**section, "patch": False}

    # ------------------------------------------------------------ what is measured

    def evaluation(self, name: str, base: str, model: Path, seed: int, task: str | None = None) -> Step:
        """Attack success by the judges and by words, over-refusal, incoherence, KL, on both parts of the prompts."""
        config = self.plan.base_config(name, "eval", base, seed)
        config["eval"] = {**self.questions(task), "models": [{"path": str(model), "name": "tuned"}], "divergence": True}
        return Step("eval", config)

    def questions(self, task: str | None = None) -> dict[str, Any]:
        """The judges and the prompts; held-out questions of a task are one more benign set."""
        data, size = self.plan.folders.data, self.size
        judges = [{**self.plan.judge(name), "name": name} for name in (CLASSIFIER, *self.plan.grid.where.other_judges)]
        sets = {kind: [{"path": str(data / f"{part}-{kind}.jsonl")} for part in (CHOOSE, REPORT)]
                for kind in ("harmful", "benign")}  # fmt: skip
        if task is not None:
            sets["benign"].append({"path": str(data / f"{task}-heldout.jsonl")})
        return {
            "judges": [*judges, {"kind": "words", "name": "words"}],
            "prompts": sets["harmful"],
            "benign": sets["benign"],
            "max_new_tokens": size.answer_tokens,
            "batch_size": size.batch_size,
            "generation_batch_size": size.answer_batch,
        }

    def skills(self, name: str, model: Path, tasks: Sequence[str]) -> Step:
        """The loss of right answers to held-out questions."""
        files = [str(self.plan.folders.data / f"{task}-heldout.jsonl") for task in tasks]
        output = str(self.plan.folders.output / name / "skills.json")
        options = ("--model", str(model), "--rows", *files, "--output", output, "--device", self.plan.device)
        return Step("skills", None, options, is_module=True)

    # ------------------------------------------------------------ SPA

    def spa_masks(self) -> Iterator[Cell]:
        """Masks of other ratios, selected again from the scores of the main estimator on the aligned model."""
        source = self.where_cell(self.aligned, self.size.seeds[0])
        run = self.run_folder(source)
        for frozen in self.plan.grid.spa.frozen:
            if frozen.criterion != NOTHING and (frozen.order, frozen.ratio) != ("top", self.plan.grid.where.ratio):
                name = self.frozen_mask(frozen.criterion, frozen.ratio, frozen.order)[1]
                mask, scores = run / "mask" / frozen.criterion, run / "scores" / frozen.criterion
                options = ("--scores", str(scores), "--ratio", str(frozen.ratio), "--order", frozen.order)
                output = str(self.plan.folders.output / name / "mask")
                step = Step("esi_ds.mask", None, ("select", str(mask), output, *options), is_module=True)
                yield Cell(name, "masks select", (step,), {"model": self.aligned}, (source,))

    def frozen_mask(self, criterion: str, ratio: float, order: str) -> tuple[str, str]:
        """(mask folder, cell that makes it)."""
        if (order, ratio) == ("top", self.plan.grid.where.ratio):
            cell = self.where_cell(self.aligned, self.size.seeds[0])
            return str(self.run_folder(cell) / "mask" / criterion), cell
        cell = f"masks/{self.aligned}/{criterion if order == 'top' else order}-{ratio:g}"
        return str(self.plan.folders.output / cell / "mask"), cell

    def spa_cells(self) -> Iterator[Cell]:
        """Task by task, the rates of nothing frozen and of every mask; the poisoned task last."""
        spa = self.plan.grid.spa
        for seed in self.size.spa_seeds:
            for task in TASKS:
                for rate in spa.rates:
                    for frozen in spa.frozen:
                        yield self.spa_cell(task, frozen.criterion, frozen.ratio, frozen.order, rate, seed)
            for frozen in (spa.frozen[0], spa.frozen[1]):
                yield self.spa_cell(POISONED, frozen.criterion, frozen.ratio, frozen.order, spa.rates[0], seed)

    def spa_cell(self, task: str, criterion: str, ratio: float, order: str, rate: float, seed: int) -> Cell:
        """Tuning on a task with a mask frozen, evaluation, and the loss on the task's held-out rows."""
        label = NOTHING if criterion == NOTHING else f"{criterion if order == 'top' else order}-{ratio:g}"
        name = f"spa/{task}/{label}-{rate:g}-s{seed}"
        mask, cell = ("none", "") if criterion == NOTHING else self.frozen_mask(criterion, ratio, order)
        config = self.plan.base_config(name, "spa", self.aligned, seed)
        rows = {"path": str(self.plan.folders.data / f"{task}-train.jsonl"), "columns": "prompt,response"}
        config["tune"] = {
            "mask": mask,
            **self.tune_section(rate, self.size.spa_steps, self.size.spa_batch, self.size.spa_length),
            "data": rows,
        }
        model = self.run_folder(name, "spa") / "model"
        heldout = TASKS[0] if task == POISONED else task
        is_asked = heldout != "gsm8k" or self.size.answer_tokens >= LONG_ANSWER
        steps = (
            Step("spa", config),
            self.evaluation(name, self.aligned, model, seed, heldout if is_asked else None),
            self.skills(name, model, (heldout,)),
        )
        facts = {"task": task, "frozen": label, "lr": rate, "seed": seed}
        return Cell(name, f"spa {task}", steps, facts, (cell,) if cell else (), drops=("spa/model",))

    def skill_cells(self) -> Iterator[Cell]:
        """The losses of the models as they are."""
        for model, part, tasks in ((self.untouched, "set", SKILLS), (self.aligned, "spa", TASKS)):
            name = f"base/{model}"
            step = self.skills(name, self.plan.folders.models / model, tasks)
            yield Cell(name, "base", (step,), {"model": model, "tuned_by": part})

    # ------------------------------------------------------------ noise

    def noise_cells(self) -> Iterator[Cell]:
        """Top, random and bottom weights of the aligned model, greedy answers and sampled as the paper does; then masks
        of controls, which have nothing to do with safety, with the least noise, and of what exceeds a control."""
        seed, noise = self.size.seeds[0], self.plan.grid.noise
        source = self.where_cell(self.aligned, seed)
        run = self.run_folder(source)
        masks = {"mask": str(run / "mask/esi"), "scores": str(run / "scores/esi")}
        for sampling, keys in (("greedy", {}), ("sampled", {"temperature": noise.temperature, "top_p": noise.top_p})):
            perturb = {**masks, "noise": noise.noise}
            yield self.noise_cell(f"noise/{sampling}", perturb, keys, {"sampling": sampling, "mask": "esi"}, source)
        benign = name_of(self.aligned, BENIGN, seed, CLASSIFIER, self.main)
        shuffled = name_of(self.aligned, HARMFUL, seed, SHUFFLED, self.main)
        least, more = noise.noise[:1], noise.noise[1:]
        for label, cell, criterion, levels in (
            ("benign prompts", benign, "esi", least),
            ("shuffled judge", shuffled, "esi", least),
            ("specific", source, "specific", least),
            ("specific", source, "specific", more),
        ):
            mask = str(self.run_folder(cell) / "mask" / criterion)
            name = f"noise/greedy-{label.replace(' ', '-')}{'' if levels == least else '-more'}"
            perturb = {"mask": mask, "orders": ["top"], "noise": levels}
            yield self.noise_cell(name, perturb, {}, {"sampling": "greedy", "mask": label}, cell)

    def noise_cell(
        self, name: str, perturb: dict[str, Any], sampling: dict[str, Any], facts: dict[str, Any], needs: str
    ) -> Cell:
        """One perturbation of the aligned model."""
        config = self.plan.base_config(name, "perturb", self.aligned, self.size.seeds[0])
        config["perturb"] = {**perturb, "seeds": self.size.noise_seeds}
        config["eval"] = {**self.questions(), **sampling}
        like = "noise" if "orders" not in perturb else "noise, top alone"
        return Cell(name, like, (Step("perturb", config),), facts, (needs,))
