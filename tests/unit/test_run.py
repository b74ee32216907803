"""What every stage's run has in common, in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from conftest import ROOT
from mask_folders import write_mask
from safetensors.torch import save_file
from torch.distributed import distributed_c10d

from esi_ds import lock
from esi_ds.artifacts import CHECKPOINTS, STATUS, RunFolder, read_manifest, write_json_atomic
from esi_ds.config import validate
from esi_ds.core.mask import Mask, identity, unread
from esi_ds.data.tokenizer_files import other_patterns
from esi_ds.errors import Interrupted, UserError
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.options import Options
from esi_ds.stages import ENTRIES, respond
from esi_ds.stages import run as stage_run
from esi_ds.stages.esi.prepare import EsiInputs
from esi_ds.stages.evaluate.work import EvalRun
from esi_ds.stages.folder import open_folder
from esi_ds.stages.run import StageRun
from esi_ds.status import show
from esi_ds.zero import memory, runtime


class Run(StageRun):
    stage = "set"

    def work(self) -> None:
        raise AssertionError("it is done already")


class Judged(Run):
    """Its judge lies beside its folder."""

    @property
    def judge_sources(self) -> list[ModelSource]:
        return [ModelSource(str(self.folder.path.parent / "judge"), field="judge.path")]


def test_a_run_that_ended_while_its_lock_was_looked_at_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = validate({"run": {"output_dir": str(tmp_path)}, "model": {"path": "a"}})
    folder = RunFolder(str(tmp_path))
    folder.open(config)
    acquire = lock.acquire

    def acquire_late(path: Path) -> str | None:
        folder.write_manifest(exit_state="done", world_size=2, started=0.0, model_fingerprint="f", data={})
        return acquire(path)

    monkeypatch.setattr(lock, "acquire", acquire_late)
    run = Run(config, Options(), None, folder, {}, {})
    monkeypatch.setattr(run, "_check_sources", lambda: None)
    monkeypatch.setattr(run, "known_fingerprint", lambda: "f")
    run.run()
    assert "is finished already; nothing to do" in capsys.readouterr().out
    assert not (tmp_path / lock.LOCK).exists()


def test_wall_time_is_that_of_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start is a process of its own, which writes the manifest more than once."""
    config = validate({"run": {"output_dir": str(tmp_path)}, "model": {"path": "a"}})
    for started, written in ((1000.0, (1010.0, 1300.0)), (5000.0, (5001.0, 5020.0))):
        run = Run(config, Options(), None, RunFolder(str(tmp_path)), {}, {})
        run.started, run.tracker = started, SimpleNamespace(remarks=[])
        for now in written:
            monkeypatch.setattr(time, "time", lambda now=now: now)
            run.record("interrupted")
    assert read_manifest(tmp_path)["wall_time_s"] == run.wall_time_s == 320


@pytest.mark.parametrize("alive", [False, True])
def test_a_run_that_was_killed_once_it_was_done_is_tidied_up(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing the checkpoint of a large model takes a while. A job that still does it is left to it."""
    config = validate({"run": {"output_dir": str(tmp_path)}, "model": {"path": "a"}})
    folder = RunFolder(str(tmp_path))
    folder.open(config)
    folder.identify()
    (tmp_path / "checkpoint/position-2").mkdir(parents=True)
    folder.write_manifest(exit_state="done", world_size=1, started=0.0, model_fingerprint="f", data={})
    known = {"stage": "set", "pid": 7, "host": "a", "slurm_job": None, "updated": 1.0, "phase": None}
    (tmp_path / STATUS).write_text(json.dumps({"state": "running", **known}))
    assert "done, stage set" in show(tmp_path, 1000.0)
    holder = lock.own_identity() if alive else {**lock.own_identity(), "pid_started": 1}
    (tmp_path / lock.LOCK).write_text(json.dumps({**holder, "since": "then"}))
    run = Run(config, Options(), None, folder, {}, {})
    monkeypatch.setattr(run, "_check_sources", lambda: None)
    monkeypatch.setattr(run, "known_fingerprint", lambda: "f")
    run.run()
    left = {"checkpoint", "run.json", lock.LOCK} & {file.name for file in tmp_path.iterdir()}
    assert left == ({"checkpoint", "run.json", lock.LOCK} if alive else set())
    assert json.loads((tmp_path / STATUS).read_text())["state"] == ("running" if alive else "done")


class Written(Run):
    """Writes a result."""

    def run(self) -> None:
        self.folder.open(self.config)
        (self.folder.path / "mask").mkdir()
        write_json_atomic(self.folder.path / "mask/units.json", {})


@pytest.mark.parametrize(("share", "mode"), [("private", 0o700), ("group", 0o750), ("all", 0o755)])
def test_what_a_shared_run_writes_can_be_read_whatever_the_umask(
    share: str, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "process_group", lambda *_: nullcontext())
    config = validate({"run": {"output_dir": str(tmp_path / "runs/a"), "share": share}, "model": {"path": "a"}})
    folder = RunFolder(config.run.output_dir)
    before = os.umask(0o077)
    try:
        Written.start("esi", config, Options(), None, folder, {})
        assert os.umask(0o077) == 0o077  # for what this process does next
    finally:
        os.umask(before)
    for path in (folder.path.parent, folder.path, folder.path / "mask"):
        assert path.stat().st_mode & 0o777 == mode
    for name in ("config.yaml", "mask/units.json"):
        assert (folder.path / name).stat().st_mode & 0o777 == mode & 0o666


@pytest.mark.parametrize("exit_state", ["done", "interrupted"])
@pytest.mark.parametrize("said_by", ["manifest", "status"])
def test_a_folder_of_another_stage_is_refused(tmp_path: Path, exit_state: str, said_by: str) -> None:
    """SET and SPA may share a config. A manifest of an earlier version does not name the stage; its status does."""
    config = validate({"run": {"output_dir": str(tmp_path)}, "model": {"path": "a"}})
    folder = RunFolder(str(tmp_path))
    folder.open(config)
    facts = {"world_size": 1, "started": 0.0, "model_fingerprint": "f", "data": {}}
    folder.write_manifest(exit_state=exit_state, **facts, notes={"stage": "spa"} if said_by == "manifest" else {})
    if said_by == "status":
        (tmp_path / STATUS).write_text(json.dumps({"stage": "spa"}))
    for start in (lambda: open_folder(config, "set", {}, "data"), Run(config, Options(), None, folder, {}, {}).run):
        with pytest.raises(UserError, match=r"run.output_dir = .*: holds a run of spa, not of set; give a new folder"):
            start()
    folder.check_stage("spa")
    assert not (tmp_path / lock.LOCK).exists()


def test_a_start_says_how_far_the_dead_job_was(tmp_path: Path) -> None:
    """A rank 0 that C++ aborts or the system kills writes nothing; its status has the last phase."""
    config = validate({"run": {"output_dir": str(tmp_path)}, "model": {"path": "a"}})
    folder = RunFolder(str(tmp_path))
    folder.open(config)
    dead = subprocess.Popen(["true"])
    dead.wait()
    holder = {**lock.own_identity(), "pid": dead.pid, "pid_started": 1, "since": "then"}
    (tmp_path / lock.LOCK).write_text(json.dumps(holder))
    bar = {"phase": "score", "done": 1200, "total": 3000, "unit": "prompt", "rate": 0.5, "seconds_left": 18.0}
    known = {"state": "running", "stage": "esi", "pid": 7, "host": "a", "slurm_job": None, "updated": 1.0}
    (tmp_path / lock.STATUS).write_text(json.dumps({**known, **bar}))
    said = Run(config, Options(), None, folder, {}, {})._lock()
    assert said is not None and said.endswith("; it was last seen during score: 1,200 of 3,000 prompts")


def tiny_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.arange(3.0)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda path: save_file({"a": torch.ones(3)}, path / "judge/model.safetensors"), "judge.path"),
        (lambda path: save_file({"b": torch.arange(3.0)}, path / "judge/model.safetensors"), "judge.path"),
        (lambda path: (path / "judge/tokenizer.json").write_text("{ }"), "judge.path"),
        (lambda path: (path / "model/config.json").write_text("{ }"), "model.path"),
        (lambda path: (path / "model/chat_template.jinja").write_text("{{ a }}"), "model.path"),
        (lambda path: (path / "template.jinja").write_text("{{ b }}"), "model.chat_template"),
        (lambda path: (path / "model/README.md").write_text("more"), None),
        (lambda path: save_file({"a": torch.ones(3)}, path / "model/model.safetensors"), None),  # ``begin`` refuses it
    ],
)
def test_a_run_goes_on_only_with_the_judge_and_the_files_it_began_with(
    change: Callable[[Path], object], field: str | None, tmp_path: Path
) -> None:
    def start() -> Judged:
        run = Judged(config, Options(), None, RunFolder(config.run.output_dir), {}, {})
        run.tracker = SimpleNamespace(remarks=[])  # type: ignore[assignment]
        run.folder.open(config)
        run._check_sources()
        run._fingerprint = "f"
        run.record("interrupted")
        return run

    for name in ("model", "judge"):
        tiny_model(tmp_path / name)
    (tmp_path / "template.jinja").write_text("{{ a }}")
    section = {"path": str(tmp_path / "model"), "chat_template": str(tmp_path / "template.jinja")}
    config = validate({"run": {"output_dir": str(tmp_path / "run")}, "model": section})
    assert start().source_digests == start().source_digests
    change(tmp_path)
    if field is None:
        start()
        return
    with pytest.raises(UserError, match=f"{field}: is not what the run in .* started with"):
        start()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda path: None, None),
        (lambda path: build_model("llama", path / "model", byte_bpe_tokenizer(), seed=8), "model.path"),
        (lambda path: (path / "model/tokenizer.json").write_text("{ }"), "model.path"),
        (lambda path: save_file({"a": torch.ones(3)}, path / "judge/model.safetensors"), "judge.path"),
        (lambda path: (path / "run/manifest.json").unlink(), None),
    ],
)
def test_results_of_other_models_are_not_called_finished(
    change: Callable[[Path], object], field: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Somebody tunes again into the same folder, and evaluates with the same config. Deleting the manifest, to have the
    run done again, does not make its rows those of another model."""

    class Finishing(Judged):
        ran = False

        def _run_locked(self, taken_over: str | None) -> None:
            self.folder.open(self.config)
            self._check_sources()
            self._fingerprint = self.known_fingerprint()
            self.folder.check_same("model_fingerprint", self._fingerprint, "model.path")
            self.tracker = SimpleNamespace(remarks=[])  # type: ignore[assignment]
            self.record("done")
            self.ran = True

    def start() -> Finishing:
        run = Finishing(config, Options(), None, RunFolder(config.run.output_dir), {"sha256": "s"}, {})
        run.run()
        return run

    build_model("llama", tmp_path / "model", byte_bpe_tokenizer(), seed=7)
    tiny_model(tmp_path / "judge")
    run = {"output_dir": str(tmp_path / "run")}
    config = validate({"run": run, "model": {"path": str(tmp_path / "model"), "dtype": "fp32"}})
    assert start().ran and not start().ran
    for without_manifest in (False, True):
        change(tmp_path)
        if without_manifest:
            (tmp_path / "run/manifest.json").unlink(missing_ok=True)
        if field is None:
            start()
            continue
        with pytest.raises(UserError, match=f"{field}: is not what the run in .* started with"):
            start()
    assert ("nothing to do" in capsys.readouterr().out) and (tmp_path / "run/inputs.json").is_file()


class Masked(Run):
    """Its mask lies beside its folder; it is done as soon as it begins."""

    ran = False

    def _check_sources(self) -> None:
        pass

    def known_fingerprint(self) -> str:
        return "f"

    @property
    def masks(self) -> dict[str, Mask]:
        return {"tune.mask": self.mask}

    def _run_locked(self, taken_over: str | None) -> None:
        self.folder.open(self.config)
        self._fingerprint = "f"
        self.tracker = SimpleNamespace(remarks=[])  # type: ignore[assignment]
        self.record("done")
        self.ran = True


def test_a_mask_without_digests_is_told_from_another_by_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks with one metadata, of which each start reads the bits once."""
    section = {"mask": str(tmp_path / "mask"), "data": {"path": "rows"}}
    config = validate({"run": {"output_dir": str(tmp_path / "run")}, "model": {"path": "a"}, "tune": section})
    bits = {name: torch.tensor([True, False, False, True]) for name in ("one", "other")}
    reads = []
    monkeypatch.setattr(Mask, "data", lambda *given, data=Mask.data: reads.append(given[1]) or data(*given))

    def start(bits: dict[str, torch.Tensor]) -> Masked:
        reads.clear()
        folder = write_mask(tmp_path / "mask", bits)
        mask = Mask.load(folder)
        source = identity(mask)
        opened = open_folder(config, "set", source, "tune", unread(mask))
        run = Masked(config, Options(), None, opened, {"sha256": "s"}, source)
        run.mask = mask
        run.run()
        stage_run.check_mask_bits(run.mask, "tune.mask")  # as the work does
        assert sorted(reads) == ["one", "other"]
        return run

    first = start(bits)
    assert first.ran and not start(bits).ran
    recorded = json.loads((tmp_path / "run/manifest.json").read_text())["data_hashes"]
    assert recorded == identity(first.mask) and "mask_bits_sha256" in recorded
    (tmp_path / "run/manifest.json").unlink()
    with pytest.raises(UserError, match=r"tune.mask: is not what the run in .* \(other mask_bits_sha256\)"):
        start({**bits, "other": bits["other"].flip(0).roll(1)})


def test_hosts_with_other_bits_of_a_mask_without_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"nothing": torch.zeros(2, dtype=torch.bool), "one": torch.tensor([True, False, False])}
    others = {**rows, "one": rows["one"].roll(1)}
    first, second = (Mask.load(write_mask(tmp_path / name, bits)) for name, bits in (("a", rows), ("b", others)))
    assert first.metadata == second.metadata

    def gathered(item: tuple) -> list[tuple]:
        return [item, ([], stage_run._seen_by_host(second), second.known_digests)]

    monkeypatch.setattr(runtime, "gather_objects", gathered)
    with pytest.raises(UserError, match="tune.mask = .*: differs between hosts"):
        stage_run.check_mask_bits(first, "tune.mask")
    second = Mask.load(tmp_path / "a")
    stage_run.check_mask_bits(Mask.load(tmp_path / "a"), "tune.mask")


def test_remarks_of_an_earlier_start_stay(tmp_path: Path) -> None:
    class Remarking(Run):
        def work(self) -> None:
            self._fingerprint = "f"
            for line in lines:
                self.tracker.remark(line)
            if "stop" in lines:
                raise Interrupted("stopped")

        def _check_sources(self) -> None:
            pass

    model = build_model("llama", tmp_path / "model", byte_bpe_tokenizer(), seed=7)
    (model / "tekken.json").write_text('{"config": {"pattern": "x+"}}')
    run = {"output_dir": str(tmp_path / "run"), "tensorboard": False}
    config = validate({"run": run, "model": {"path": str(model)}, "eval": {"tasks": ["gsm8k"]}})
    lines = ["another model replied", "stop"]
    with runtime.process_group(60, 60):
        with pytest.raises(Interrupted):
            Remarking(config, Options(), None, RunFolder(config.run.output_dir), {}, {}).run()
        lines = ["another model replied", "one at a time", "one at a time beside it", "one at"]
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": 2})})
        Remarking(config, Options(), None, RunFolder(config.run.output_dir), {}, {}).run()
    said = json.loads((tmp_path / "run/manifest.json").read_text())["remarks"]
    unread = "eval.tasks: read by launch/eval.py, not by SET"
    (pattern,) = other_patterns([ModelSource(str(model))])
    changed = (
        "eval.batch_size is 2 from this start on, and was 8 before: rows that share a batch may round each other's "
        "results differently"
    )
    lines = "one at a time; one at a time beside it; one at"
    assert said == f"{unread}; {pattern}; another model replied; stop; {changed}; {lines}"


def test_a_start_that_has_kept_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Run):
        def work(self) -> None:
            self._fingerprint = "f"
            self.record("running")
            self.tracker.log("loading")
            self.tracker.scalars(1, {"loss": 1.0})
            folder = self.folder.path / CHECKPOINTS / f"position-{next(positions)}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state.json").write_text("{}")
            raise Interrupted("stopped")

    monkeypatch.setattr(Stopped, "_check_sources", lambda self: None)
    tiny_model(tmp_path / "model")
    run = {"output_dir": str(tmp_path / "run"), "tensorboard": False}
    config = validate({"run": run, "model": {"path": str(tmp_path / "model")}})
    positions = iter((1, 1, 2))
    with runtime.process_group(60, 60):
        for ending in ("stopped", "stopped; this start has kept nothing", "stopped"):
            with pytest.raises(Interrupted) as caught:
                Stopped(config, Options(), None, RunFolder(config.run.output_dir), {}, {}).run()
            assert str(caught.value) == ending


@pytest.mark.parametrize(
    ("ranks", "new_tokens", "mode", "is_said"),
    [
        (2, 32768, "gathered", True),
        (2, 8192, "gathered", False),
        (2, 32768, "per_token", False),
        (1, 32768, "gathered", False),
    ],
)
def test_a_wait_for_long_responses_is_announced(
    ranks: int, new_tokens: int, mode: str, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that go in step do not wait for one another."""
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", timedelta(seconds=1800))
    monkeypatch.setattr(runtime, "world_size", lambda: ranks)
    monkeypatch.setattr(respond, "choose_mode", lambda *_: (mode, "so"))
    monkeypatch.setattr(respond, "ready_to_generate", lambda *_: nullcontext())
    monkeypatch.setattr(respond, "choose_batches", lambda *_: ([], None))
    lines: list[str] = []
    tracker = SimpleNamespace(log=lines.append, progress=lambda **_: nullcontext())
    respond.generate_all(
        SimpleNamespace(expert_parallel=False),
        None,
        (),
        {0: [1]},
        {},
        max_new_tokens=new_tokens,
        batch=SimpleNamespace(rows=lambda *_: 1, size=SimpleNamespace(note="")),
        generation="auto",
        keep=lambda new: None,
        tracker=tracker,
    )
    said = [line for line in lines if "raise run.collective_timeout_s" in line]
    assert len(said) == is_said and all("may take 3,277 s" in line and "for 1,800 s at most" in line for line in said)


@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_are_counted_over_all_ranks_and_those_of_a_repeated_prompt_are_not(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt for two ranks that must run in step: the second repeats it."""
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(runtime, "rank", lambda: rank)
    shared = [([(0, "of rank 0", True)], 5, False), ([], 0, False)]
    monkeypatch.setattr(runtime, "gather_objects", lambda mine: [shared[0], mine] if rank else [mine, shared[1]])
    monkeypatch.setattr(respond, "choose_mode", lambda *_: ("per_token", "so"))
    monkeypatch.setattr(respond, "ready_to_generate", lambda *_: nullcontext())
    monkeypatch.setattr(respond, "choose_batches", lambda *_: ([[0]], None))
    monkeypatch.setattr(respond, "generate", lambda *_: (["said"], 5, [True]))
    counted: list[tuple[int, int]] = []
    cut = set[int]()

    class Bar(nullcontext):
        def advance(self, n: int, num_tokens: int) -> None:
            counted.append((n, num_tokens))

    respond.generate_all(
        SimpleNamespace(expert_parallel=False),
        None,
        (),
        {0: [1]},
        {},
        max_new_tokens=9,
        batch=SimpleNamespace(rows=lambda *_: 1, size=SimpleNamespace(note="")),
        generation="auto",
        keep=lambda new: None,
        tracker=SimpleNamespace(log=lambda line: None, progress=lambda **_: Bar()),
        cut=cut,
    )
    assert counted == [(1, 5)] and cut == {0}


def test_entries_load_nothing_heavy() -> None:
    """A mistake in a config, or a plan, must not wait for libraries that only the run needs."""
    modules = ", ".join(sorted(set(ENTRIES.values())))
    code = (
        f"import sys, {modules}\n"
        "heavy = {'deepspeed', 'lm_eval', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_manifest_says_what_the_time_went_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one name add up, a block that fails is counted too, and earlier records have what was known then."""

    class Working(Run):
        def work(self) -> None:
            self._fingerprint = "f"
            for name, seconds in (("loading", 3.0), ("scoring", 5.0), ("loading", 0.25)):
                with self.phase(name):
                    clock[0] += seconds
            self.record("running")
            running.update(json.loads((tmp_path / "manifest.json").read_text())["phases_s"])
            with self.phase("exporting"):
                clock[0] += 7.0
                raise UserError("a", "b", "c", "d")

    clock, running = [100.0], dict[str, float]()
    monkeypatch.setattr(stage_run.time, "monotonic", lambda: clock[0])
    config = validate({"run": {"output_dir": str(tmp_path), "tensorboard": False}, "model": {"path": "a"}})
    run = Working(config, Options(), None, RunFolder(str(tmp_path)), {"gradient_clipping": 0.5}, {})
    run.tracker = SimpleNamespace(remarks=[])  # type: ignore[assignment]
    run.folder.open(config)
    with pytest.raises(UserError):
        run.work()
    run.record("failed")
    assert running == {"loading": 3.25, "scoring": 5.0}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["phases_s"] == {**running, "exporting": 7.0}
    assert manifest["deepspeed"] == {"gradient_clipping": 0.5}  # the file that the config names may change
    assert f"torch {torch.__version__}" in run.versions["versions"]


def test_an_evaluation_names_the_model_that_has_changed(tmp_path: Path) -> None:
    facts = {"exit_state": "running", "world_size": 1, "started": 0.0, "model_fingerprint": "ab", "data": {}}
    folder = RunFolder(str(tmp_path))
    folder.write_manifest(**facts, notes={"model_fingerprints": {"base": "a", "SPA": "b"}})
    models = [SimpleNamespace(name="base", field="model.path"), SimpleNamespace(name="SPA", field="eval.models.0.path")]
    run = EvalRun.__new__(EvalRun)
    run.__dict__ |= {"folder": folder, "inputs": SimpleNamespace(models=models)}
    for fingerprints, field in (({"base": "a", "SPA": "c"}, "eval.models.0.path"), ({"base": "c"}, "model.path")):
        run.__dict__["_fingerprints"] = fingerprints
        with pytest.raises(UserError, match=rf"{field}: is not what the run in .* started with"):
            run.check_models("other")
    run.__dict__["_fingerprints"] = {"base": "a", "SPA": "b"}
    run.check_models("ab")


def test_tasks_of_a_model_that_does_not_fit_are_refused_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval reads a whole copy on every rank, after hours of answers and verdicts."""
    source = ModelSource(str(ROOT / "examples/models/llama-aligned"))
    models = [SimpleNamespace(name=name, config=load_model_config(source), source=source) for name in ("base", "SPA")]
    run = EvalRun.__new__(EvalRun)
    run.config = SimpleNamespace(model=SimpleNamespace(dtype="fp32"))
    run.folder = SimpleNamespace(path=tmp_path)
    run.inputs = SimpleNamespace(tasks=[SimpleNamespace(name="gsm8k")], candidates=models)
    run._check_room_for_tasks()
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 4_000_000)  # of 8.76 MB
    problem = "lm-eval needs the whole model on every rank: base takes 0.008156 GiB, and one has 0.003725 GiB free"
    with pytest.raises(UserError, match=f"eval.tasks = gsm8k: {problem}"):
        run._check_room_for_tasks()
    (tmp_path / "tasks.jsonl").write_text(
        "".join(f'{{"model": "{name}", "task": 0, "results": []}}\n' for name in ("base", "SPA"))
    )
    del run.__dict__["_task_rows"]
    run._check_room_for_tasks()  # all of them are on disk
    order: list[str] = []
    for name in ("begin_with", "_check_room_for_tasks"):
        monkeypatch.setattr(EvalRun, name, lambda *_, name=name: order.append(name))
    run.__dict__ |= {"_fingerprints": {}, "tracker": None}
    with pytest.raises(AttributeError):  # at the log, the next step
        run.work()
    assert order == ["begin_with", "_check_room_for_tasks"]  # so that the folder serves a start without tasks


def test_the_prompts_of_routing_frequencies_are_inputs() -> None:
    def source(*prompts: str) -> dict[str, object]:
        inputs = SimpleNamespace(prefix="", data=SimpleNamespace(source={"sha256": "a"}), benign_prompts=prompts)
        return EsiInputs([inputs], []).source  # type: ignore[list-item]

    assert source("a") == source("a") != source("b")
    assert source() == {"sha256": "a"}
