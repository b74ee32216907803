"""Files of a run: whole or not at all, every text kept, and nobody else's folder touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from esi_ds import lock, versions
from esi_ds.artifacts import (
    RunFolder,
    append_jsonl,
    check_result,
    file_sha256,
    read_jsonl,
    renew_result,
    replace_folder,
    run_id,
    temporary_name,
    write_json_atomic,
    write_text_atomic,
)
from esi_ds.config import Config, validate
from esi_ds.errors import UserError


def make_config(**select) -> Config:
    return validate({"run": {"output_dir": "x"}, "model": {"path": "a"}, "select": select})


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json_atomic(file, {"ä": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": 1}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(file, "half")
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": 1}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be flushed, or a folder for another reason, is an error all the same."""

    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir() == (kind == "folder"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    for kind in ("folder", "file"):
        with nullcontext() if kind == "folder" and number != errno.EIO else pytest.raises(OSError):
            write_text_atomic(tmp_path / "a", kind)
    assert (tmp_path / "a").read_text() == "folder"


def test_a_folder_has_its_name_when_its_files_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a library has written, as a tokenizer's."""
    final, temporary = tmp_path / "model", tmp_path / ".model.tmp"
    for folder, text in ((final, "old"), (temporary / "more", "new")):
        folder.mkdir(parents=True)
        (folder / "a").write_text(text)
    events = []

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append(names[1].name), replace(*names)))
    replace_folder(temporary, final)
    assert events == ["a", ".model.old", "model", tmp_path.name]
    assert (final / "more/a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rows_keep_every_line_separator_that_json_leaves_in_a_text(tmp_path: Path) -> None:
    rows = [{"response": f"one{separator}two"} for separator in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    append_jsonl(tmp_path / "a.jsonl", rows[:4])
    append_jsonl(tmp_path / "a.jsonl", rows[4:])
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_sha256_of_more_than_a_block(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 3)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_run_is_resumed_with_its_own_config_only(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.open(make_config())
    folder.open(make_config())
    stored = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"run\.output_dir.*select\.ratio, select\.of"):
        folder.open(make_config(ratio=0.5, of="scored"))
    never = validate({"run": {"output_dir": "x", "resume": "never"}, "model": {"path": "a"}})
    with pytest.raises(UserError, match="resume"):
        folder.open(never)
    assert (tmp_path / "run" / "config.yaml").read_text() == stored


def test_a_kill_at_the_first_write_does_not_lock_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.tmp").write_text("run: {outp")
    RunFolder(str(tmp_path)).open(make_config())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml"]


def test_a_folder_whose_lock_is_being_written_is_no_other_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file of a run: where it is not written to its end, the next start still finds a folder to begin in."""
    names = []

    def fail(descriptor: int) -> None:
        names.extend(tmp_path.iterdir())
        RunFolder(str(tmp_path)).check(make_config())  # as where another job starts now, or this one is killed
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        lock.acquire(tmp_path)
    assert len(names) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["a: [", "other: 1\n", "- 1\n", ""])
def test_a_config_that_is_not_ours_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"run\.output_dir.*cannot read"):
        RunFolder(str(tmp_path)).open(make_config())
    assert (tmp_path / "config.yaml").read_text() == content


def test_paths_that_can_be_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"run\.output_dir"):
            RunFolder(str(path)).open(make_config())
    (tmp_path / "link").symlink_to(tmp_path / "purged")
    for path, words in (
        (tmp_path / "link", "is a dangling link"),
        (tmp_path / ("x" * 300), "is not the name of a folder"),
    ):
        with pytest.raises(UserError, match=rf"run\.output_dir.*{words}"):
            RunFolder(str(path)).open(make_config())
    for path in ("~/runs", "~nouser/run", "a\0b"):
        with pytest.raises(UserError, match=r"run\.output_dir"):
            RunFolder(path).open(make_config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        RunFolder(str(tmp_path / "full")).open(make_config())
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_manifest_says_how_a_run_stands(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    facts = {"world_size": 2, "started": 0.0, "model_fingerprint": "f", "data": {"sha256": "d"}}
    for state, is_finished in (("running", False), ("interrupted", False), ("done", True)):
        folder.write_manifest(exit_state=state, **facts)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert folder.is_finished() == is_finished and manifest["exit_state"] == state
        assert (manifest["finished"] is None) == (state == "running")
    assert (
        manifest["started"] == "1970-01-01T00:00:00Z" and {"python", "torch", "esi_ds"} <= manifest["versions"].keys()
    )


def test_no_commit_of_a_repository_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed copy below somebody's repository, as in their .venv."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "--message", "theirs"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    package = tmp_path / ".venv" / "esi_ds"
    package.mkdir(parents=True)
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    assert versions.commit() is None
    (tmp_path / "esi_ds").mkdir()
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "esi_ds" / "versions.py"))
    assert len(versions.commit()) == 40


RESULTS = [
    "mask/model-00001-of-00001.safetensors",
    "mask/units.json",
    "scores/model.safetensors.index.json",
    "model/config.json",
    "model/model-00002-of-00002.safetensors",
    "patch/patch.json",
    "report.json",
    "report.html",
    "responses.jsonl",
    "verdicts.jsonl",
]


def test_a_run_that_goes_on_says_which_data_are_others(tmp_path: Path) -> None:
    run = failed_run(tmp_path / "begun", "responses.jsonl")
    with pytest.raises(UserError, match=r"tune: is not what the run in .* started with \(other sha256\)"):
        run.check_same("data_hashes", {"sha256": "c"}, "tune")


def test_an_evaluation_that_goes_on_says_which_model_is_another(tmp_path: Path) -> None:
    weights = {"base": "a", "SPA": "b"}
    fields = {"base": "model.path", "SPA": "eval.models.0.path"}
    run = RunFolder(str(tmp_path))
    facts = {"exit_state": "done", "world_size": 1, "started": 0.0, "model_fingerprint": "ab", "data": {}}
    run.write_manifest(**facts, notes={"model_fingerprints": weights})
    run.check_same("model_fingerprints", weights, fields)
    for name, field in fields.items():
        with pytest.raises(UserError, match=rf"{field}: is not what the run in .* started with \(other {name}\)"):
            run.check_same("model_fingerprints", {**weights, name: "c"}, fields)


def failed_run(folder: Path, name: str = "log.txt") -> RunFolder:
    """A run that failed with ``name`` beside what every start and its monitors write."""
    run = RunFolder(str(folder))
    run.open(make_config())
    run.identify()
    run.write_manifest(exit_state="failed", world_size=1, started=0.0, model_fingerprint="a", data={"sha256": "b"})
    for file in (folder / name, folder / "tensorboard/events", folder / "deepspeed_csv_monitor/loss.csv"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    return run


def test_a_run_that_was_refused_begins_anew(tmp_path: Path) -> None:
    """A mask of another model is found once the folder is there: with another mask the same command goes through."""
    other = make_config(ratio=0.02)
    run = failed_run(tmp_path / "refused")
    before = json.loads((run.path / "run.json").read_text())
    run.check(other)  # in the order of a start: stages/folder.py, then stages/run.py
    run.check_stage("spa")
    run.check_same("data_hashes", {"sha256": "c"}, "data.path")
    run.open(other)
    assert not (run.path / "manifest.json").exists() and not (run.path / "inputs.json").exists()
    run.identify()
    assert json.loads((run.path / "run.json").read_text()) != before
    run = failed_run(tmp_path / "written")
    for name in ("manifest.json", "status.json", "inputs.json", "run.json"):
        temporary_name(run.path / name).touch()  # of a start that was killed while it wrote
    run.open(other)
    with pytest.raises(UserError, match="holds a run whose config differs"):
        failed_run(tmp_path / "begun", "responses.jsonl").check(other)
    run = failed_run(tmp_path / "killed")
    run.write_manifest(exit_state="running", world_size=1, started=0.0, model_fingerprint="a", data={})
    with pytest.raises(UserError, match="holds a run whose config differs"):
        run.check(other)


@pytest.mark.parametrize("name", ["answers.jsonl", "checkpoint/step-1/state-0.safetensors", "model/config.json"])
def test_curves_are_not_what_a_start_keeps(tmp_path: Path, name: str) -> None:
    """Else a job that always ends before its first save would be requeued for ever."""
    run, curve = RunFolder(str(tmp_path)), tmp_path / "deepspeed_csv_monitor/loss.csv"
    curve.parent.mkdir()
    for size in (1, 2):
        for file in (curve, tmp_path / "metrics.jsonl", tmp_path / "log.txt"):
            file.write_text("x" * size)
        assert run.kept() == {}
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    assert run.kept() == {name: 1}


def placed(root: str, **changes: Any) -> Config:
    """A config all of whose paths lie in ``root``."""
    models = [{"path": f"{root}/m1", "name": "tuned"}, {"answers": f"{root}/a.jsonl", "name": "other"}]
    content: dict[str, Any] = {
        "run": {"output_dir": "x"},
        "model": {"path": f"{root}/m", "chat_template": f"{root}/t.jinja"},
        "judge": {"path": f"{root}/g"},
        "data": {"prompts": {"path": f"{root}/p.csv", "behaviors": f"{root}/b.csv"}},
        "tune": {"mask": f"{root}/mask", "data": {"path": f"{root}/r.jsonl"}},
        "perturb": {"mask": f"{root}/mask", "scores": f"{root}/scores"},
        "eval": {
            "models": models,
            "judges": [{"kind": "guard", "path": f"{root}/g", "name": "guard"}],
            "tasks": [{"name": "gsm8k", "path": f"{root}/gsm8k.jsonl"}],
            "prompts": [{"path": f"{root}/h.jsonl"}],
            "benign": [{"path": f"{root}/o.jsonl"}],
        },
    }
    return validate(content | changes)


RECORDED: dict[str, Any] = {  # of the paths in ``placed``; no stage reads them all
    "data_hashes": {
        **{"prompts": "/a/p.csv", "rows": "/a/r.jsonl", "sha256": "1", "mask_bits_sha256": "2", "scores_sha256": "3"},
        **{"eval.tasks.0": "4", "harmful:h": "5", "benign:o": "6"},
    },
    "source_digests": dict.fromkeys(
        ("model.path", "model.chat_template", "judge.path", "eval.models.0.path", "eval.judges.0.path"), "7"
    ),
    "model_fingerprints": {"base": "8", "tuned": "9", "other": "answers:10"},
}


def begun_run(folder: Path, config: Config, **recorded: Any) -> RunFolder:
    """A run that was interrupted, with what its manifest says of its inputs."""
    run, notes = RunFolder(str(folder)), {**RECORDED, **recorded}
    run.open(config)
    facts = {"world_size": 1, "started": 0.0, "model_fingerprint": "f", "data": notes.pop("data_hashes")}
    run.write_manifest(exit_state="interrupted", **facts, notes=notes)
    return run


def test_a_run_whose_inputs_were_moved_goes_on(tmp_path: Path) -> None:
    """The path may differ, and nothing else: what lies there is compared, and the config is kept once it is known."""
    run = begun_run(tmp_path / "run", placed("/a"))
    stored = (run.path / "config.yaml").read_text()
    run.check(placed("/b"))
    hashes = RECORDED["data_hashes"]
    run.check_same("data_hashes", {**hashes, "prompts": "/b/p.csv", "rows": "/b/r.jsonl"}, "data")
    for name in hashes.keys() - {"prompts", "rows"}:
        with pytest.raises(UserError, match=rf"is not what the run in .* started with \(other {name}\)"):
            run.check_same("data_hashes", {**hashes, name: "another"}, "data")
    run.open(placed("/b"))
    assert (run.path / "config.yaml").read_text() == stored
    run.write_config(placed("/b"))
    run.check(placed("/a"))
    with pytest.raises(UserError, match=r"config differs in model\.dtype;"):
        run.check(placed("/b", model={"path": "/b/m", "chat_template": "/b/t.jinja", "dtype": "fp32"}))


def test_a_path_of_content_that_was_not_recorded_may_not_differ(tmp_path: Path) -> None:
    hashes = RECORDED["data_hashes"]
    for name, keys in (
        ("mask_bits_sha256", r"tune\.mask, perturb\.mask"),
        ("scores_sha256", r"perturb\.scores"),
        ("prompts", r"data\.prompts\.path, data\.prompts\.behaviors"),
        ("rows", r"tune\.data\.path"),
        ("harmful:h", r"eval\.prompts\.0\.path"),
    ):
        fewer = {key: value for key, value in hashes.items() if key != name}
        run = begun_run(tmp_path / name, placed("/a"), data_hashes=fewer)
        with pytest.raises(UserError, match=rf"config differs in {keys};"):
            run.check(placed("/b"))
    run = begun_run(tmp_path / "sources", placed("/a"), source_digests={})
    with pytest.raises(
        UserError, match=r"differs in model\.path, model\.chat_template, judge\.path, eval\.models\.0\.path, "
    ):
        run.check(placed("/b"))
    unbegun = RunFolder(str(tmp_path / "unbegun"))
    unbegun.open(placed("/a"))
    with pytest.raises(UserError, match=r"config differs in model\.path, "):
        unbegun.check(placed("/b"))


def test_paths_by_which_answers_are_filed_may_not_differ(tmp_path: Path) -> None:
    """Answers and verdicts are kept under the names of models, judges and sets, which are paths where none is given."""

    def unnamed(root: str, prompts: str = "h.jsonl") -> Config:
        judges = [{"kind": "guard", "path": f"{root}/g"}]
        sets = {"prompts": [{"path": f"{root}/{prompts}"}]}
        return placed("/a", eval={"models": [{"path": f"{root}/m1"}], "judges": judges, **sets})

    run = begun_run(tmp_path / "run", unnamed("/a"), model_fingerprints={"base": "8", "/a/m1": "9"})
    with pytest.raises(UserError, match=r"differs in eval\.models\.0\.path, eval\.judges\.0\.path;"):
        run.check(unnamed("/b"))
    with pytest.raises(UserError, match=r"differs in eval\.prompts\.0\.path;"):
        run.check(unnamed("/a", "renamed.jsonl"))


@pytest.mark.parametrize("name", ["~/runs", "$HOME/runs", "a/${SCRATCH}/b", "a\nb"])
def test_names_that_only_a_shell_would_replace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run.output_dir = .*(which only a shell expands|invisible character)"):
        RunFolder(name).open(make_config())
    assert list(tmp_path.iterdir()) == []


def finished_run(tmp_path: Path) -> RunFolder:
    for name in (*RESULTS, "metrics.jsonl", "log.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    folder = RunFolder(str(tmp_path))
    folder.write_manifest(exit_state="done", world_size=1, started=0.0, model_fingerprint="a", data={})
    return folder


def test_a_result_is_checked_and_renewed_by_itself(tmp_path: Path) -> None:
    """The page of a finished run may be drawn again; its report must be the one that was written."""
    folder = finished_run(tmp_path)
    check_result(tmp_path, "report.json", "RUN", "-")
    (tmp_path / "report.html").write_text("drawn again")
    with pytest.raises(UserError, match=r"report\.html: is not what this finished run wrote"):
        folder.is_finished()
    renew_result(tmp_path, "report.html", "RUN", "-")
    assert folder.is_finished()
    (tmp_path / "report.json").write_text("content of report.jsoN")
    with pytest.raises(UserError, match=r"RUN = .*report\.json: is not what this finished run wrote"):
        check_result(tmp_path, "report.json", "RUN", "-")
    (tmp_path / "report.json").unlink()
    with pytest.raises(UserError, match=r"RUN = .*report\.json: cannot be read"):
        check_result(tmp_path, "report.json", "RUN", "-")


def test_runs_without_results_in_their_manifest_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    check_result(tmp_path, "report.json", "RUN", "-")
    (tmp_path / "manifest.json").write_text('{"exit_state": "done"}')
    check_result(tmp_path, "report.json", "RUN", "-")
    renew_result(tmp_path, "report.json", "RUN", "-")
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"exit_state": "done"}


@pytest.mark.parametrize("name", RESULTS)
def test_a_finished_run_whose_results_are_not_whole(name: str, tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    (tmp_path / "log.txt").write_text("more")
    (tmp_path / "metrics.jsonl").unlink()
    assert folder.is_finished()
    file = tmp_path / name
    for change in (lambda: file.write_text(f"Content of {name}"), lambda: file.write_text("c"), file.unlink):
        change()
        with pytest.raises(UserError, match=rf"{name}: .*(copy it back|delete manifest.json)"):
            folder.is_finished()
    file.mkdir()
    with pytest.raises(UserError, match=name):
        folder.is_finished()


def test_large_results_are_read_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    with file.open("wb") as opened:
        opened.truncate((1 << 28) + 4096)
    folder = RunFolder(str(tmp_path))
    folder.write_manifest(exit_state="done", world_size=1, started=0.0, model_fingerprint="a", data={})
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\1")
    with pytest.raises(UserError, match="model.safetensors: is not what this finished run wrote"):
        folder.is_finished()


def test_a_finished_run_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"exit_state": "done", "model_fingerprint": "a"}')
    assert RunFolder(str(tmp_path)).is_finished()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"exit_state": "done", "results": [1]}', "[" * 100_000, '{"a": NaN}']
)
def test_a_torn_or_foreign_manifest(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.output_dir = .*manifest\.json"):
        RunFolder(str(tmp_path)).is_finished()


@pytest.mark.parametrize("key", ["exit_state", "model_fingerprint", "data_hashes", "results", "sha256", "more"])
def test_an_altered_manifest_is_noticed_where_it_is_used(key: str, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    (tmp_path / "report.json").write_text("{}")
    facts = {"world_size": 1, "started": 0.0, "model_fingerprint": "a", "data": {"x": "1"}}
    folder.write_manifest(exit_state="done", **facts, notes={"note": [1, 0.5]})
    assert folder.is_finished()
    folder.check_same("model_fingerprint", "a", "model.path")
    renew_result(tmp_path, "report.json", "RUN", "")
    assert folder.is_finished()
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "b"}))
    for use in (
        folder.is_finished,
        lambda: folder.check_same("model_fingerprint", "b", "model.path"),
        lambda: check_result(tmp_path, "report.json", "run.output_dir", ""),
        lambda: renew_result(tmp_path, "report.json", "run.output_dir", ""),
    ):
        with pytest.raises(UserError, match=r"run\.output_dir = .*manifest\.json: was altered since the run wrote it"):
            use()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": None}))  # of an earlier version
    folder.check_same("world_size", 1, "model.path")


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert run_id(tmp_path / "checkpoint/safety") is None
    folder.identify()
    first = run_id(tmp_path)
    folder.identify()
    assert (
        first and run_id(tmp_path / "checkpoint/safety") == run_id(tmp_path / "checkpoint/safety/position-4") == first
    )
    RunFolder(str(tmp_path / "checkpoint")).path.mkdir()
    RunFolder(str(tmp_path / "checkpoint")).identify()
    assert run_id(tmp_path / "checkpoint") not in (None, first)
