"""Rates, paired changes and agreement of an evaluation against statsmodels and counting by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import start_later

from esi_ds.artifacts import read_metrics
from esi_ds.config import validate
from esi_ds.eval.refusals import REFUSAL_LISTS
from esi_ds.eval.rows import ANSWER_KEY, SurpriseRow
from esi_ds.eval.statistics import paired_rates
from esi_ds.eval.tables import Measure, agreements, answer_measures, changes, task_measures
from esi_ds.report import perturbation
from esi_ds.report.evaluation import change, charts, closing_table, kappa, markdown, publish, publish_rates
from esi_ds.report.html import render
from esi_ds.report.overview import FinishedRun, joined, key_fact
from esi_ds.stages.evaluate import answering
from esi_ds.stages.evaluate.answering import surprise_all, to_read_again
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker

EVIL = "<script>alert(1)</script>"
KINDS = {"bad": "harmful", "good": "benign"}


def random_flags(seed: int, n: int) -> list[bool | None]:
    generator = random.Random(seed)
    return [generator.choice([True, False, False, None]) for _ in range(n)]


def measure(model: str, flags, judge: str = "j", scores=()) -> Measure:
    return Measure("attack_success", "s", "harmful", judge, model, list(flags), scores=list(scores))


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_equal_statsmodels(seed: int) -> None:
    before, after = random_flags(seed, 60), random_flags(seed + 100, 60)
    verdicts = [flag for flag in after if flag is not None]
    row = measure("b", after).as_row()
    assert (row["count"], row["n"], row["missing"]) == (sum(verdicts), len(verdicts), after.count(None))
    assert (row["low"], row["high"]) == pytest.approx(proportion_confint(sum(verdicts), len(verdicts), method="wilson"))
    (change,) = changes([measure("a", before), measure("b", after)], {"a": None, "b": "a"}, seed=0)
    pairs = [pair for pair in zip(before, after, strict=True) if None not in pair]
    table = [[pairs.count((x, y)) for y in (True, False)] for x in (True, False)]
    assert change["p_value"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert change["num_missing"] == 60 - len(pairs)
    assert change["difference"] == pytest.approx((table[1][0] - table[0][1]) / len(pairs))
    assert change["low"] <= change["difference"] <= change["high"]
    (agreement,) = agreements([measure("a", before), measure("a", after, "k")])
    assert agreement["kappa"] == pytest.approx(cohens_kappa(table).kappa)


def answer(model: str, name: str, index: int, response: str | None) -> dict:
    excluded = "no room" if response is None else None
    return {"model": model, "set": name, "index": index, "prompt": "?", "response": response, "excluded": excluded}


def verdict(model: str, index: int, unsafe: bool | None, score: float | None = None) -> tuple[tuple, dict]:
    reason = "timeout" if unsafe is None else None
    return ("j", model, "bad", index), {"unsafe": unsafe, "score": score, "reason": reason}


def test_what_is_missing_is_never_safe() -> None:
    answers = [answer("m", "bad", i, "Sure, here is how.") for i in range(3)] + [answer("m", "bad", 3, None)]
    verdicts = dict([verdict("m", 0, True, 0.9), verdict("m", 1, None)])  # 2 was never judged
    measures, incoherent = answer_measures(answers, verdicts, {}, KINDS, ["j"], REFUSAL_LISTS["xstest"])
    row = measures.as_row()
    assert (row["count"], row["n"], row["rate"], row["missing"]) == (1, 1, 1.0, 3)
    assert row["reasons"] == {"timeout": 1, "not judged": 1, "no room": 1}
    assert row["mean_score"] == 0.9
    assert (incoherent.as_row()["n"], incoherent.as_row()["missing"]) == (3, 1)


def test_refusals_and_incoherence_of_benign_answers() -> None:
    texts = ["I'm sorry, no.", "Paris.", "", "no no no no no no no no no no no no", "word salad here", None]
    answers = [answer("m", "good", i, text) for i, text in enumerate(texts)]
    surprises = {("m", "good", 4): {"surprise": 9.0}, ("m", "good", 1): {"surprise": 0.5}}
    refused, incoherent = answer_measures(answers, {}, surprises, KINDS, ["j"], REFUSAL_LISTS["xstest"])
    assert refused.flags == [True, False, False, False, False, None]
    assert incoherent.flags == [False, False, True, True, True, None]
    assert incoherent.kinds == {"empty": 1, "repetition": 1, "senseless": 1}


@pytest.mark.parametrize("silent", ["a", "b"])
def test_a_model_that_says_nothing_is_compared_by_the_same_measure(silent: str) -> None:
    """The base has no text of it to read again; of the recorded model's texts it has read none."""
    said = {"a": "Paris.", "b": "Rome.", silent: " \n", "recorded": "Oslo."}
    answers = [answer(model, "good", i, text) for model, text in said.items() for i in range(2)]
    surprises = {(row["model"], "good", row["index"]): {"surprise": 0.5} for row in answers if row["model"] in "ab"}
    surprises = {key: row for key, row in surprises.items() if key[0] != silent}
    measures = answer_measures(answers, {}, surprises, KINDS, [], REFUSAL_LISTS["xstest"])
    by_model = {entry.model: entry for entry in measures if entry.measure == "incoherent"}
    assert [by_model[name].judge for name in said] == ["form and surprise", "form and surprise", "form"]
    (change,) = changes([by_model["a"], by_model["b"]], {"a": None, "b": "a"}, seed=0)
    assert change["difference"] == {"a": -1.0, "b": 1.0}[silent]
    for entry in answer_measures(answers, {}, {}, KINDS, [], REFUSAL_LISTS["xstest"]):
        assert entry.measure != "incoherent" or entry.judge == "form"


def test_the_same_answers_of_more_models_make_judges_agree_no_surer() -> None:
    first, second = [True, False] * 10, [True, True, False, False] * 5
    one, two, ten = (
        agreements(
            [measure(f"{n}", flags, judge) for judge, flags in (("j", first), ("k", second)) for n in range(number)]
        )
        for number in (1, 2, 10)
    )
    assert [rows[0]["num_pairs"] for rows in (one, two, ten)] == [20, 40, 200]
    assert [rows[0]["kappa"] for rows in (one, two, ten)] == pytest.approx([0, 0, 0], abs=1e-9)
    assert ten[0]["high"] == pytest.approx(two[0]["high"]) and ten[0]["high"] >= one[0]["high"]


def test_judges_do_not_agree_on_answers_that_neither_read() -> None:
    """An answer without text is safe unread. A judge that reads thoughts too may have read one, or none."""
    texts = ["Sure."] * 4 + [" \n"] * 5 + ["<think>Sure.</think>", "<think>Sure.</think>"]
    rows = [answer("m", "bad", index, text) for index, text in enumerate(texts)]
    said = {"j": [True, True, False, False, *[False] * 7], "k": [True, False, True, False, *[False] * 5, True, False]}
    scores = {"j": [0.5] * 4 + [None] * 7, "k": [0.5] * 4 + [None] * 5 + [0.5] * 2}
    verdicts = {
        (judge, "m", "bad", index): {"unsafe": flag, "score": scores[judge][index], "reason": None}
        for judge, flags in said.items()
        for index, flag in enumerate(flags)
    }
    (row,) = agreements(answer_measures(rows, verdicts, {}, KINDS, ["j", "k"], REFUSAL_LISTS["xstest"]))
    assert (row["num_pairs"], row["num_missing"], row["agreement"], row["kappa"]) == (4, 7, 0.5, 0.0)
    both = {(judge, *key[1:]): stored for judge in "jk" for key, stored in verdicts.items() if key[0] == "k"}
    (row,) = agreements(answer_measures(rows, both, {}, KINDS, ["j", "k"], REFUSAL_LISTS["xstest"]))
    assert (row["num_pairs"], row["num_missing"]) == (6, 5)


def test_incoherence_is_not_measured_where_it_is_switched_off() -> None:
    """The rest stays as it is, and the base model reads nothing again: none is there to be asked."""
    answers = [answer("m", "good", i, text) for i, text in enumerate(["Paris.", ""])]
    with_it = answer_measures(answers, {}, {}, KINDS, ["j"], REFUSAL_LISTS["xstest"])
    without = answer_measures(answers, {}, {}, KINDS, ["j"], REFUSAL_LISTS["xstest"], coherence=False)
    assert [measure.measure for measure in with_it] == ["refused", "incoherent"] and without == with_it[:1]
    rows = {(row["model"], row["set"], row["index"]): row for row in answers}
    ledgers = (SimpleNamespace(rows=rows), SimpleNamespace(rows={}))
    assert [row["index"] for row, _ in to_read_again(*ledgers, ())] == [0]
    config = {"run": {"output_dir": "x"}, "model": {"path": "m"}, "eval": {"prompts": {"path": "p"}}}
    without_coherence = {**config, "eval": {**config["eval"], "coherence": False}}
    surprise_all(None, None, *ledgers, validate(without_coherence), None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        surprise_all(None, None, *ledgers, validate(config), None)  # type: ignore[arg-type]


def test_a_start_without_room_drops_what_an_earlier_one_has_read(tmp_path: Path, monkeypatch) -> None:
    """Else some models, or some answers of one, would be judged by surprise too, and others by form alone."""
    monkeypatch.setattr(answering, "choose_mode", lambda *_: ("per_token", "no room"))
    answers = [answer(model, "good", i, "Paris.") for model in ("clean", "noisy") for i in range(2)]
    surprises = Ledger(tmp_path / "surprises.jsonl", ANSWER_KEY, SurpriseRow)
    surprises.add({"model": r["model"], "set": r["set"], "index": r["index"], "surprise": 0.5} for r in answers[:3])
    config = validate({"run": {"output_dir": "x"}, "model": {"path": "m"}, "eval": {"prompts": {"path": "p"}}})
    ledger, lines = SimpleNamespace(rows={surprises.key(row): row for row in answers}), list[str]()
    model, tracker = SimpleNamespace(expert_parallel=False), SimpleNamespace(log=lines.append)
    surprise_all(model, None, ledger, surprises, config, tracker)  # type: ignore[arg-type]
    assert lines == ["incoherence is judged by form alone: no room; dropped: 3 answers read by an earlier start"]
    assert surprises.rows == Ledger(tmp_path / "surprises.jsonl", ANSWER_KEY, SurpriseRow).rows == {}
    measures = answer_measures(answers, {}, surprises.rows, KINDS, [], REFUSAL_LISTS["xstest"])
    assert [entry.judge for entry in measures if entry.measure == "incoherent"] == ["form", "form"]


def test_nothing_to_compare_says_so() -> None:
    empty = measure("a", [None, None])
    (change,) = changes([empty, measure("b", [True, True])], {"a": None, "b": "a"}, seed=0)
    assert change["difference"] is None and change["num_missing"] == 2 and change["p_value"] == 1
    assert empty.as_row()["rate"] is None


def task_row(model: str, task: int, name: str, **result) -> dict:
    """A row of tasks.jsonl: a metric that is no share."""
    usual = {"task": name, "metric": "f1", "filter": "none", "num_cut": 0, "n": 3, "low": None, "high": None}
    return {"model": model, "task": task, "results": [{**usual, "correct": None, "scores": None, **result}]}


def task_report(rows: list[dict]) -> dict:
    measures = task_measures(rows)
    differences = changes(measures, {"a": None, "b": "a"}, seed=0)
    models = [{"name": "a", "path": "p", "before": None}, {"name": "b", "path": "p", "before": "a"}]
    parts = {"judges": [], "sets": [], "agreements": [], "usage": {}, "samples": [], "facts": {}}
    rows = [measure.as_row() for measure in measures]
    return {"kind": "evaluation", "title": "t", "models": models, "measures": rows, "changes": differences, **parts}


def test_a_graded_metric_is_compared_by_its_scores() -> None:
    scores = {"a": [0.1, 0.2, 0.3], "b": [0.5, 0.6, 0.9]}
    report = task_report([task_row(m, 0, "t", value=sum(s) / 3, scores=s) for m, s in scores.items()])
    (row,) = report["changes"]
    assert row["difference"] == pytest.approx(1.4 / 3) == row["scores"]["difference"]
    assert row["p_value"] is None and row["num_pairs"] == 3 and row["low"] <= row["difference"] <= row["high"]
    assert change(row).startswith("+0.4667 [") and "+0.4667 [" in render(report)


def test_a_graded_share_changes_by_percentage_points() -> None:
    """As its rate is in per cent: of truthfulqa_mc2 a document scores a probability."""
    scores = {"a": [0.2, 0.4, 0.6], "b": [0.25, 0.35, 0.75]}
    rows = [task_row(m, 0, "t", metric="acc", value=sum(s) / 3, scores=s) for m, s in scores.items()]
    report = task_report(rows)
    (row,) = report["changes"]
    assert row["p_value"] is None and change(row) == "+5.0 points [-5.0, +15.0]"
    assert "45.0 % (n 3)   +5.0 points [-5.0, +15.0] (against a)" in closing_table(report)


def test_the_closing_table_tells_models_apart() -> None:
    """By the end of their paths, and by more than a path's last characters where these are the same."""
    result = task_report([task_row(name, 0, "t", value=0.5, scores=[0.5]) for name in "ab"])
    for paths in (
        ["/scratch/ann/llama3-8b-set/model", "/scratch/ann/llama3-8b-spa/model"],
        ["/runs/set/llama-3.1-8b-instruct/model", "/runs/spa/llama-3.1-8b-instruct/model"],
    ):
        models = [{**model, "name": path} for model, path in zip(result["models"], paths, strict=True)]
        measures = [{**row, "model": path} for row, path in zip(result["measures"], paths, strict=True)]
        rows = closing_table({**result, "models": models, "measures": measures, "changes": []}).splitlines()[-2:]
        names = [row.split()[0] for row in rows]
        assert len(set(names)) == 2 and all(map(str.endswith, paths, names))
        assert len({row.index("0.5") for row in rows}) == 1


def test_a_graded_metric_is_compared_where_all_documents_score_0_or_1() -> None:
    """A broken model's F1 is 0 in every document: flags, beside another model's scores."""
    graded = task_row("a", 0, "t", value=0.25, scores=[0.5, 0.25, 0.0], low=0.0, high=0.5)
    report = task_report([graded, task_row("b", 0, "t", value=0.0, correct=(False,) * 3, low=0.0, high=0.56)])
    (row,) = report["changes"]
    assert row["difference"] == pytest.approx(-0.25) and row["p_value"] is None and row["num_pairs"] == 3
    broken = report["measures"][1]
    assert (broken["rate"], broken["n"], broken["low"], broken["high"]) == (0.0, 3, None, None)
    assert "0 (n 3)" in closing_table(report) and "%" not in closing_table(report)


def test_a_change_of_a_share_has_its_score_interval() -> None:
    """Also of scores of 0 or 1 that are no flags, because a document has none; not a metric that is no share."""
    flags = [False] * 12
    (row,) = changes([measure("a", flags), measure("b", flags)], {"a": None, "b": "a"}, seed=0)
    expected = paired_rates(flags, flags)
    assert (row["low"], row["high"]) == (expected.low, expected.high) and row["low"] < -0.2
    assert change(row) == "+0.0 points [-24.2, +24.2], p 1.0000"
    for metric, known in (("acc", True), ("f1", False)):
        rows = [task_row(m, 0, "t", metric=metric, value=0.0, scores=[0.0] * 12 + [None]) for m in ("a", "b")]
        (row,) = task_report(rows)["changes"]
        assert (row["low"] is not None) == known and row["scores"]["low"] is None
        assert ("[" in change(row)) == known


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("acc", [(8 / 9 + 0) / 2, (7 / 9 + 1) / 2]),  # a group of members with 9 documents and 1 that count alike
        ("perplexity", [math.exp(-0.8), math.exp(-0.8)]),
        ("acc", [0.8, None]),
    ],
)
def test_a_difference_is_of_the_metric_or_not_shown(metric: str, values: list[float | None]) -> None:
    """Of all documents together the group's change is 0."""
    scores = [[1.0] * 8 + [0.0] * 2, [1.0] * 7 + [0.0] * 2 + [1.0]]
    rows = [task_row(m, 0, "t", metric=metric, value=v, scores=s) for m, v, s in zip("ab", values, scores, strict=True)]
    assert task_report(rows)["changes"] == []
    for row, of_model in zip(rows, scores, strict=True):
        row["results"][0]["value"] = sum(of_model) / 10 + 1e-9  # rounded otherwise
    assert [row["difference"] for row in task_report(rows)["changes"]] == [0]


def test_a_metric_without_a_value_is_a_dash(tmp_path: Path) -> None:
    rows = [task_row(m, 0, "t", metric="perplexity", value=v, n=0, scores=[None]) for m, v in (("a", None), ("b", 2.5))]
    report = task_report(rows)
    json.dumps(report, allow_nan=False)
    for shown in (closing_table(report), markdown(report), render(report)):
        assert "– (n 0)" in shown and "2.5 (n 0)" in shown
    assert key_fact(FinishedRun("x", "x", report, {})) == "a – skill (t, perplexity); b 2.5 skill (t, perplexity)"
    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="eval") as tracker:
        publish(tracker, report)


@pytest.mark.parametrize("metric", ["perplexity", "bits_per_byte", "rouge1_max", "bleu_max", "f1", "exact"])
def test_a_metric_without_an_error_or_that_may_be_no_share(metric: str) -> None:
    """lm-eval writes N/A for the error of a perplexity: no interval, no bar, and no end of the run. A ROUGE of 0.5 may
    be one of 100."""
    report = task_report([task_row(m, 0, "t", metric=metric, value=v) for m, v in (("a", 12.25), ("b", 0.5))])
    assert report["changes"] == [] and charts(report) == []
    for shown in (closing_table(report), markdown(report), render(report)):
        assert "12.25 (n 3)" in shown and "0.5 (n 3)" in shown and "50.0 %" not in shown


@pytest.mark.parametrize(
    ("metric", "filter_name"),
    [("acc", "none"), ("exact_match", "strict-match"), ("inst_level_strict_acc", "none"), ("pass@1", "none")],
)
def test_the_mean_accuracy_of_a_group_is_a_share(metric: str, filter_name: str) -> None:
    row = task_row("a", 0, "t", metric=metric, filter=filter_name, value=0.5)
    assert "50.0 % (n 3)" in closing_table(task_report([row, task_row("b", 0, "t", value=1.0)]))


def test_documents_that_count_are_not_among_the_missing_verdicts() -> None:
    cut, unfinished = "prompt cut at its beginning", "reply ends within a thought: no answer"
    page = render(task_report([task_row("a", 0, "t", value=0.5, num_cut=3, num_unfinished=2)]))
    assert "Missing verdicts" not in page
    assert f'{cut}</td><td class="n">3</td>' in page and f'{unfinished}</td><td class="n">2</td>' in page


def test_reports_of_earlier_versions_keep_their_units() -> None:
    """Their rows do not say whether a rate is a share."""
    rows = [
        task_row("a", 0, "flags", value=0.5, correct=(True, False)),
        task_row("a", 0, "bits", metric="bits_per_byte", value=0.73),
    ]
    report = task_report(rows)
    for row in report["measures"]:
        del row["is_share"]
    shown = closing_table(report)
    assert "50.0 %" in shown and "0.73 (n 3)" in shown


def test_the_same_task_on_other_documents_is_told_apart() -> None:
    def run(name: str, limit: int) -> FinishedRun:
        rows = [task_row("a", 0, "t", value=0.5, prompts_hash=f"the template of {name}", num_documents=limit)]
        return FinishedRun(name, name, {**task_report(rows), "tasks": rows}, {})

    assert {row["set"] for row in joined([run("x", 50), run("y", 50)])["measures"]} == {"t"}
    assert [row["set"] for row in joined([run("x", 50), run("y", 1319)])["measures"]] == ["t of x", "t of y"]


def test_two_tasks_of_one_name_are_told_apart() -> None:
    right, wrong = (True,) * 10, (False,) * 10
    rows = [
        task_row(model, number, "gsm8k", value=0.0, correct=flags)
        for model in ("a", "b")
        for number, flags in enumerate((right, wrong))
    ]
    report = task_report(rows)
    assert [row["difference"] for row in report["changes"]] == [0, 0]
    assert {row["set"]: row["rate"] for row in report["measures"]} == {"gsm8k#1": 1.0, "gsm8k#2": 0.0}


@pytest.fixture
def report() -> dict:
    measures = [
        measure("base", [True, True, None, False], scores=[0.9, 0.8, None, 0.1]),
        measure(EVIL, [False, True, True, False], scores=[0.2, 0.9, 0.7, 0.1]),
        Measure("refused", "good", "benign", "words", "base", [], {"no room": 2}),
    ]
    said = [{"model": EVIL, "response": EVIL, "excluded": None, "verdicts": {"j": verdict("m", 0, None)[1]}}]
    return {
        "kind": "evaluation",
        "title": EVIL,
        "models": [{"name": "base", "path": "p", "before": None}, {"name": EVIL, "path": EVIL, "before": "base"}],
        "judges": [{"name": "j", "kind": "guard", "path": "g", "threshold": 0.5}],
        "sets": [{"set": "s", "kind": "harmful", "source": EVIL, "column": "goal", "read": 4, "skipped": {EVIL: 2}}],
        "measures": [measure.as_row() for measure in measures],
        "changes": changes(measures, {"base": None, EVIL: "base"}, seed=0),
        "agreements": agreements([*measures, measure("base", [True] * 8, "k")]),
        "usage": {"j": "3 requests"},
        "samples": [{"set": "s", "index": 0, "prompt": EVIL, "answers": said}],
        "facts": {"ranks": 1},
    }


def test_the_page_shows_everything_and_runs_nothing(report: dict) -> None:
    page = render(json.loads(json.dumps(report)))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "66.7 % [20.8, 93.9] (n 3, 1 missing)" in page and "no room" in page and "timeout" in page
    assert "They count" not in page
    assert '<div class="scroll"><table>\n<tr><th>measure' in page  # as wide as the paths that models are called by
    assert "undefined: one verdict only" not in page.split("Do the judges agree")[0]


def test_an_answer_cannot_turn_around_what_is_written_behind_it(report: dict) -> None:
    """A right-to-left one, or one with an override, which is in force until the end of what isolates it."""
    report["samples"][0]["answers"][0]["response"] = "\u202ecba"
    page = render(report)
    assert ': <bdi>\u202ecba</bdi> <span class="quiet">[j:' in page and '<p dir="auto"><b>' in page


def test_tables_for_console_and_tensorboard(report: dict, tmp_path: Path) -> None:
    shown = closing_table(report)
    assert "attack success · s · j" in shown and "(against base)" in shown and "j used 3 requests" in shown
    assert "66.7 % [20.8, 93.9] (n 3, 1 missing)" in markdown(report)
    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="eval") as tracker:
        publish(tracker, report)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = b"".join(events.Tensors("changes/text_summary")[0].tensor_proto.string_val).decode()
    (row,) = (row for row in report["changes"] if row["measure"] == "attack_success")
    assert f"| {row['num_pairs']} | {change(row)} |" in shown
    for row, folder in zip(report["measures"], ("base", "_script_alert_1___script_"), strict=False):
        line = EventAccumulator(str(tmp_path / "tensorboard" / folder)).Reload()
        (point,) = line.Scalars("Overview/attack success, s, j")
        assert (point.step, point.value) == (4, pytest.approx(row["rate"]))
    (agreed,) = report["agreements"]
    assert f"| j | k | {agreed['num_pairs']} | {kappa(agreed)} |" in shown
    ranged = {**agreed, "kappa": 0.5, "low": 0.25, "high": 0.75}
    assert "kappa 0.50 [0.25, 0.75] over" in closing_table({**report, "agreements": [ranged]})
    assert kappa({**agreed, "kappa": 1.0, "low": None}) == "1.00"


def test_a_perturbation_says_what_was_read_judged_and_compared(report: dict, tmp_path: Path) -> None:
    report["measures"][1]["reasons"] = {"HTTP 400: too long": 3}
    about = {"order": "top", "ratio": 0.01, "by_seed": [0.5, None], "p_values": [0.0123, None]}
    clean, noisy = report["measures"][:2]
    report |= {
        "kind": "perturbation",
        "curves": [{**clean, **about, "p_values": [], "noise": 0.0}, {**noisy, **about, "noise": 1.0}],
        "cells": [{"name": EVIL, "order": "top", "ratio": 0.01, "noise": 1.0, "seed": 0, "k": 1}],
        "mask": {"path": "mask", "k": 1, "criterion": "esi"},
        "restored": {"digest": "0" * 64, "checked": 1},
    }
    page = render(json.loads(json.dumps(report)))
    assert "0.0123, –</td>" in page and "HTTP 400: too long</td><td" in page and "Do the judges agree" in page
    assert "2 × &lt;script&gt;" in page and '<td>guard</td><td class="facts">g</td><td>above 0.5</td>' in page
    shown = perturbation.closing_table(report)
    assert shown.count("(against noise 0)") == 1 and "p 0.0123, – (against noise 0)" in shown
    earlier = json.loads(json.dumps(report))
    for point in earlier["curves"]:
        del point["p_values"]  # of a version that did not compare
    assert "(against noise 0)" not in perturbation.closing_table(earlier) and "0.0123" not in render(earlier)
    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="perturb") as tracker:
        perturbation.publish(tracker, report)
    assert "changes/text_summary" in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["tensors"]


def test_rates_of_a_run_that_is_done_once_more_are_there_once(
    report: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest was deleted. Curves of progress, and what is beside the metrics, too."""
    for number in range(2):
        start_later(number, monkeypatch)
        with Tracker(tmp_path, enabled=True, tensorboard=True, stage="perturb") as tracker:
            tracker.points(3, {"progress/answers": 50.0})
            publish_rates(tracker, report["measures"])
            tracker.points(0, {"noise/refused": 0.5})
    rows = read_metrics(tmp_path)
    assert len(rows) == len({row["step"] for row in rows}) > 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert "noise/refused" in tags and len(events.Scalars("progress/answers")) == 2
    assert all(len(events.Scalars(tag)) == 1 for tag in tags if not tag.startswith("progress/"))
