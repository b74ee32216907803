"""Models on the hub: asked for once on each host, and of one commit. The hub is fabricated: its branch moves at every
download, so that two downloads never agree."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from conftest import fork_server
from fork_server import exit_code_file
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from esi_ds import launch_environment
from esi_ds.artifacts import RunFolder
from esi_ds.config import Config, validate
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import UserError
from esi_ds.models import hub
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource, checkpoint_folder, load_model_config, stored_weights
from esi_ds.stages.begun import keep_commits
from esi_ds.stages.run import check_commits, check_source
from esi_ds.zero import runtime
from esi_ds.zero.loading import read_module

RANK = """
import sys, tempfile, time
from pathlib import Path
from esi_ds import launch_environment
from esi_ds.models import hub
cache, host, fails = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "fails"
tempfile.tempdir = None  # read once from TMPDIR

def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
    with (cache / "calls").open("a") as opened:
        opened.write(f"{name} {revision} {allow_patterns[0]}\\n")
    number = len((cache / "calls").read_text().splitlines())
    time.sleep(0.3)  # long enough for the others to come
    if fails and number == 1:
        raise OSError("no network")
    return str(cache / (revision or f"commit{number}"))

hub.snapshot_download = snapshot_download
hub.socket.gethostname = lambda: host
launch_environment.job_on_host = lambda: sys.argv[4]
print(hub.weights("org/model", None), hub.commits())
"""


def at_once(cache: Path, code: str, arguments: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a process for each list of arguments, all of them started at the same time."""
    script, jobs = cache / "rank.py", []
    script.write_text(code)
    for words in arguments:
        log = Path(tempfile.mkdtemp(dir=cache)) / "log"
        environment = {**os.environ, "TMPDIR": str(cache)}
        errors = log.with_name("errors")
        jobs.append((fork_server().start(str(script), words, [environment], log, errors=errors), log, errors))
    assert all(job.has_ended(60) for job, *_ in jobs)
    return [(int(exit_code_file(log).read_text()), job.said(), errors.read_text()) for job, log, errors in jobs]


def ranks(cache: Path, hosts: str, fails: bool = False, job: str = "job") -> list[tuple[int, str, str]]:
    """One process for each letter of ``hosts``."""
    return at_once(cache, RANK, [[str(cache), host, "fails" if fails else "works", job] for host in hosts])


def test_one_rank_of_a_host_asks_and_the_others_read(tmp_path: Path) -> None:
    done = ranks(tmp_path, "aaa")
    (said,) = {out for _, out, _ in done}
    assert said == f"{tmp_path}/commit1 {{'org/model': 'commit1'}}\n", done
    assert (tmp_path / "calls").read_text().splitlines() == [
        "org/model None *.json",
        "org/model commit1 model.safetensors",
    ]
    # Another host of the job, and another job on this one, ask for themselves.
    assert "commit3" in ranks(tmp_path, "b")[0][1]
    assert "commit5" in ranks(tmp_path, "a", job="another")[0][1]


def test_where_the_first_fails_the_next_tries(tmp_path: Path) -> None:
    done = ranks(tmp_path, "aa", fails=True)
    assert sorted(code for code, *_ in done) == [0, 1]
    assert sum("no network" in error for *_, error in done) == 1
    assert [out.split()[0] for code, out, _ in done if code == 0] == [f"{tmp_path}/commit2"]


SET_RANK = """
import json, sys, tempfile, time
from pathlib import Path
import datasets
from esi_ds import launch_environment
from esi_ds.data.rows import read_rows
from esi_ds.eval.task_files import read_afresh
cache, kind, plain = Path(sys.argv[1]), sys.argv[2], datasets.load_dataset

def load_dataset(path, name, split=None, **options):
    calls = cache / "calls"
    with calls.open("a") as opened:
        opened.write(f"{path} {name} {split}\\n")
    number = len(calls.read_text().splitlines())
    time.sleep(1)  # long enough for the others to come
    if kind == "fails" or kind == "fails once" and number == 1:
        raise ConnectionError("no network\\nand more")
    rows = cache / f"commit{number}.jsonl"  # another commit at every load
    rows.write_text("".join(json.dumps({"prompt": f"{number}-{i}", "turns": [{"n": i}]}) + "\\n" for i in range(9)))
    if kind == "memory":
        return datasets.Dataset.from_list([{"prompt": f"{number}"}])
    return plain("json", data_files=str(rows), split=split, cache_dir=str(cache / "hf"), **options)

datasets.load_dataset = load_dataset
tempfile.tempdir = None  # read once from TMPDIR
launch_environment.job_on_host = lambda: "job"
Path(cache, f"ready-{sys.argv[3]}").touch()
while len(list(cache.glob("ready-*"))) < int(sys.argv[4]):
    time.sleep(0.01)
try:
    if sys.argv[5] == "task":
        with read_afresh():
            rows = datasets.load_dataset(path="org/set", name="all")["train"].to_list()
    else:
        rows = read_rows("org/set", "data.prompts.path", name="all", split=sys.argv[5])
    print(json.dumps(rows))
except Exception as error:
    sys.exit(f"{type(error).__name__} {error}")
"""


def set_ranks(cache: Path, number: int, kind: str, split: str = "train") -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of as many ranks, which load the same data set at the same time."""
    return at_once(cache, SET_RANK, [[str(cache), kind, str(rank), str(number), split] for rank in range(number)])


def test_one_rank_of_a_host_asks_for_a_data_set_and_the_others_read_its_rows(tmp_path: Path) -> None:
    """Slowly, and only a slice of a split; with every load the hub has other rows."""
    done = set_ranks(tmp_path, 3, "works", "train[2:5]")
    assert [code for code, *_ in done] == [0, 0, 0], done
    (said,) = {out for _, out, _ in done}
    assert json.loads(said) == [{"prompt": f"1-{i}", "turns": [{"n": i}]} for i in (2, 3, 4)]
    assert (tmp_path / "calls").read_text().splitlines() == ["org/set all train[2:5]"]


def test_the_rows_of_a_task_are_asked_for_once_too(tmp_path: Path) -> None:
    done = set_ranks(tmp_path, 2, "works", "task")
    assert [code for code, *_ in done] == [0, 0], done
    (said,) = {out for _, out, _ in done}
    assert [row["prompt"] for row in json.loads(said)] == [f"1-{i}" for i in range(9)]
    assert (tmp_path / "calls").read_text().splitlines() == ["org/set all None"]


def test_ranks_that_wait_for_a_data_set_in_vain_say_the_same_at_once(tmp_path: Path) -> None:
    done = set_ranks(tmp_path, 3, "fails once")
    assert [code for code, *_ in done] == [1, 1, 1]
    (said,) = {error.splitlines()[-1] for *_, error in done}
    problem = "there is no such file here, and it cannot be loaded from the hub (no network)"
    assert said.startswith(f"UserError data.prompts.path = org/set: {problem}; check")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    # A later attempt of the same job asks again.
    for file in tmp_path.glob("ready-*"):
        file.unlink()
    ((code, out, _),) = set_ranks(tmp_path, 1, "fails once")
    assert code == 0 and json.loads(out)[0]["prompt"] == "2-0"


def test_rows_that_no_cache_holds_are_loaded_by_every_rank(tmp_path: Path) -> None:
    done = set_ranks(tmp_path, 2, "memory")
    assert sorted(out for _, out, _ in done) == ['[{"prompt": "1"}]\n', '[{"prompt": "2"}]\n']


@pytest.mark.parametrize("whole", ["one", "parts", "configured"])
def test_only_weights_that_are_read_are_downloaded(whole: str, downloads: list[str | None], tmp_path: Path) -> None:
    """The hub has Mistral's models as one consolidated file, too."""
    file, names = tmp_path / "model/model.safetensors", ["model.safetensors"]
    shutil.copy(file, tmp_path / "model/consolidated.safetensors")
    if whole == "parts":
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        tensors = sorted(load_file(file).items())
        parts = {name: dict(tensors[number::2]) for number, name in enumerate(names)}
        for name, part in parts.items():
            save_file(part, tmp_path / "model" / name, {"format": "pt"})
        weight_map = {tensor: name for name, part in parts.items() for tensor in part}
        (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        file.unlink()
    elif whole == "configured":
        names = ["consolidated.safetensors"]
        config = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps({**config, "transformers_weights": names[0]}))
    folder = checkpoint_folder(ModelSource("org/model"))
    assert sorted(path.name for path in folder.rglob("*.safetensors")) == names
    assert tensor_digests(folder, 0, 1) == tensor_digests(tmp_path / "model", 0, 1)


@pytest.mark.parametrize("read", [load_model_config, checkpoint_folder, load_tokenizer])
def test_a_full_cache_is_not_blamed_on_the_model(
    read: Callable[[ModelSource], object], downloads: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Homes on clusters have quotas."""

    def snapshot_download(*arguments: object, **options: object) -> str:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "/home/me/.cache/a.incomplete")
        except OSError as error:
            raise RuntimeError("Data processing error: CAS service error") from error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"HF_HOME = .*cannot store .*\(disk quota exceeded\); make room there, or set"):
        read(ModelSource("org/model"))


def test_where_files_have_no_locks_every_rank_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(opened: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(hub.fcntl, "flock", flock)
    monkeypatch.setattr(launch_environment, "job_on_host", lambda: "job")
    monkeypatch.setattr(hub.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [hub.once_on_host("a", work) for work in (lambda: "first", lambda: "second")] == ["first", "second"]


@pytest.mark.parametrize("target", [None, "nowhere", "elsewhere"])
def test_what_lies_in_the_place_of_the_records_stops_no_rank(
    target: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may leave a file there, or a link."""
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / f"esi_ds-{os.getuid()}"
    place.touch() if target is None else place.symlink_to(target)
    monkeypatch.setattr(launch_environment, "job_on_host", lambda: "job")
    monkeypatch.setattr(hub.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [hub.once_on_host("a", work) for work in (lambda: "first", lambda: "second")] == ["first", "second"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_record_that_another_rank_removes_stops_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed and is gone when it is looked at, as a link that leads nowhere is."""
    records = tmp_path / f"esi_ds-{os.getuid()}"
    records.mkdir(mode=0o700)
    (records / "old").symlink_to("nowhere")
    monkeypatch.setattr(launch_environment, "job_on_host", lambda: "job")
    monkeypatch.setattr(hub.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [hub.once_on_host("a", work) for work in (lambda: "first", lambda: "second")] == ["first", "first"]


def test_which_ranks_are_of_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def parent(words: list[str]) -> SimpleNamespace:
        return SimpleNamespace(parent=lambda: SimpleNamespace(pid=5, cmdline=lambda: words, create_time=lambda: 1.5))

    monkeypatch.setattr(psutil, "Process", lambda: parent(["python", "-m", "torch.distributed.run"]))
    two = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launch_environment.job_on_host(two) == "5 1.5"
    assert launch_environment.job_on_host({}) is None
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    assert launch_environment.job_on_host({**step, "SLURM_RESTART_COUNT": "3"}) == "7 0 3"
    monkeypatch.setattr(psutil, "Process", lambda: parent(["bash"]))
    assert launch_environment.job_on_host(two) is None  # a shell starts many jobs


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Revisions that were asked for; the hub's model ``org/model`` changes with every download of ``main``."""
    build_model("llama", tmp_path / "model", byte_bpe_tokenizer())
    asked: list[str | None] = []

    def snapshot_download(
        name: str, revision: str | None = None, allow_patterns: list[str] | None = None, local_files_only: bool = False
    ) -> str:
        assert name == "org/model" and allow_patterns is not None
        if local_files_only:
            raise FileNotFoundError(name)
        asked.append(revision)
        folder = tmp_path / "cache" / (revision or f"commit{len(asked)}")
        for pattern in allow_patterns:
            for file in (tmp_path / "model").glob(pattern):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "_resolved", {})
    monkeypatch.setattr(hub, "_complete", set())
    monkeypatch.setattr(hub, "_kept", {})
    return asked


def test_config_tokenizer_weights_and_fingerprint_are_of_one_commit(
    downloads: list[str | None], tmp_path: Path
) -> None:
    source = ModelSource("org/model")
    with pytest.raises(UserError, match="no readable model configuration"):
        load_model_config(source, only_local=True)
    assert stored_weights(source) == [] and downloads == []
    config, tokenizer = load_model_config(source), load_tokenizer(source)
    assert config.name_or_path == tokenizer.name_or_path == "org/model"
    assert downloads == [None] and stored_weights(source) == []
    module = read_module(source, "fp32", AutoModelForCausalLM)
    folder = checkpoint_folder(source)
    assert folder == source.folder() == tmp_path / "cache/commit1" and module.name_or_path == "org/model"
    assert tensor_digests(folder, 0, 1) == tensor_digests(tmp_path / "model", 0, 1)
    assert len(stored_weights(source)) > 0
    assert downloads == [None, "commit1"]
    assert hub.commits() == {"org/model": "commit1"}


@pytest.mark.parametrize("said_by", ["manifest.json", "inputs.json"])
def test_a_run_goes_on_with_the_commits_that_it_began_with(
    said_by: str, downloads: list[str | None], tmp_path: Path
) -> None:
    """Every download finds a later commit; a revision may name the one that is recorded, and be left out again."""

    def config(**model: str | None) -> Config:
        return validate({"run": {"output_dir": str(tmp_path / "run")}, "model": {"path": "org/model", **model}})

    folder = RunFolder(str(tmp_path / "run"))
    folder.open(config())
    ModelSource("org/model").folder()
    facts = {"world_size": 1, "started": 0.0, "model_fingerprint": "f", "data": {}}
    folder.write_manifest(exit_state="interrupted", **facts, notes={"hub_commits": hub.commits()})
    if said_by == "inputs.json":
        (tmp_path / "run/manifest.json").unlink()
    logged = ["org/model: commit commit1, with which this run began"]
    for revision, lines in ((None, logged), ("commit1", []), (None, logged)):
        hub._resolved.clear()
        section = config(revision=revision)
        keep_commits(section)
        assert ModelSource.of(section.model).folder().name == "commit1" and hub.kept_commits() == lines
        folder.open(section)
        folder.write_manifest(exit_state="interrupted", **facts, notes={"hub_commits": hub.commits()})
    assert downloads == [None, "commit1", "commit1", "commit1"]
    with pytest.raises(UserError, match=r"holds a run whose config differs in model\.revision"):
        folder.open(config(revision="commit2"))
    keep_commits(validate({"run": {"output_dir": str(tmp_path / "new")}, "model": {"path": "org/model"}}))
    assert hub._kept == {}


def test_weights_of_the_hub_are_checked_like_a_folder_s(downloads: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "model/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.path = org/model: holds an adapter"):
        read_module(ModelSource("org/model"), "fp32", AutoModelForCausalLM)
    (tmp_path / "model/adapter_config.json").unlink()
    shutil.rmtree(tmp_path / "cache")
    hub._resolved.clear()
    hub._complete.clear()
    file = tmp_path / "model/model.safetensors"
    name, weights = "model.layers.0.mlp.up_proj.weight", load_file(file)
    save_file({**weights, f"{name}_scale_inv": torch.ones(1, 1)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="_scale_inv, a part of quantised weights"):
        read_module(ModelSource("org/model"), "fp32", AutoModelForCausalLM)


def test_hosts_with_other_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"prompts": "hub:org/set", "sha256": "aa"}
    monkeypatch.setattr(runtime, "gather_objects", lambda item: [item, dict(item)])
    check_source(mine)
    monkeypatch.setattr(runtime, "gather_objects", lambda item: [item, {**item, "sha256": "bb"}])
    with pytest.raises(UserError, match="data = sha256: is bb on one host and aa on another; give every host the same"):
        check_source(mine)


def test_hosts_with_other_commits_are_refused(downloads: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    ModelSource("org/model", "dev").folder()

    def gathered(*others: dict[str, str]) -> Callable[[dict[str, str]], list[dict[str, str]]]:
        return lambda item: [item, *others]

    monkeypatch.setattr(runtime, "gather_objects", gathered({"org/model (dev)": "dev"}, {}))
    check_commits()
    monkeypatch.setattr(runtime, "gather_objects", gathered({"org/model (dev)": "c2"}))
    with pytest.raises(UserError, match=r"revision = org/model \(dev\): is another commit on other hosts \(c2, dev\)"):
        check_commits()
