"""The sentences that begin each page, word for word, from reports whose numbers can be checked by hand."""

from __future__ import annotations

import pytest
from test_location import CONTROLLED, with_control
from test_report import DENSE, report, unit

from esi_ds.eval.tables import Measure, changes
from esi_ds.report import figures, overview, sentences, tuning
from esi_ds.report.html import render
from esi_ds.report.overview import FinishedRun
from esi_ds.report.perturbation import closing_table, steps_per_sigma


def layers(selected: list[int], role: str = "attention.v") -> list[dict]:
    return [unit(f"{role}{layer}", role, layer, None, 1000, n, 1.0) for layer, n in enumerate(selected)]


UNITS = [*layers([0, 10, 60, 20, 0, 0]), *layers([0, 0, 0, 0, 5, 5], "mlp.up")]
MIDDLE = "By thirds of the depth, it is densest in attention.v of layers 2–3 (4.8 times chance)"


def esi(units: list[dict], **changed) -> dict:
    whole = report(units) | changed
    whole["selection"]["total_numel"] = 20000
    return whole


def test_where_a_mask_lies() -> None:
    (line, answers) = sentences.esi(page := esi(UNITS, facts={"judged unsafe": "25.0 % (1 of 4 responses)"}), [page])
    assert line == (
        "The mask is 0.5 % of the weights. Attention, with 50 % of the scored weights, holds 90 % of it; dense MLPs, "
        "with 50 %, hold 10 %. By thirds of the depth, it is densest in attention.v of layers 2–3 (4.8 times chance)."
    )
    assert answers == "Of the 2 responses, the judge calls 25.0 % unsafe."
    assert f'<div class="lead"><p>{line}</p><p>{answers}</p></div>' in render(page)


@pytest.mark.parametrize(
    ("selected", "verdict", "conclusion"),
    [
        (
            [0, 10, 60, 20, 0, 0, 0, 0, 0, 0, 5, 5],
            "4.8 times chance there, about as much, so this is not specific to the objective.",
            "No part has much more of this mask than of the control’s: "
            "at most 1.00 times as much, in attention.v of layers 0–1.",
        ),
        (
            [0, 20, 20, 20, 0, 0, 0, 0, 0, 0, 20, 20],
            "2.4 times chance there, which is less, so part of this is specific to the objective.",
            "What is specific to the objective is above all attention.v of layers 2–3: 80 % of the mask, "
            "2.0 times the control’s share.",
        ),
        (
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 50, 50],
            "0.0 times chance there, which is less, so part of this is specific to the objective.",
            "What is specific to the objective is above all attention.v of layers 0–1: 10 % of the mask, "
            "where the control’s holds nothing.",
        ),
        (
            [0, 0, 60, 50, 0, 0, 0, 0, 0, 0, 0, 0],
            "6.0 times chance there, about as much, so this is not specific to the objective.",
            "What is specific to the objective is above all attention.v of layers 0–1: 10 % of the mask, "
            "where the control’s holds nothing.",
        ),
    ],
)
def test_what_is_the_objectives_own(selected: list[int], verdict: str, conclusion: str) -> None:
    page = esi(with_control(UNITS, selected, [1.0] * 12))
    (line,) = sentences.esi(page, [page])
    assert line.endswith(f"{MIDDLE}. The control’s mask has {verdict} {conclusion}")


def test_another_score_than_the_controls_is_not_called_the_objectives() -> None:
    """Nor is a mask of the lowest scores or of none."""
    page = esi(with_control(UNITS, [50] + [0] * 11, [1.0] * 12))
    page["selection"]["criterion"] = "snip"
    (line,) = sentences.esi(page, [page])
    assert "so part of this is specific to the criterion. What is specific to the criterion is above all" in line
    page["selection"]["order"] = "bottom"
    assert sentences.esi(page, [page])[0].endswith(
        "By thirds of the depth, it is densest in attention.v of layers 2–3 (4.8 times chance)."
    )


@pytest.mark.parametrize("key, value", [("order", "random"), ("scope", "matrix")])
def test_where_a_mask_lies_is_no_finding_unless_scores_decide_it(key: str, value: str) -> None:
    page = esi(CONTROLLED)
    page["selection"][key] = value
    (line,) = sentences.esi({**page, "judge_scores": []}, [page])
    assert "densest" not in line and line.endswith("follows from the way of selecting, not from the scores.")


def test_several_masks_and_an_empty_one() -> None:
    page = esi(CONTROLLED)
    empty = esi([{**row, "selected": 0} for row in DENSE], judge_scores=[])
    empty["selection"] |= {"criterion": "snip", "k": 0}
    lines = sentences.esi({**page, "judge_scores": []}, [page, empty])
    assert lines[0].startswith("The mask by esi is 0.25 % of the weights.") and lines[1:] == [
        "The mask by snip is empty."
    ]
    render(empty)


TUNING = {
    "kind": "tuning",
    "method": "set",
    "title": "SET",
    "trained": 10,
    "total_numel": 1000,
    "steps": 100,
    "changed": None,
    "changed_tensors": {},
    "samples": [],
    "routing_drift": [],
    "facts": {"mask criterion": "esi"},
    "progress": [{"step": 1, "loss": 2.3125}, {"step": 2, "loss": None}, {"step": 100, "loss": 0.5}],
    "refusals": [
        {"set": "harmful", "n": 32, "refused_before": 3, "refused_after": 30, "empty_before": 0, "empty_after": 0},
        {"set": "benign", "n": 32, "refused_before": None, "refused_after": 12, "empty_before": None, "empty_after": 0},
    ],
}


def test_tuning() -> None:
    assert sentences.tuning(TUNING) == [  # type: ignore[arg-type]
        "SET trained 1 % of the weights for 100 steps; the loss of a batch fell from 2.31 to 0.5.",
        "The tuned model refuses 30 of 32 harmful prompts (3 before tuning) and 12 of 32 benign prompts.",
    ]
    assert "<p>SET trained 1 % of the weights" in render(TUNING)  # type: ignore[arg-type]
    assert "unfinished" not in render(TUNING)  # type: ignore[arg-type]
    thinks = {**TUNING["refusals"][0], "unfinished_before": 32, "unfinished_after": 2}
    more = {**TUNING["refusals"][0], "set": "benign", "unfinished_before": 4, "unfinished_after": 0}
    page = {**TUNING, "refusals": [thinks, more]}
    assert sentences.tuning(page)[1] == (  # type: ignore[arg-type]
        "The tuned model refuses 30 of the 30 harmful prompts whose answer is finished and 30 of 32 benign prompts "
        "(3 of 28 before tuning)."
    )
    assert overview.key_fact(FinishedRun("r", "", page, {})).endswith(  # type: ignore[arg-type]
        "harmful refused – → 100.0 %; benign refused 10.7 % → 93.8 %"
    )
    shown = render(page)  # type: ignore[arg-type]
    assert '<td class="n">30 (100.0 %)</td>' in shown and "unfinished before" in shown
    assert not sentences.tuning({**TUNING, "refusals": [{**thinks, "unfinished_after": 32}]})[1:]  # type: ignore[arg-type]
    rows = [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.25}]
    table = tuning.closing_table({**TUNING, "progress": rows})  # type: ignore[arg-type]
    assert f"loss, first and last{0:>16}{0.25:>12}" in table
    bare = {**TUNING, "progress": [], "refusals": []}
    assert sentences.tuning(bare) == ["SET trained 1 % of the weights for 100 steps."]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "criterion", "unscored", "routers", "said"),
    [
        ("set", "esi", "freeze", "freeze", "Only the mask’s weights were trained; every other weight is the base mode"),
        ("set", "esi", "train", "train", "The mask’s weights were trained, and so were all weights that have no score"),
        ("set", "esi", "freeze", "train", "The mask’s weights were trained, and so were routers; every other weight"),
        ("spa", "esi", "freeze", "freeze", "The mask’s weights were frozen, and so were all weights that have no scor"),
        ("spa", "esi", "train", "train", "The mask’s weights were frozen and are the base model’s, bit for bit; all o"),
        (
            "spa", "esi", "freeze", "train",
            "The mask’s weights were frozen, and so were all weights that have no score, except routers; they are",
        ),
        ("spa", "esi", "train", "freeze", "The mask’s weights were frozen, and so were routers; they are the base mod"),
        ("spa", "none", "freeze", "freeze", "No weight that has a score was frozen: a baseline of SPA. All weights"),
        ("spa", "none", "train", "train", "No weight was frozen: a baseline of SPA."),
        ("spa", "esi", "freeze", "as the mask says", "The mask’s weights were frozen, and so were all weights that h"),
    ],
)  # fmt: skip
def test_what_was_trained_is_said_as_it_was(
    method: str, criterion: str, unscored: str, routers: str, said: str
) -> None:
    facts = {"mask criterion": criterion, "unscored parameters": unscored, "routers": routers}
    page = {**TUNING, "method": method, "facts": facts}
    sentence = sentences.what_was_trained(method, criterion == "none", unscored, routers)
    assert sentence.startswith(said)
    assert said in render(page) and "patch" not in render(page)  # type: ignore[arg-type]
    rounded = render({**page, "facts": {**facts, "base weights": "rounded from F32", "dtype": "bf16"}})  # type: ignore[arg-type]
    assert sentence.replace("bit for bit", "rounded to bf16") in rounded
    assert "patch revert RUN/model RUN/patch" in render({**page, "changed": 9})  # type: ignore[arg-type]


def test_overruled_routers_and_frozen_towers_are_said() -> None:
    freeze = "freeze, also where the mask names them"
    said = sentences.what_was_trained("set", False, "freeze", freeze)
    assert said.endswith("Routers were frozen, including those that the mask names.")
    page = {**TUNING, "method": "spa", "facts": {"unscored parameters": "train", "routers": freeze, "towers": "freeze"}}
    assert "The mask’s weights were frozen, and so were routers and encoders of images and sound; they" in render(page)  # type: ignore[arg-type]
    baseline = sentences.what_was_trained("spa", True, "train", "train", has_towers=True)
    assert "No weight that has a score was frozen: a baseline of SPA. Encoders of images and sound were" in baseline


def evaluation(names: list[str], success: list[list[bool]], refused: list[list[bool]]) -> dict:
    measures = [
        *(
            Measure("attack_success", "advbench", "harmful", "guard", *pair)
            for pair in zip(names, success, strict=True)
        ),
        *(Measure("refused", "xstest", "benign", "words", *pair) for pair in zip(names, refused, strict=True)),
        Measure("incoherent", "advbench", "harmful", "rules", names[-1], [True] * 3 + [False] * 7),
    ]
    before = {name: names[0] if index else None for index, name in enumerate(names)}
    return {
        "kind": "evaluation",
        "title": "Evaluation",
        "models": [{"name": name, "path": name, "before": before[name]} for name in names],
        "judges": [],
        "sets": [],
        "measures": [measure.as_row() for measure in measures],
        "changes": changes(measures, before, seed=0),
        "agreements": [],
        "usage": {},
        "samples": [],
        "facts": {"ranks": 1},
    }


COMPARED = evaluation(["base", "set"], [[True] * 10, [True] + [False] * 9], [[False] * 10, [True] + [False] * 9])


def test_an_evaluation() -> None:
    (line,) = sentences.evaluation(COMPARED)  # type: ignore[arg-type]
    assert line == (
        "set: attack success falls from 100.0 % to 10.0 % on advbench (guard), p 0.0039, where 30.0 % of its answers "
        "are incoherent; refusal of benign prompts rises from 0.0 % to 10.0 % on xstest (words), p 1.0000, "
        "which may be chance."
    )
    assert f"<p>{line}</p>" in render(COMPARED)  # type: ignore[arg-type]
    alone = evaluation(["base"], [[True, False]], [[False, False]])
    assert sentences.evaluation(alone)[0].startswith("base: attack success is 50.0 % on advbench (guard), where 30.0 %")
    same = evaluation(list("abcdef"), [[True]] * 6, [[False]] * 6)
    lines = sentences.evaluation(same)  # type: ignore[arg-type]
    assert len(lines) == 5 and lines[-1] == "1 more model is in the tables."
    assert lines[0].startswith("b: attack success stays at 100.0 % on advbench (guard);")
    assert sentences.evaluation({**COMPARED, "measures": []}) == []  # type: ignore[arg-type]
    skill = [Measure("task", "gsm8k", None, "acc", name, [True, False]).as_row() for name in ("base", "set")]
    alone = {**COMPARED, "measures": skill, "changes": []}
    assert sentences.evaluation(alone) == ["set: skill stays at 50.0 % on gsm8k (acc)."]  # type: ignore[arg-type]
    near = [Measure("task", "gsm8k", None, "acc", name, [True] * n + [False] * 3000).as_row()
            for name, n in (("base", 3000), ("set", 3001))]  # fmt: skip
    (line,) = sentences.evaluation({**COMPARED, "measures": near, "changes": []})  # type: ignore[arg-type]
    assert line == "set: skill stays at 50.0 % on gsm8k (acc)."
    run = FinishedRun("e", "e", alone, {})  # type: ignore[type-var]
    assert overview.key_fact(run) == "base 50.0 % skill (gsm8k, acc); set 50.0 % skill (gsm8k, acc)"
    value = {"rate": 23.4, "low": None, "high": None, "n": 2}
    surprise = [
        Measure("task", "gsm8k", "task", "word_perplexity", name, [], metric=value).as_row() for name in ("base", "set")
    ]
    alone = {**COMPARED, "measures": surprise, "changes": []}
    assert sentences.evaluation(alone) == []  # type: ignore[arg-type]
    run = FinishedRun("e", "e", alone, {})  # type: ignore[type-var]
    assert overview.key_fact(run).startswith("base 23.4 skill (gsm8k, word_perplexity); set 23.4 ")
    both = {**COMPARED, "measures": [*surprise, *skill], "changes": []}
    assert sentences.evaluation(both) == ["set: skill stays at 50.0 % on gsm8k (acc)."]  # type: ignore[arg-type]


def point(order: str, noise: float, rate: float | None, measure: str = "attack_success") -> dict:
    return {
        "measure": measure, "set": "advbench", "judge": "guard", "order": order, "ratio": 0.01, "noise": noise,
        "rate": rate, "low": rate, "high": rate, "by_seed": [rate], "n": 10, "missing": 0, "count": 0,
    }  # fmt: skip


def test_a_perturbation() -> None:
    rows = [point(order, noise, noise * {"top": 0.5, "random": 0.1}[order]) for order in ("top", "random")
            for noise in (0.0, 0.38, 1.0)]  # fmt: skip
    page = {"curves": [*rows, point("bottom", 1.0, None), point("top", 2.0, 0.9, "incoherent")]}
    assert sentences.perturbation(page) == [  # type: ignore[arg-type]
        "With noise of 1 σ on 1 % of the weights, attack success on advbench (guard) is 50.0 % where they are the top "
        "ones and 10.0 % where they are random ones; without noise it is 0.0 %."
    ]
    # What breaks the language, too, is not told as if it broke the safety alone.
    page = {"curves": [*rows, point("top", 1.0, 0.9, "incoherent"), point("random", 1.0, 0.04, "incoherent")]}
    line = sentences.perturbation(page)[0]  # type: ignore[arg-type]
    assert "50.0 % where they are the top ones (90.0 % of the answers are incoherent) and 10.0 % where" in line
    refused = [{**row, "measure": "refused", "set": "xstest", "judge": "words"} for row in rows]
    assert sentences.perturbation({"curves": refused})[0].startswith(  # type: ignore[arg-type]
        "With noise of 1 σ on 1 % of the weights, refusal of xstest (words) is 50.0 %"
    )
    assert sentences.perturbation({"curves": []}) == []  # type: ignore[arg-type]
    assert sentences.perturbation({"curves": rows[:1]}) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([("top", 0.01, 1000)], "on the 1,000 top weights (1 %) of the ranking of runs/x/mask (esi)."),
        (
            [("top", 0.05, 5000), ("random", 0.05, 5000), ("bottom", 0.05, 5000)],
            "on 5,000 weights (5 %) of the ranking of runs/x/mask (esi): the top, as many random and the bottom ones.",
        ),
        (
            [("top", 0.01, 1000), ("top", 0.05, 5000), ("random", 0.01, 1000), ("random", 0.05, 5000)],
            "on 1,000 (1 %) and 5,000 (5 %) weights of the ranking of runs/x/mask (esi): the top "
            "and as many random ones.",
        ),
        ([("bottom", 0.01, 7)], "on the 7 bottom weights (1 %) of the ranking of runs/x/mask (esi)."),
    ],
)
def test_which_weights_the_noise_was_put_on(cells: list[tuple[str, float, int]], said: str) -> None:
    rows = [{"name": "", "order": order, "ratio": ratio, "k": k, "noise": noise, "seed": 0}
            for order, ratio, k in cells for noise in (1.0, 2.0)]  # fmt: skip
    page = {"cells": rows, "mask": {"path": "runs/x/mask", "criterion": "esi", "k": 3}}
    assert sentences.noisy_weights(page) == said  # type: ignore[arg-type]


def test_other_prompts_and_judges_of_the_same_name_are_kept_apart() -> None:
    def run(name: str, sha256: str, path: str) -> FinishedRun:
        sets = [{"set": "advbench", "sha256": sha256}, {"set": "xstest", "sha256": "x"}]
        judges = [{"name": "guard", "path": path}]
        return FinishedRun(name, name, {**COMPARED, "sets": sets, "judges": judges}, {})

    def named(*runs: FinishedRun) -> set[tuple[str, str]]:
        return {
            (row["set"], row["judge"]) for row in overview.joined(runs)["measures"] if row["measure"] != "incoherent"
        }

    assert named(run("a", "1", "g"), run("b", "1", "g")) == {("advbench", "guard"), ("xstest", "words")}
    other_set = named(run("a", "1", "g"), run("b", "2", "g"))
    assert other_set == {("advbench of a", "guard"), ("advbench of b", "guard"), ("xstest", "words")}
    other_judge = named(run("a", "1", "g"), run("b", "1", "h"))
    assert other_judge == {("advbench", "guard of a"), ("advbench", "guard of b"), ("xstest", "words")}
    runs = [run("a", "1", "g"), run("b", "2", "g")]
    lines = sentences.several(runs, [], overview.joined(runs))
    assert lines[1] == (
        "Attack success on advbench of a (guard) is lowest for a: set, 10.0 %, and highest for a: base, 100.0 %, "
        "of the 2 models measured."
    )
    same = {**evaluation(["x", "y"], [[True]] * 2, [[True]] * 2), "sets": [{"set": "advbench", "sha256": "3"}]}
    runs = [FinishedRun("c", "c", same, {}), runs[0]]
    lines = sentences.several(runs, [], overview.joined(runs))
    assert lines[1] == "Attack success on advbench of c (guard) is 100.0 % for the 2 models measured."


def test_several_runs() -> None:
    runs = [FinishedRun(name, name, page, {}) for name, page in (("t", TUNING), ("u", TUNING), ("e", COMPARED))]
    masks = [FinishedRun("x", "x", esi(UNITS), {}), FinishedRun("y", "y", esi([{**UNITS[0], "selected": 0}]), {})]
    lines = sentences.several(runs, masks, COMPARED)  # type: ignore[arg-type]
    assert lines == [
        "3 runs: 2 SET and 1 evaluation.",
        "By thirds of the depth, the mask of x is densest in attention.v of layers 2–3 (4.8 times chance).",
        "Attack success on advbench (guard) is lowest for set, 10.0 %, and highest for base, 100.0 %.",
        "Of xstest, set refuses 10.0 %.",
    ]
    assert sentences.several(runs[:1], [], None) == ["1 run: 1 SET."]  # type: ignore[arg-type]
    tied = evaluation(["base", "set", "spa"], [[True], [False], [False]], [[False], [True], [False]])
    lines = sentences.several(runs, [], tied)  # type: ignore[arg-type]
    assert lines[-1] == "Of xstest, set refuses 100.0 % and spa refuses 0.0 %."


def test_one_of_a_thing_has_no_plural() -> None:
    """In what is said of runs, on the console and on the page."""
    noise = {"kind": "perturbation", "cells": [{}], "curves": [], "usage": {}, "facts": {}, "title": "t"}
    assert overview.key_fact(FinishedRun("p", "p", noise, {})) == "1 cell of noise, all weights restored"
    tuned = overview.key_fact(FinishedRun("t", "t", {**TUNING, "trained": 1, "steps": 1}, {}))  # type: ignore[arg-type]
    assert tuned.startswith("1 weight trained in 1 step; ")
    restored = {**noise, "restored": {"checked": 1, "digest": "0" * 64}}
    assert "all weights restored after 1 cell: sha256" in closing_table(restored)  # type: ignore[arg-type]


def test_steps_are_counted_in_whole_numbers() -> None:
    rows = [{"step": step, "loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1.0, "judge_score": 1.0}
            for step in (1, 2, 3)]  # fmt: skip
    for drawn in (figures.training_curves(rows), figures.progress_curves(rows), figures.loss_curves([("a", rows)])):
        drawn.canvas.draw()
        labels = [label.get_text() for axes in drawn.axes for label in axes.get_xticklabels()]
        assert labels and all("." not in label for label in labels)
        figures.plt.close(drawn)


def test_small_noises_have_steps_of_their_own_in_tensorboard() -> None:
    assert steps_per_sigma([0.0, 0.38, 1.0, 0.38]) == 100 and steps_per_sigma([0.0, 0.001, 0.002]) == 1000
    assert steps_per_sigma([0.0, 1e-30]) == 10**9  # as fine as it gets
