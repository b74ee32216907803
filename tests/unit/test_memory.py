"""Memory: what a rank may still take, what a closed model leaves, and which tensors are freed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from esi_ds import host_memory
from esi_ds.zero import memory, runtime
from esi_ds.zero.generate import choose_mode
from esi_ds.zero.placement import _choose_placement

GIB = 2**30


def write_group(folder: Path, version: int, limit: int | str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\n{names[2]} {cached}\n")


@pytest.fixture
def host(monkeypatch, tmp_path: Path) -> Path:
    """A host of which 100 GiB are available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    return tmp_path


def available(host: Path, groups: str) -> int:
    (host / "cgroup").write_text(groups)
    return host_memory.available_bytes(host / "cgroup", host / "fs")


def test_without_a_limit_the_host_counts(host: Path) -> None:
    assert host_memory.available_bytes(host / "absent", host / "fs") == 100 * GIB
    write_group(host / "fs/job", 2, "max", 5 * GIB, 0)
    assert available(host, "0::/job\n") == 100 * GIB


@pytest.mark.parametrize(
    ("version", "groups", "top"),
    [(2, "0::/slurm/job/step\n", "fs"), (1, "4:cpu,memory:/slurm/job/step\n", "fs/memory")],
)
def test_the_tightest_group_counts(host: Path, version: int, groups: str, top: str) -> None:
    write_group(host / top / "slurm/job/step", version, 40 * GIB, 6 * GIB, 2 * GIB)
    write_group(host / top / "slurm/job", version, 50 * GIB, 30 * GIB, 4 * GIB)
    assert available(host, f"3:cpuset:/elsewhere\n{groups}") == 24 * GIB
    write_group(host / top / "slurm/job", version, 90 * GIB, 30 * GIB, 4 * GIB)
    assert available(host, groups) == 36 * GIB
    write_group(host / top, version, 3 * GIB, 4 * GIB, 0)  # in use beyond the limit
    assert available(host, groups) == 0


def test_in_a_container_the_path_is_another(host: Path) -> None:
    write_group(host / "fs", 2, 8 * GIB, 5 * GIB, GIB)
    assert available(host, "0::/kubepods/pod1\n") == 4 * GIB


def test_ranks_share_a_host(host: Path, monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 12 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory_bytes() == 3 * GIB


def test_cached_blocks_of_a_gpu_are_free(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20 * GIB)
    assert memory.free_memory_bytes() == 43 * GIB


def test_free_reaches_nested_tensors_and_gradients_but_not_what_is_kept() -> None:
    weight = torch.ones(4, requires_grad=True)
    weight.grad = torch.ones(4)
    nested, kept, view = torch.ones(5), torch.ones(6), torch.ones(7)
    gradient, seen = weight.grad, torch.ones(8)
    seen.numpy()  # its storage cannot be resized any more
    held = {"a": [weight, (nested,)], "b": {"c": kept, "d": view[2:]}, "e": "text", "f": None, "g": seen}
    memory.free(held, kept={kept.untyped_storage().data_ptr()})
    sizes = [tensor.untyped_storage().nbytes() for tensor in (weight, gradient, nested, kept, view, seen)]
    assert sizes == [0, 0, 0, 24, 0, 0]


@pytest.fixture
def tightest(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank has 1,000 bytes free and another one 100."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    monkeypatch.setattr(runtime, "all_reduce_max", lambda held: held.clamp(min=-100))


@pytest.mark.parametrize(("size", "chosen"), [(25, "replicated"), (26, "sharded")])
def test_a_judge_is_whole_where_it_takes_a_quarter_of_the_tightest_rank(size: int, chosen: str, tightest: None) -> None:
    assert _choose_placement(size, "auto")[0] == chosen
    for placement in ("replicated", "sharded"):
        said, reason = _choose_placement(size, placement)
        assert said == placement and reason.startswith("set by the config; ")


@pytest.mark.parametrize(("numel", "chosen"), [(40, "gathered"), (41, "per_token")])
def test_a_model_is_whole_to_generate_where_it_takes_four_fifths_of_the_tightest_rank(
    numel: int, chosen: str, tightest: None
) -> None:
    """Of two bytes a weight."""
    model = SimpleNamespace(
        layouts=[SimpleNamespace(name="a", numel=numel - 5), SimpleNamespace(name="b", numel=5)],
        by_name={name: torch.zeros(1, dtype=torch.bfloat16) for name in ("a", "b")},
        expert_parallel=False,
    )
    assert choose_mode(model, "auto")[0] == chosen
    for mode in ("gathered", "per_token"):
        said, reason = choose_mode(model, mode)
        assert said == mode and reason.startswith("set by esi.generation; ")
