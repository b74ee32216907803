"""What ranks read together: every byte once, no rank much more than another, and all of them learn what one has met."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mask_folders import write_mask
from safetensors.torch import save_file

from esi_ds import artifacts
from esi_ds.artifacts import RunFolder, content_of_file, read_manifest
from esi_ds.config import validate
from esi_ds.core import score_folder
from esi_ds.core.mask import Mask
from esi_ds.core.score_folder import ScoreFolder
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.options import Options
from esi_ds.reading import share_of
from esi_ds.stages import run as stage_run
from esi_ds.stages.run import StageRun
from esi_ds.zero import files, runtime

LARGE, SMALL = 4000, 8  # elements
SIZES = {f"layer.{number}": LARGE if number % 2 == 0 else SMALL for number in range(8)}


@pytest.mark.parametrize("ranks", [1, 3, 40, 80, 128])
def test_every_rank_reads_about_as_much(ranks: int) -> None:
    """61 layers of 10 tensors, of which one holds all gate and up matrices."""
    sizes = {f"{layer}.{number}": 30_000 if number == 7 else 100 for layer in range(61) for number in range(10)}
    shares = [share_of(sizes, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(map(sizes.__getitem__, share)) for share in shares]
    assert max(loads) <= sum(sizes.values()) / ranks + max(sizes.values())
    assert share_of(sizes, 0, 1) == list(sizes)  # in the files' order


def write_scores(folder: Path) -> None:
    parameters, offset = [], 0
    for name, size in SIZES.items():
        parameters.append(Parameter(name, (size,), offset, "mlp.up", (Unit(name, "mlp.up", 0, None, 0, size),)))
        offset += size
    shards = [Shard(parameter, ((0, parameter.numel),), parameter.name) for parameter in parameters]
    facts = {"criterion": "esi", "contrastive": "false", "fingerprint": "a:b", "total_numel": str(offset), "seed": "0"}
    scores = {name: torch.rand(size) for name, size in SIZES.items()}
    files.write_scores(folder, parameters, shards, scores, {"format": "esi-scores/1", **facts})


def read_mask(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> Collection[str]:
    read: list[str] = []
    mask = Mask.load(write_mask(folder, {name: torch.ones(size) > 0 for name, size in SIZES.items()}))
    monkeypatch.setattr(Mask, "data", lambda self, name, data=Mask.data: read.append(name) or data(self, name))
    assert mask.problems(rank, 2) == []
    return read


def read_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> Collection[str]:
    read: list[str] = []
    write_scores(folder / "scores")
    digest = score_folder.tensor_sha256
    monkeypatch.setattr(score_folder, "tensor_sha256", lambda tensor: read.append(tensor.name) or digest(tensor))
    assert ScoreFolder(folder / "scores").problems(rank, 2) == []
    return read


def read_model(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> Collection[str]:
    save_file({name: torch.zeros(size) for name, size in SIZES.items()}, folder / "model.safetensors")
    return tensor_digests(folder, rank, 2)


def read_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> Collection[str]:
    written = files.FolderFiles(folder, {"a": [files.Entry(name, "U8", (size,)) for name, size in SIZES.items()]}, {})
    written.start()
    monkeypatch.setattr(runtime, "rank", lambda: rank)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    return written.read_digests()


@pytest.mark.parametrize("read", [read_mask, read_scores, read_model, read_what_was_written])
def test_large_tensors_at_even_intervals_do_not_fall_to_one_rank(
    read: Callable[[Path, pytest.MonkeyPatch, int], Collection[str]], tmp_path: Path
) -> None:
    seen: list[str] = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            names = list(read(tmp_path / str(rank), patch, rank))
        assert sum(SIZES[name] == LARGE for name in names) == 2, names
        seen += names
    assert sorted(seen) == sorted(SIZES)


class Ranks:
    """Ranks that are threads of this process. read: rank → the results that it has read."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch):
        self.size, self.own, self.read = size, threading.local(), defaultdict[int, list[str]](list)
        self._barrier, self._items = threading.Barrier(size, timeout=60), [None] * size
        contents_of = artifacts.contents_of

        def read(path: Path, names: Collection[str]) -> dict[str, artifacts.FileContent]:
            self.read[self.own.rank] += names
            return contents_of(path, names)

        for owner in (artifacts, stage_run):
            patch.setattr(owner, "contents_of", read)
        patch.setattr(runtime, "rank", lambda: self.own.rank)
        patch.setattr(runtime, "world_size", lambda: size)
        patch.setattr(runtime, "gather_objects", self.gather)
        patch.setattr(runtime, "broadcast_object", lambda item: self.gather(item)[0])

    def gather(self, item: Any) -> list[Any]:
        self._items[self.own.rank] = item
        self._barrier.wait()
        items = list(self._items)
        self._barrier.wait()
        return items

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """What ``work`` returns or raises, on every rank."""
        outcomes: list[Any] = [None] * self.size

        def start(rank: int) -> None:
            self.own.rank = rank
            try:
                outcomes[rank] = work()
            except Exception as error:
                outcomes[rank] = error
                if not isinstance(error, UserError):
                    self._barrier.abort()

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


class Run(StageRun):
    """Its models are what they were."""

    stage = "set"

    def work(self) -> None:
        raise AssertionError("it is done already")

    def _check_sources(self) -> None:
        pass

    def known_fingerprint(self) -> str:
        return "f"


def test_ranks_share_the_results_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone would take longer over a large model's scores than the others wait in a collective."""
    config = validate({"run": {"output_dir": str(tmp_path)}, "model": {"path": "a"}})
    folder = RunFolder(str(tmp_path))
    folder.open(config)
    (tmp_path / "scores").mkdir()
    for name, size in SIZES.items():
        (tmp_path / f"scores/{name}").write_bytes(b"x" * size)
    (tmp_path / "report.json").write_text("{}")
    names = [*(f"scores/{name}" for name in SIZES), "report.json"]

    def start() -> Run:
        run = Run(config, Options(), None, folder, {}, {})
        run.tracker = SimpleNamespace(remarks=[])  # type: ignore[assignment]
        run._fingerprint = "f"
        return run

    ranks = Ranks(4, monkeypatch)
    assert ranks.each(lambda: start().record("done")) == [None] * 4
    described = read_manifest(tmp_path)["results"]
    assert described == {name: content_of_file(tmp_path / name) for name in names} and list(described) == sorted(names)
    for read in ranks.read.values():
        assert sum(f"scores/{name}" in read for name, size in SIZES.items() if size == LARGE) == 1
    ranks.read.clear()
    assert ranks.each(lambda: start()._is_finished()) == [True] * 4
    assert sorted(name for read in ranks.read.values() for name in read) == sorted(names)
    assert max(map(len, ranks.read.values())) < len(names)
    for name in names:  # whichever rank reads it
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"y" + content[1:])
        for error in ranks.each(lambda: start()._is_finished()):
            assert f"{name}: is not what this finished run wrote" in str(error)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "report.json").unlink()
    for error in ranks.each(lambda: start()._is_finished()):
        assert "report.json: belongs to this finished run and is missing" in str(error)
