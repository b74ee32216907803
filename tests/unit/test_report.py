"""What a person sees: the numbers in the tables, the page, the console, TensorBoard, the mask tool's words."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from mask_folders import write_mask
from matplotlib.text import Text

from esi_ds import tracking
from esi_ds.artifacts import RunFolder
from esi_ds.data.thoughts import MARKS
from esi_ds.launch.report import main as command
from esi_ds.report import figures, tables
from esi_ds.report.html import render, render_overview, write_report
from esi_ds.report.overview import FinishedRun
from esi_ds.report.publish import closing_table, publish
from esi_ds.stages.esi.finish import response_facts
from esi_ds.status import main as status
from esi_ds.tracking import Tracker


def unit(name: str, role: str, layer, expert, numel: int, selected: int, mean: float) -> dict:
    return {
        "name": name,
        "parameter": name,
        "role": role,
        "layer": layer,
        "expert": expert,
        "numel": numel,
        "selected": selected,
        "mean_score": mean,
        "max_score": 2 * mean,
        "sigma": 0.1,
    }


def report(units: list[dict], prompt: str = "How?") -> dict:
    return {
        "title": "A title",
        "facts": {"model": "m", "ranks": 2},
        "selection": {
            "k": sum(row["selected"] for row in units),
            "total_numel": 1000,
            "scored_numel": 900,
            "threshold": 1e-3,
            "criterion": "esi",
            "order": "top",
            "ratio": 0.01,
            "of": "all",
            "scope": "model",
        },
        "units": units,
        "score_histogram": {"log10_edges": [-4.0, -3.0, -2.0], "counts": [5, 3], "zeros": 2},
        "score_histograms_by_role": {"attention.q": [5, 3]},
        "judge_scores": [1.0, 3.0],
        "excluded": [{"index": 7, "prompt": prompt, "reason": "the response is empty"}],
        "special_tokens_broken_up": 1,
        "samples": [{"index": 0, "prompt": prompt, "response": "<b>No</b>", "judge_score": 1.5}],
        "progress": [
            {"step": 1, "judge_score": None, "gradient_norm": 2.0},
            {"step": 2, "judge_score": 1.0, "gradient_norm": 1.0},
        ],
    }


DENSE = [
    unit("a", "attention.q", 0, None, 100, 10, 1.0),
    unit("b", "attention.q", 1, None, 300, 30, 2.0),
    unit("c", "mlp.down", 1, None, 100, 0, 5.0),
    unit("d", "head", None, None, 100, 10, 0.5),
]


def test_layer_by_role_shares_densities_and_means() -> None:
    share, density, mean = tables.layer_by_role(DENSE, 50)
    assert share.columns == ["attention.q", "mlp.down"] and share.rows == ["0", "1"]
    assert share.values[0][0] == 20.0 and math.isnan(share.values[0][1]) and share.values[1] == [60.0, 0.0]
    assert density.values[1] == [10.0, 0.0] and mean.values[1] == [2.0, 5.0]
    assert tables.layer_by_expert(DENSE, 50) == []
    assert [row["name"] for row in tables.top_matrices(DENSE)] == ["b", "a", "d"]


def test_experts_add_up_their_matrices() -> None:
    units = [
        unit(f"e{e}{part}", f"expert.{part}", 3, e, 10, e + 1, float(e))
        for e in range(2)
        for part in ("gate", "up", "down")
    ]
    share, density, mean = tables.layer_by_expert(units, 9)
    assert share.values == [[pytest.approx(100 / 3), pytest.approx(200 / 3)]]
    assert density.values == [[10.0, 20.0]] and mean.values == [[0.0, 1.0]]


def test_the_page_is_self_contained_and_shows_data_as_data() -> None:
    page = render(report(DENSE, prompt="<script>alert(1)</script>"))
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>No</b>" not in page
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    assert page.count("<svg ") == 3 and page.count('<table class="heat') == 6  # three maps, and their numbers
    assert re.findall(r'<svg role="img" aria-label="[^"<]+" style="min-width:(\d+)px"', page) == ["589", "403", "589"]


def test_pages_name_facts_by_what_they_are() -> None:
    """The keys of report.json stay."""
    facts = {"model": "m", "ranks": 2, "seed": 0, "wall time (s)": 13.6, "mask fingerprint": "f"}
    done: dict = {**report(DENSE), "facts": facts}
    page = render(done)
    assert "<th>mask made from</th>" in page and "<th>wall time before this page (s)</th>" in page
    for seconds, shown in ((21.0, "21"), (12345.6, "12,346"), (1e30, "1e+30")):
        run = FinishedRun("a", "a.html", done, {"wall_time_s": seconds, "finished": "today"})  # type: ignore[arg-type]
        assert f'<td class="n">{shown}</td><td>today</td>' in render_overview([run, run], [])


NAMES = [r"$\frac{$", "a$b$c^_{", "_hidden", "new\nline\0 and \ud800", "wide " * 2000, "x$", "\\$1$"]


def begin(folder: Path, state: str | None, content: dict | None = None) -> str:
    """A run folder with this state in its manifest (None: no manifest yet), and a report where it is done."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    if state == "done":
        (folder / "report.json").write_text(json.dumps(content or report(DENSE)))
    if state:
        facts = {"world_size": 1, "started": 0.0, "model_fingerprint": "f", "data": {}}
        RunFolder(str(folder)).write_manifest(exit_state=state, **facts)
    return str(folder)


@pytest.mark.parametrize("state", [None, "running", "interrupted", "failed"])
def test_runs_that_have_not_finished_are_left_out_of_the_page_of_several(
    state: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, begun = begin(tmp_path / "one", "done"), begin(tmp_path / "t#2", "done"), begin(tmp_path / "b", state)
    (tmp_path / "page.html").touch()
    (tmp_path / "demo.log").touch()  # as `make demo` writes it
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):  # the second time RUNS/* holds the page, too
        assert (
            command([one, two, f"{two}/../t#2", begun, *map(str, [*tmp_path.glob("*.html"), tmp_path / "demo.log"])])
            == 0
        )
        said, file = capsys.readouterr(), f"left out: {tmp_path}/demo.log is a file\n"
        assert said.err == f"{file}left out: {begun} has not finished\n" and said.out.count("report.html\n") == 2
    page = (tmp_path / "overview.html").read_text()
    assert "had not finished: b<" in page and "2 runs" in page and 'href="t%232/report.html"' in page
    assert not list((tmp_path / "b").glob("*.html"))
    assert status([one, str(tmp_path / "overview.html"), str(tmp_path / "demo.log")]) == 0
    assert capsys.readouterr().err == file
    for runs, problem in (
        ([begun], "has not finished; give its command again"),
        ([one, two, str(tmp_path / "elsewhere")], "holds no report.json"),
        ([one, str(tmp_path / "nowhere")], "holds no report.json"),
        ([str(tmp_path / "overview.html")], "holds no report.json"),
    ):
        assert command(runs) == 2 and problem in capsys.readouterr().err
    (tmp_path / "one/report.json").unlink()  # a finished run that has lost it is no unfinished one
    assert command([one, two]) == 2 and "holds no report.json" in capsys.readouterr().err


def test_pages_show_runs_of_the_kind_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    esi, other = begin(tmp_path / "esi", "done"), begin(tmp_path / "eval", "done", {"kind": "evaluation"})
    strange, foreign = begin(tmp_path / "s", "done", {"kind": ["x"]}), begin(tmp_path / "f", "done", {"kind": "tuning"})
    torn = begin(tmp_path / "torn", None)
    (tmp_path / "torn/report.json").write_text("{")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for options, problem in (
        ([esi, "--tuned", other], f"--tuned = {other}: is an evaluation, not a SET or SPA run; give a SET or SPA run"),
        ([esi, "--evaluated", esi], f"--evaluated = {esi}: is an ESI run, not an evaluation"),
        ([other, "--evaluated", other], f"RUN = {other}: is an evaluation, not an ESI run"),
        ([esi, "--tuned", str(tmp_path)], f"--tuned = {tmp_path}: holds no report.json"),
        ([esi, "--output", str(tmp_path)], f"--output = {tmp_path}: is a folder"),
        ([esi, "--output", f"{esi}/config.yaml"], "config.yaml: is a file of a run"),
        ([esi, "--output", f"{tmp_path}/{'x' * 256}"], "is not in a writable folder"),
        ([esi, "--tuned", strange], f"--tuned = {strange}: is a perturbation, not a SET or SPA run"),
        ([esi, "--tuned", torn], f"--tuned = {torn}/report.json"),
        ([esi, torn], f"RUN = {torn}/report.json"),
        ([esi, foreign], f"RUN = {foreign}/report.json: is not a report of this version"),
        ([str(tmp_path / "loop")], f"RUN = {tmp_path}/loop: holds no report.json"),
        ([esi, "--output", str(tmp_path / "a/b.html")], "b.html: is not in a writable folder"),
        ([esi, "--output", f"{esi}/config.yaml/b.html"], "b.html: is not in a writable folder"),
    ):
        assert command(options) == 2 and problem in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html")) and not (tmp_path / "a").exists()


def test_names_are_drawn_as_they_are_written() -> None:
    units = [unit(name, name, 0, None, 100, 10, 1.0) for name in NAMES]
    page = {**report(units), "score_histograms_by_role": {name: [5, 3] for name in NAMES}}
    assert render(page).count("<svg ") == 3
    cell = {"rate": 0.5, "low": 0.4, "high": 0.6}
    rows = [{"set": name, "judge": name, "cells": [cell] * len(NAMES)} for name in NAMES]
    bars = figures.rate_bars(NAMES[0], rows, NAMES)
    drawn = [text.get_text() for text in bars.axes[0].get_legend().get_texts()]
    assert len(drawn) == len(NAMES)  # none is left out
    points = [{"ratio": 0.1, "order": n, "noise": 1.0, "rate": 0.5, "low": 0.4, "high": 0.6} for n in NAMES]
    losses = figures.loss_curves([(name, [{"step": 1, "loss": 1.0}]) for name in NAMES])
    for figure in (bars, losses, figures.noise_curves(NAMES[0], points)):
        width, height = matplotlib.image.imread(io.BytesIO(figures.figure_png(figure))).shape[1::-1]
        assert width < 4000 and height < 4000
    shown = Text(text=figures.as_label(NAMES[1]))._preprocess_math(figures.as_label(NAMES[1]))
    assert shown == (NAMES[1], False)


def rates(set_name: str, judge: str) -> dict:
    cell = {"rate": 0.5, "low": 0.4, "high": 0.6}
    return {"measure": "m", "set": set_name, "judge": judge, "cells": [cell], "changes": [None]}


@pytest.mark.parametrize(("score", "judged"), [("margin", "25.0 % (1 of 4 responses)"), ("logit", None)])
def test_shares_of_unsafe_and_refusing_responses(score: str, judged: str | None) -> None:
    """Of the responses used, which are not the first ones; a safe logit alone is no verdict."""
    judge = SimpleNamespace(section=SimpleNamespace(score=score))
    responses = ["left out", "Sure, do this.", "I'm sorry, I cannot help with that.", "I cannot assist you.", "Hello."]
    inputs = SimpleNamespace(judge=judge, marks=MARKS)
    scores = {1: -2.0, 2: 3.0, 3: 0.5, 4: 0.0}
    facts = response_facts(SimpleNamespace(inputs=inputs, responses=responses, scores=scores))  # type: ignore[arg-type]
    assert facts.get("judged unsafe") == judged and facts["refused (by words)"] == "50.0 % (2 of 4 responses)"
    whole = {**report(DENSE), "facts": facts}
    page, table = render(whole), closing_table(whole)
    assert "<b>50.0 %</b>refused (by words)" in page and "refused (by words): 50.0 % (2 of 4 responses)" in table
    assert ("<b>25.0 %</b>judged unsafe" in page, "judged unsafe: 25.0 %" in table) == (bool(judged), bool(judged))


def test_charts_of_one_page_begin_in_line() -> None:
    """The pictures are cut at their labels, which are of other lengths in each."""
    rows = [rates("harmbench", "a judge with a long name"), rates("xstest", "words")]
    begins = []
    for one in rows:
        for beside in ([], rows):
            figure = figures.rate_bars("title", [one], ["model"], beside)
            figure.canvas.draw()
            left = figure.get_tightbbox().x0 * figure.dpi
            begins.append(figure.axes[0].get_window_extent().x0 - left)
            figures.figure_png(figure)
    alone, in_line = begins[::2], begins[1::2]
    assert alone[0] > alone[1] + 50 and in_line[0] == pytest.approx(in_line[1], abs=1)


def test_small_scores_are_written_out_beside_the_heatmap() -> None:
    """Not as a factor of its own over the bar, as 1e−5 was."""
    data = tables.Heatmap("scores", ["0", "1"], ["q", "k"], [[1e-5, 2e-5], [3e-5, 4e-5]], "mean score", "layer", "role")
    figure = figures.heatmap(data)
    figure.canvas.draw()
    bar = figure.axes[1]
    assert not bar.yaxis.get_offset_text().get_text()
    assert "4e-05" in [label.get_text() for label in bar.get_yticklabels()]
    figures.figure_png(figure)


def test_a_large_mixture_and_a_run_without_prompts(tmp_path: Path) -> None:
    units = [
        unit(f"{layer}.{expert}", "expert.up", layer, expert, 10, 1, 1e-6)
        for layer in range(94)
        for expert in range(128)
    ]
    bare = {**report(units), "judge_scores": [], "excluded": [], "samples": [], "progress": []}
    bare["selection"] = {**bare["selection"], "threshold": None}
    write_report(tmp_path, bare)
    page, half = (tmp_path / "report.html").read_text(), "half lie in"
    assert "Experts" in page and half in page
    assert half not in render({**bare, "units": [{**row, "selected": 0} for row in units]})
    assert json.loads((tmp_path / "report.json").read_text())["units"][5]["expert"] == 5
    assert "12,032 of 1,000 weights, threshold -" in closing_table(bare)


def test_the_closing_table_fits_a_terminal() -> None:
    text = closing_table(report(DENSE))
    assert max(map(len, text.splitlines())) <= 100
    assert "attention.q              40    80.00%   10.000%          1.75" in text
    assert "judge score: mean 2, least 1, greatest 3 (2 responses used, 1 excluded)" in text


def test_tensorboard_and_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="esi") as tracker:
        tracker.scalars(1, {"judge_score": 1.0, "bad": float("nan")})
        tracker.scalars(2, {"judge_score": 2.0})
        tracker.resume_at(1)  # within one process: after a gradient that is not finite
        tracker.scalars(3, {"judge_score": 3.0})
        publish(tracker, report(DENSE))
        tracker.log("a line")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3] and rows[0]["bad"] is None
    assert "a line" in (tmp_path / "log.txt").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("judge_score")] == [1.0, 3.0]
    histogram = events.Histograms("log10_score/all")[0].histogram_value
    assert histogram.num == 8 and histogram.bucket[-2:] == [5.0, 3.0]
    assert histogram.bucket_limit[-2:] == [-3.0, -2.0] == report(DENSE)["score_histogram"]["log10_edges"][1:]
    assert len(events.Images("roles/share_of_mask")) == 1
    assert "Overview/Where the mask is: layer by role" in events.Tags()["images"]


def start_later(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of the seconds in their names."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: 1e9 + number))


def test_tensorboard_shows_what_a_resumed_run_has_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three restarts, also in the overview; curves of progress, which count other things than steps, stay."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    starts = [(1, 5), (3, 6), (2, 4), (5, 5)]  # first and last step of each
    for number, (first, last) in enumerate(starts):
        start_later(number, monkeypatch)
        with Tracker(tmp_path, enabled=True, tensorboard=True, stage="set") as tracker:
            tracker.points(30, {f"progress/{number}": 50.0})
            tracker.resume_at(first - 1)
            for step in range(first, last + 1):
                tracker.overview(step, {"loss": 10.0 * number + step})
                tracker.scalars(step, {"loss": 10.0 * number + step})
            tracker.points(40, {f"progress/{number}": 100.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [(row["step"], row["loss"]) for row in rows]
    assert measured == [(1, 1.0), (2, 22.0), (3, 23.0), (4, 24.0), (5, 35.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag in ("loss", "Overview/loss"):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == measured
    for number in range(len(starts)):
        points = [(event.step, event.value) for event in events.Scalars(f"progress/{number}")]
        assert points == [(30, 50.0), (40, 100.0)]


def test_a_phase_that_goes_on_or_back_draws_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its last checkpoint after a kill, then back within the process; from 0, where a bar counts what waits."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(tracking, "POINT_S", 0.0)
    starts = [(0, 12, [1] * 9), (5, 12, [1, 1, 1, -2, 1, 1, 1, 1, 1, 1]), (0, 6, [2] * 3)]
    curves = [[*range(1, 10)], [*range(1, 13)], [1, 2, 4, 6]]
    for number, ((initial, total, advances), steps) in enumerate(zip(starts, curves, strict=True)):
        start_later(number, monkeypatch)
        with Tracker(tmp_path, enabled=True, tensorboard=True, stage="set") as tracker:
            if number == 0:
                tracker.text("answers/0", "beside the curves")
                tracker.points(30, {"progress/answer": 100.0})
            with tracker.progress(total=total, initial=initial, unit="step", description="tune") as bar:
                for advance in advances:
                    bar.advance(advance, 10)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        for group in ("progress", "speed", "tokens_per_second"):
            assert [point.step for point in events.Scalars(f"{group}/tune")] == steps
        assert [point.value for point in events.Scalars("progress/tune")][-1] == 100 * steps[-1] / total
        assert len(events.Scalars("progress/answer")) == len(events.Tensors("answers/0/text_summary")) == 1


def test_what_one_restart_has_withdrawn_does_not_come_back_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    starts = [
        (0, [(5, "first"), (10, "first"), (20, "first"), (41, "second")]),
        (10, [(20, "first")]),
        (15, [(20, "first"), (41, "second")]),
    ]
    for number, (resumed_at, points) in enumerate(starts):
        start_later(number, monkeypatch)
        with Tracker(tmp_path, enabled=True, tensorboard=True, stage="esi") as tracker:
            tracker.resume_at(resumed_at)
            for step, name in points:
                tracker.scalars(step, {name: 0.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("first")] == [5, 10, 20]
    assert [event.step for event in events.Scalars("second")] == [41]


def test_tensorboard_opens_with_one_chart_a_measure_and_a_line_a_model(tmp_path: Path) -> None:
    """It was a card for each measure, set, judge and model: 22 of attack success. A line is a run within the run."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    path = f"/scratch/{'a-long-path/' * 6}"
    names = ["base", "SET", "a/b", "a_b", "../up", ".", f"{path}seed0/model", f"{path}seed1/model"]
    with Tracker(tmp_path / "eval", enabled=True, tensorboard=True, stage="eval") as tracker:
        for number, name in enumerate(names):
            for step in (4, 8):
                tracker.overview(step, {"attack success, s, j": number / 10, "skill": math.nan}, name)
        tracker.overview(1, {"loss": 2.0})
        tracker.scalars(8, {"attack_success/s/j/base": 0.0})
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().Runs()
    assert len(runs) == 1 + len(names), "models share a line"
    lines = [f"eval/tensorboard/{name}" for name in ("base", "SET", "a_b", "a_b #2", "_up", "_")]
    assert set(runs) > {"eval/tensorboard", *lines}  # nothing outside the run's folder
    lines += [run for run in runs if run.endswith(("seed0_model", "seed1_model"))]
    assert len(lines) == len(names)
    assert all(runs[line]["scalars"] == ["Overview/attack success, s, j"] for line in lines)
    first = sorted(tag for run in runs.values() for tag in run["scalars"])[0]
    assert first.startswith("Overview/") and "Overview/loss" in runs["eval/tensorboard"]["scalars"]
    assert "attack_success/s/j/base" in runs["eval/tensorboard"]["scalars"]


def test_lines_of_the_overview_are_on_the_disk_when_the_next_phase_begins(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="eval") as tracker:
        tracker.overview(4, {"attack success": 0.5}, "base")
        tracker.progress(total=4, initial=0, unit="answer", description="judge: guard").close()
        events = EventAccumulator(str(tmp_path / "tensorboard/base")).Reload()
        assert [event.value for event in events.Scalars("Overview/attack success")] == [0.5]


def test_tuning_opens_with_refusals_before_and_after(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from esi_ds.report.tuning import publish as publish_tuning

    rows = [
        {"set": "harmful", "n": 4, "refused_before": 1, "refused_after": 4},
        {"set": "benign", "n": 4, "refused_before": None, "refused_after": 2},
        {
            "set": "thinks",
            "n": 4,
            "refused_before": 0,
            "unfinished_before": 4,
            "refused_after": 1,
            "unfinished_after": 2,
        },
    ]
    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="set") as tracker:
        publish_tuning(tracker, {"samples": [], "refusals": rows, "steps": 30})
    for name, points in (("harmful", [(0, 0.25), (30, 1.0)]), ("benign", [(30, 0.5)]), ("thinks", [(30, 0.5)])):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        shown = events.Scalars("Overview/refused, before and after, by words")
        assert [(event.step, event.value) for event in shown] == points


def test_tensorboard_shows_a_phase_while_the_run_goes_on(tmp_path: Path) -> None:
    """Read from the disk before the tracker is closed, as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = [f"/scratch/ann/models/llama-3.1-8b-{name}/model" for name in ("set", "spa")]
    with Tracker(tmp_path, enabled=True, tensorboard=True, stage="eval") as tracker:
        for path in paths:
            with tracker.progress(total=1, initial=0, unit="answer", description=f"answer: {path}") as bar:
                bar.update(1)
            assert bar.format_dict["prefix"] == f"answer: {path[-32:]}"
        with tracker.progress(total=8, initial=2, unit="answer", description="answer: base") as bar:
            for _ in range(3):
                bar.update(2)
        tracker.progress(total=4, initial=0, unit="answer", description="judge: guard").close()
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        found = [(event.step, event.value) for event in events.Scalars("progress/answer/base")]
        assert found[0] == (4, 50.0) and found[-1] == (8, 100.0)
        assert all(event.value > 0 for event in events.Scalars("speed/answer/base"))
        assert all(events.Scalars(f"progress/answer/{path}") for path in paths)
    assert not (tmp_path / "metrics.jsonl").exists()  # what was measured stands there, not how far it is


def test_a_silent_tracker_writes_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path, enabled=False, tensorboard=True, stage="esi") as tracker:
        tracker.scalars(1, {"a": 1.0})
        tracker.log("x")
        tracker.overview(1, {"a": 1.0}, "base")
        publish(tracker, report(DENSE))
    assert list(tmp_path.iterdir()) == []


def test_overlap_of_two_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from esi_ds.mask import main

    name = "model.layers.3.self_attn.v_proj.weight"
    for folder, chosen in (("one", [0, 1, 2, 3]), ("two", [2, 3, 4, 5])):
        bits = torch.zeros(20, dtype=torch.bool)
        bits[chosen] = True
        write_mask(tmp_path / folder, {name: bits.view(4, 5)}, threshold="0")
        units = [
            {
                "parameter": name,
                "name": name,
                "role": "attention.v",
                "layer": 3,
                "expert": None,
                "start": 0,
                "length": 20,
                "count": 1,
                "stride": 0,
            }
        ]
        (tmp_path / folder / "units.json").write_text(json.dumps(units))
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"all +4 +4 +2 +50.00% +50.00% +0.3333", shown) and "cell 3 attention.v" in shown
    assert main(["info", str(tmp_path / "one")]) == 0
    assert re.search(r"attention.v +4 +100.00% +20.000% +1.00\n", capsys.readouterr().out)


def test_a_mask_of_many_layers_is_described_in_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also how often more than chance a part is selected: 12 of 1,200 weights are, 10 of them in the 600 of q."""
    from esi_ds.mask import main

    bits, units = {}, []
    for layer in range(30):
        for role in ("q", "k"):
            name = f"model.layers.{layer}.self_attn.{role}_proj.weight"
            bits[name] = torch.arange(20).view(4, 5) < ({"q": 5, "k": 1}[role] if layer < 2 else 0)
            place = {"start": 0, "length": 20, "count": 1, "stride": 0, "layer": layer, "expert": None}
            units.append({"parameter": name, "name": name, "role": f"attention.{role}", **place})
    write_mask(tmp_path, bits, threshold="0")
    (tmp_path / "units.json").write_text(json.dumps(units))
    compare = ["compare", str(tmp_path), str(tmp_path)]
    assert main(compare) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 35 and "cell 3 " not in output
    assert output.endswith("--cells also shows the 60 cells (layer and role)\n")
    assert main([*compare, "--cells"]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 94 and "cell 3 attention.q" in output
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"attention.q +10 +83.33% +1.667% +1.67\n", output)
    assert re.search(r"attention.k +2 +16.67% +0.333% +0.33\n", output)
    assert re.search(r"\n1 +6 +50.00% +15.000% +15.00\n", output) and re.search(r"\n2 +0 .* +0.00\n", output)
