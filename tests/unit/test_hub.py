"""Models on the hub: asked for once on each host, and of one commit. The hub is fabricated: its branch moves at every
download, so that two downloads never agree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from builders import build_model, byte_bpe_tokenizer
from transformers import AutoModelForCausalLM

from esi_ds import launch_environment
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import UserError
from esi_ds.models import hub
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource, checkpoint_folder, load_model_config, stored_tensors
from esi_ds.stages.run import check_commits
from esi_ds.zero import runtime
from esi_ds.zero.loading import read_module

RANK = """
import sys, time
from pathlib import Path
from esi_ds import launch_environment
from esi_ds.models import hub
cache, host, fails = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "fails"

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


def ranks(cache: Path, hosts: str, fails: bool = False, job: str = "job") -> list[subprocess.CompletedProcess[str]]:
    """One process for each letter of ``hosts``, at the same time."""
    environment = {**os.environ, "TMPDIR": str(cache)}
    words = [sys.executable, "-c", RANK, str(cache)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen([*words, host, "fails" if fails else "works", job], **pipes) for host in hosts]
    return [subprocess.CompletedProcess("", p.returncode, *said) for p, said in ((p, p.communicate()) for p in started)]


def test_one_rank_of_a_host_asks_and_the_others_read(tmp_path: Path) -> None:
    done = ranks(tmp_path, "aaa")
    (said,) = {process.stdout for process in done}
    assert said == f"{tmp_path}/commit1 {{'org/model': 'commit1'}}\n", done
    assert (tmp_path / "calls").read_text().splitlines() == ["org/model None *.json", "org/model commit1 *.safetensors"]
    # Another host of the job, and another job on this one, ask for themselves.
    assert "commit3" in ranks(tmp_path, "b")[0].stdout
    assert "commit5" in ranks(tmp_path, "a", job="another")[0].stdout


def test_where_the_first_fails_the_next_tries(tmp_path: Path) -> None:
    done = ranks(tmp_path, "aa", fails=True)
    assert sorted(process.returncode for process in done) == [0, 1]
    assert sum("no network" in process.stderr for process in done) == 1
    assert [process.stdout.split()[0] for process in done if process.returncode == 0] == [f"{tmp_path}/commit2"]


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
    return asked


def test_config_tokenizer_weights_and_fingerprint_are_of_one_commit(
    downloads: list[str | None], tmp_path: Path
) -> None:
    source = ModelSource("org/model")
    with pytest.raises(UserError, match="no readable model configuration"):
        load_model_config(source, only_local=True)
    assert stored_tensors(source) == [] and downloads == []
    config, tokenizer = load_model_config(source), load_tokenizer(source)
    assert config.name_or_path == tokenizer.name_or_path == "org/model"
    assert downloads == [None] and stored_tensors(source) == []
    module = read_module(source, "fp32", AutoModelForCausalLM)
    folder = checkpoint_folder(source)
    assert folder == source.folder() == tmp_path / "cache/commit1" and module.name_or_path == "org/model"
    assert tensor_digests(folder, 0, 1) == tensor_digests(tmp_path / "model", 0, 1)
    assert len(stored_tensors(source)) > 0
    assert downloads == [None, "commit1"]
    assert hub.commits() == {"org/model": "commit1"}


def test_hosts_with_other_commits_are_refused(downloads: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    ModelSource("org/model", "dev").folder()

    def gathered(*others: dict[str, str]) -> Callable[[dict[str, str]], list[dict[str, str]]]:
        return lambda item: [item, *others]

    monkeypatch.setattr(runtime, "gather_objects", gathered({"org/model (dev)": "dev"}, {}))
    check_commits()
    monkeypatch.setattr(runtime, "gather_objects", gathered({"org/model (dev)": "c2"}))
    with pytest.raises(UserError, match=r"revision = org/model \(dev\): is another commit on other hosts \(c2, dev\)"):
        check_commits()
