"""Shares of a host's cores on a fabricated ``/sys``: sockets, hyperthreads, GPUs, and what somebody else has bound."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from esi_ds import launch_environment
from esi_ds.cores import Affinity, CoreShare, describe, near_gpu, parse, share
from esi_ds.zero import runtime

NODES = {0: "0-3,8-11", 1: "4-7,12-15"}  # two sockets of four cores, two hardware threads each
ALL = tuple(range(16))


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Two GPUs at each socket, and one of which the system does not say where it is."""
    devices = tmp_path / "devices/system/cpu"
    devices.mkdir(parents=True)
    (devices / "online").write_text("0-15\n")
    for core in range(16):
        (devices / f"cpu{core}/topology").mkdir(parents=True)
        (devices / f"cpu{core}/topology/thread_siblings_list").write_text(f"{core % 8},{core % 8 + 8}\n")
    for address, node in {"0000:1a:00.0": 0, "0000:3b:00.0": 0, "0000:86:00.0": 1, "0000:af:00.0": 1}.items():
        write_gpu(tmp_path, address, node, NODES[node])
    write_gpu(tmp_path, "0000:00:05.0", -1, "0-15")
    return tmp_path


def write_gpu(system: Path, address: str, node: int, cores: str) -> None:
    folder = system / "bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text(f"{node}\n")
    (folder / "local_cpulist").write_text(f"{cores}\n")


def shares(ranks: list[Affinity], system: Path) -> list[CoreShare]:
    return [share(ranks, rank, system) for rank in range(len(ranks))]


def test_lists_as_the_kernel_writes_them() -> None:
    assert parse("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11) and parse("\n") == ()
    assert describe((8, 0, 1, 2, 3, 10, 11)) == "0-3,8,10-11" and describe(()) == ""


def test_where_a_gpu_is(system: Path) -> None:
    assert near_gpu("0000:3B:00.0", system) == parse(NODES[0])
    assert near_gpu("0000:af:00.0", system) == parse(NODES[1])
    assert near_gpu("0000:00:05.0", system) == () == near_gpu("0000:ff:00.0", system)


def test_ranks_divide_the_cores_near_their_gpus(system: Path) -> None:
    """Whole cores with both hardware threads, and one thread for each core."""
    near = [near_gpu(address, system) for address in ("0000:1a:00.0", "0000:86:00.0", "0000:3b:00.0", "0000:af:00.0")]
    got = shares([Affinity("a", ALL, part) for part in near], system)
    assert [part.cores for part in got] == [(0, 1, 8, 9), (4, 5, 12, 13), (2, 3, 10, 11), (6, 7, 14, 15)]
    assert {part.num_threads for part in got} == {2}
    # A second host's ranks take no part of the first one's.
    two_hosts = [Affinity(host, ALL, part) for host in "ab" for part in near[:2]]
    assert [part.cores for part in shares(two_hosts, system)] == [parse(NODES[0]), parse(NODES[1])] * 2


def test_ranks_without_a_known_gpu_divide_all_cores(system: Path) -> None:
    got = shares([Affinity("a", ALL)] * 2, system)
    assert [part.cores for part in got] == [parse(NODES[0]), parse(NODES[1])]
    assert [part.num_threads for part in got] == [4, 4]
    # Of one GPU it is not known: dividing by socket would give its rank cores that belong to others.
    mixed = [Affinity("a", ALL, near_gpu("0000:1a:00.0", system)), Affinity("a", ALL)]
    assert shares(mixed, system) == got
    # What is left over by an odd number of ranks belongs to nobody.
    assert [part.cores for part in shares([Affinity("a", ALL)] * 3, system)] == [
        (0, 1, 8, 9),
        (2, 3, 10, 11),
        (4, 5, 12, 13),
    ]
    assert shares([Affinity("a", (0, 8))] * 3, system) == [CoreShare((0, 8), 1)] * 3  # more ranks than cores


def test_what_somebody_has_bound_stays(system: Path) -> None:
    near = near_gpu("0000:86:00.0", system)
    # numactl or Slurm: other cores on each rank, even away from its GPU.
    bound = [Affinity("a", (0, 1, 8, 9), near), Affinity("a", (4, 12), near)]
    assert shares(bound, system) == [CoreShare((0, 1, 8, 9), 2), CoreShare((4, 12), 1)]
    # A whole job on some cores: its ranks divide these, near their GPUs if any of them are.
    job = tuple(parse("0-1,4-5,8-9,12-13"))
    ranks = [Affinity("a", job, near_gpu(address, system)) for address in ("0000:1a:00.0", "0000:86:00.0")]
    assert [part.cores for part in shares(ranks, system)] == [(0, 1, 8, 9), (4, 5, 12, 13)]
    elsewhere = [Affinity("a", tuple(parse(NODES[0])), near)] * 2
    assert [part.cores for part in shares(elsewhere, system)] == [(0, 1, 8, 9), (2, 3, 10, 11)]


def test_a_rank_alone(system: Path) -> None:
    """On all cores of the host it takes those near its GPU; some of them were chosen for it."""
    near = near_gpu("0000:86:00.0", system)
    assert share([Affinity("a", ALL, near)], 0, system) == CoreShare(near, 4)
    assert share([Affinity("a", ALL)], 0, system) == CoreShare(ALL, 8)
    assert share([Affinity("a", (0, 1, 4, 8, 9, 12), near)], 0, system) == CoreShare((0, 1, 4, 8, 9, 12), 3)


def test_without_a_system_that_tells(tmp_path: Path) -> None:
    assert shares([Affinity("a", (0, 1, 2, 3), (0, 1))] * 2, tmp_path) == [CoreShare((0,), 1), CoreShare((1,), 1)]
    assert shares([Affinity("a", (0, 1, 2, 3))] * 2, tmp_path) == [CoreShare((0, 1), 2), CoreShare((2, 3), 2)]
    assert share([Affinity("a", (0, 1), (0,))], 0, tmp_path) == CoreShare((0, 1), 2)


@pytest.mark.parametrize(
    ("variables", "launcher", "expected"),
    [
        ({}, {}, False),
        ({"OMP_NUM_THREADS": "4"}, {}, True),  # the user's, or deepspeed --bind_cores_to_rank's
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {}, False),  # torchrun's own
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {"OMP_NUM_THREADS": "1"}, True),
    ],
)
def test_who_set_the_number_of_threads(
    variables: Mapping[str, str], launcher: Mapping[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(parent=lambda: SimpleNamespace(environ=lambda: launcher))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert launch_environment.threads_set_by_user(variables) is expected


THREADS = """
import os, torch
from esi_ds.zero import runtime
runtime.gather_objects = lambda item: [item, item]  # as if another rank of this host saw the same cores
before = os.sched_getaffinity(0)
print("at_first", torch.get_num_threads())
with runtime.process_group():
    print("threads", torch.get_num_threads(), runtime.compute_resources()["threads"])
    print("cores", len(before), len(os.sched_getaffinity(0)))
"""


@pytest.mark.parametrize("number", ["2", None])
def test_a_start_sets_threads_unless_the_user_has(number: str | None) -> None:
    """One thread per core of this rank's half; an explicit number, which pins the bits of CPU runs, stays."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if number is not None:
        environment["OMP_NUM_THREADS"] = number
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    words = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    before, after = map(int, words["cores"])
    assert after == max(1, before // 2), done.stderr
    halves = share([Affinity("a", tuple(sorted(os.sched_getaffinity(0))))] * 2, 0)
    assert words["threads"] == (2 * words["at_first"] if number else [str(halves.num_threads)] * 2)


def test_the_address_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert runtime._gpu_address() == "0000:3b:00.0"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H100"))
    assert runtime._gpu_address() is None
