"""Readers of what a run leaves behind: a damaged folder is refused, or the run goes on to the same result."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, damaged_folder, damaged_json, fuzz, outcome, replace
from hypothesis import given
from hypothesis import strategies as st

from esi_ds.artifacts import RunFolder, jsonl, read_metrics
from esi_ds.errors import UserError
from esi_ds.eval.rows import AnswerRow, SurpriseRow, TaskRow, VerdictRow
from esi_ds.journal import Journal
from esi_ds.report import figures
from esi_ds.stages.esi.judge_scores import JudgeScoreRow
from esi_ds.stages.esi.respond import ResponseRow
from esi_ds.stages.esi.score import PassState
from esi_ds.stages.respond import GeneratedRow
from esi_ds.status import read_status, show
from esi_ds.zero import checkpoint

ABOUT: dict[str, Any] = {"model": "base", "set": "harmful"}
VERDICT: dict[str, Any] = {"judge": "guard", "unsafe": True, "score": 0.5, "reason": None}
TASK: dict[str, Any] = {
    "task": "arc", "metric": "acc", "filter": "none", "value": 0.5, "n": 2, "low": 0.1, "high": 0.9, "members": [],
    "higher_is_better": True, "num_documents": 2, "num_fewshot": 0, "num_cut": 0, "limit": None, "version": "1.0",
    "prompts_hash": "ab", "rows": None, "chat_template": True, "lm_eval": "0.4", "confidence": 0.95,
    "correct": [True, False], "scores": None,
}  # fmt: skip
# File → (kind of its rows, what the rows differ in besides their index).
JOURNALS: dict[str, tuple[Any, dict[str, Any]]] = {
    "responses.partial.jsonl": (GeneratedRow, {"response": "No.\u2028\n"}),
    "responses.jsonl": (ResponseRow, {"response": "é", "prompt": "How?", "judge_score": None, "excluded": None}),
    "answers.jsonl": (AnswerRow, {**ABOUT, "prompt": "How?", "response": "No.", "excluded": None}),
    "verdicts.jsonl": (VerdictRow, {**ABOUT, **VERDICT}),
    "surprises.jsonl": (SurpriseRow, {**ABOUT, "surprise": 1.5}),
    "judge_scores.jsonl": (JudgeScoreRow, {"judge_score": -0.5}),
}


def rows_of(name: str) -> list[dict[str, Any]]:
    if name == "tasks.jsonl":
        return [{"model": "base", "task": index, "results": [TASK]} for index in range(4)]
    return [{"index": index, **JOURNALS[name][1]} for index in range(4)]


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder per journal, of two batches and their record."""
    folder = tmp_path_factory.mktemp("journals")
    for name in (*JOURNALS, "tasks.jsonl"):
        (folder / name).mkdir()
        journal = Journal(folder / name / name, kind_of(name))
        for first in (0, 2):
            journal.append(rows_of(name)[first : first + 2])
    return folder


def kind_of(name: str) -> Any:
    return TaskRow if name == "tasks.jsonl" else JOURNALS[name][0]


@fuzz(300)
@given(name=st.sampled_from([*JOURNALS, "tasks.jsonl"]), data=st.data())
def test_journals(journals: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    """Rows that are lost are computed again, to the same file."""
    words, damage = data.draw(damaged_folder(journals / name))
    folder = replace(tmp_path_factory.getbasetemp() / "journal", journals / name)
    damage(folder)
    rows = rows_of(name)

    def go_on() -> bytes:
        journal = Journal(folder / name, kind_of(name))
        known = journal.read()
        assert known == rows[: len(known)], words
        journal.append(rows[len(known) :])
        return (folder / name).read_bytes()

    result = outcome(go_on)
    assert isinstance(result, UserError) or result == jsonl(rows).encode(), words


def tensors() -> dict[str, list[tuple[int, torch.Tensor]]]:
    return {"a": [(0, torch.zeros(5))], "b": [(0, torch.zeros(3))]}


@fuzz(150)
@given(data=st.data())
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Without a state the part of the run begins anew."""
    sound = tmp_path_factory.getbasetemp() / "sound-checkpoint"
    if not sound.exists():
        parts = {key: [(0, values + 0.5)] for key, [(_, values)] in tensors().items()}
        checkpoint.save(sound, 4, {"scores": [[0, 0.5]], "excluded": [[1, "empty"]]}, parts)
    words, damage = data.draw(damaged_folder(sound))
    folder = replace(sound.with_name("checkpoint"), sound)
    damage(folder)

    def read(folder: Path) -> Any:
        newest, parts = checkpoint.latest(folder), tensors()
        if newest is None:
            return None
        checkpoint.restore(newest, parts)
        values = [part.tolist() for [(_, part)] in parts.values()]
        return PassState.from_json(checkpoint.read_state(newest)), values

    result = outcome(lambda: read(folder))
    begins_anew = result is None and not (folder / "position-4/state.json").is_file()
    assert isinstance(result, UserError) or begins_anew or result == read(sound), words


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ESI run: report.json, report.html, manifest.json, and two files of results."""
    folder = tmp_path_factory.mktemp("finished")
    unit = {"parameter": "a", "expert": None, "numel": 100, "max_score": 2.0, "mean_score": 1.0, "sigma": 0.1}
    report = {
        "title": "A title",
        "facts": {"model": "m", "ranks": 2, "seed": 0, "wall time (s)": 1.5},
        "selection": {
            "k": 30, "total_numel": 1000, "scored_numel": 900, "threshold": 1e-3, "criterion": "esi", "order": "top",
            "ratio": 0.03, "of": "all", "scope": "model", "contrastive": False,
        },
        "units": [
            {**unit, "name": f"a{layer}{role}", "layer": layer, "role": role, "selected": 10 * layer}
            for layer in (1, 2) for role in ("mlp.up",)
        ],
        "experts": None,
        "routing": [],
        "score_histogram": {"log10_edges": [-4.0, -3.0, -2.0], "counts": [5, 3], "zeros": 2},
        "score_histograms_by_role": {"mlp.up": [5, 3]},
        "judge_scores": [1.0, 3.0],
        "excluded": [{"index": 7, "prompt": "How?", "reason": "the response is empty"}],
        "special_tokens_broken_up": 1,
        "samples": [{"index": 0, "prompt": "How?", "response": "<b>No</b>", "judge_score": 1.5}],
        "losses": [],
        "progress": [{"step": 1, "judge_score": None, "gradient_norm": 2.0}],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "scores").mkdir()
    (folder / "scores/digests.json").write_text('{"a": "b"}')
    (folder / "responses.jsonl").write_text('{"index": 0}\n')
    (folder / "report.html").touch()
    run = RunFolder(str(folder))
    run.write_manifest(exit_state="done", world_size=1, started=0.0, model_fingerprint="a:b", data={})
    write_page(folder)
    assert run.is_finished()  # with its page drawn again
    return folder


def write_page(folder: Path) -> str:
    """What launch/report.py makes of a run: its page."""
    from esi_ds.launch.report import write_pages

    write_pages(argparse.Namespace(runs=[folder], tuned=[], evaluated=[], output=folder / "overview.html"))
    return (folder / "report.html").read_text()


@fuzz(200)
@given(data=st.data())
def test_finished_runs(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A result that is not whole is never called finished. A damaged manifest may have the run done again."""
    # inputs.json is read where there is no manifest.
    others = ("overview", "inputs.json")
    words, damage = data.draw(
        damaged_folder(finished).filter(lambda drawn: not any(name in drawn[0] for name in others))
    )
    folder = replace(tmp_path_factory.getbasetemp() / "finished-copy", finished)
    damage(folder)
    result = outcome(RunFolder(str(folder)).is_finished)
    names = [path.relative_to(finished) for path in finished.rglob("*") if path.is_file()]
    is_whole = all(same_file(folder / name, finished / name) for name in names if "overview" not in name.name)
    manifest_is_damaged = "manifest.json" in words
    assert isinstance(result, UserError) or manifest_is_damaged or (result is True and is_whole), words
    outcome(lambda: RunFolder(str(folder)).check_same("model_fingerprint", "a:b", "model.path"))


def same_file(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


@fuzz(40)
@given(data=st.data())
def test_pages_of_finished_runs(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    words, damage = data.draw(damaged_folder(finished).filter(lambda drawn: "report.json" in drawn[0]))
    folder = replace(tmp_path_factory.getbasetemp() / "page", finished)
    damage(folder)
    result = outcome(lambda: write_page(folder))
    assert isinstance(result, UserError) or result == (finished / "report.html").read_text(), words


@fuzz(12)
@given(data=st.data())
def test_pages_without_a_manifest(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """As earlier versions left them: nothing says whether the report was altered, so only that there is no crash."""
    folder = replace(tmp_path_factory.getbasetemp() / "old-page", finished)
    (folder / "manifest.json").unlink()
    (folder / "report.json").write_text(data.draw(damaged_json((finished / "report.json").read_text())))
    outcome(lambda: write_page(folder))


@fuzz(60)
@given(data=st.data())
def test_manifests_on_pages(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    from esi_ds.launch.report import read

    folder = replace(tmp_path_factory.getbasetemp() / "manifest", finished)
    (folder / "manifest.json").write_bytes(
        data.draw(damaged_json((finished / "manifest.json").read_text())).encode(errors="surrogatepass")
    )
    result = outcome(lambda: read(folder))
    assert isinstance(result, UserError) or result == read(finished)


STATUS = {
    "state": "running", "stage": "esi", "pid": 1, "host": "h", "boot": "b", "pids": "p", "pid_started": 3,
    "slurm_job": None, "slurm_restarts": None, "started": 1.0, "updated": 2.0, "beat": 3, "phase": "score", "done": 1.0,
    "total": 2.0, "unit": "prompt", "rate": 0.5, "seconds_left": 2.0, "last_checkpoint": {"position": 4, "saved": 1.0},
}  # fmt: skip


@fuzz(200)
@given(data=st.data())
def test_statuses(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "status"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    text = json.dumps(STATUS)
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(text.encode()))
    else:
        content = data.draw(damaged_json(text)).encode(errors="surrogatepass")
    (folder / "status.json").write_bytes(content)
    outcome(lambda: json.dumps(read_status(folder)))
    outcome(lambda: show(folder, 3.0))


METRICS = [{"step": step, "time": 1.0, "judge_score": 0.5, "gradient_norm": 2.0, "loss": 1.0} for step in range(3)]


@fuzz(25)
@given(data=st.data())
def test_metrics(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Curves decide nothing; they are drawn of what is read."""
    folder = tmp_path_factory.getbasetemp() / "metrics"
    folder.mkdir(exist_ok=True)
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(jsonl(METRICS).encode()))
    else:
        damaged = data.draw(damaged_json(json.dumps(METRICS[1])))
        content = (jsonl(METRICS[:1]) + damaged + "\n" + jsonl(METRICS[2:])).encode(errors="surrogatepass")
    (folder / "metrics.jsonl").write_bytes(content)
    rows = outcome(lambda: read_metrics(folder))
    if not isinstance(rows, UserError):
        figures.figure_png(figures.progress_curves(rows))
