"""Rank discovery: what each launcher leaves in the environment, nested launchers, contradictions."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import psutil
import pytest
from conftest import ROOT

from esi_ds import launch_environment
from esi_ds.errors import UserError
from esi_ds.launch_environment import ALONE, LaunchEnvironment, read

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPIRUN_RSH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "0",
    "MV2_COMM_WORLD_LOCAL_SIZE": "1",
}
DAEMON = {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, ALONE),
        (TORCHRUN, LaunchEnvironment("torch", 3, 4, 1, 2)),
        (DEEPSPEED, LaunchEnvironment("torch", 1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, LaunchEnvironment("torch", 1, 2, None, None)),
        (STEP, LaunchEnvironment("Slurm", 1, 2, 0, 1)),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NTASKS": "3"}, LaunchEnvironment("Slurm", 1, 3, 0, None)),
        # The allocation may have more tasks than this step of it.
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, LaunchEnvironment("Slurm", 1, 2, 0, 1)),
        (BATCH, ALONE),  # plain python in a batch script's shell is not a rank of the allocation
        (MPIRUN, LaunchEnvironment("Open MPI", 1, 2, 1, 2)),
        (MPIRUN_RSH, LaunchEnvironment("MVAPICH2", 1, 2, 0, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, LaunchEnvironment("MPI", 1, 2, None, None)),
        ({**STEP, "PMI_RANK": "1", "PMI_SIZE": "2"}, LaunchEnvironment("Slurm", 1, 2, 0, 1)),  # srun --mpi=pmi2
        ({**DAEMON, **MPIRUN}, LaunchEnvironment("Open MPI", 1, 2, 1, 2)),  # mpirun starts its daemons with srun
        ({**STEP, **TORCHRUN}, LaunchEnvironment("torch", 3, 4, 1, 2)),  # srun, one torchrun per node
        (
            {**STEP, "RANK": "1", "WORLD_SIZE": "2"},
            LaunchEnvironment("torch", 1, 2, None, None),
        ),  # set by a script
    ],
)
def test_launchers(variables: dict[str, str], launch: LaunchEnvironment) -> None:
    assert read(variables) == launch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE = two"),
        ({**DEEPSPEED, "LOCAL_RANK": "2"}, "LOCAL_RANK = 2"),
        # Variables left in a profile: each of srun's two processes would be a job of its own, writing one folder.
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "rank 1 of 2; unset RANK"),
        ({**MPIRUN, "RANK": "0", "WORLD_SIZE": "1"}, "contradict Open MPI's"),
        # srun -n 2 deepspeed: two jobs of one host each.
        ({**STEP, **DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0"}, "one launcher per job"),
        ({**STEP, "PMI_RANK": "0", "PMI_SIZE": "1"}, "contradict Slurm's"),
    ],
)
def test_contradictions(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read(variables)


def test_command_line_refuses_contradictions() -> None:
    environment = {**STEP, "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "launch/esi.py", "--config", "configs/demo/esi.yaml"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: torch variables"), done.stderr


INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.9", "ib0": "10.1.0.9", "down0": "10.2.0.9"}


@pytest.mark.parametrize(
    ("address", "local_address", "local_ranks", "name"),
    [
        ("node1", "10.1.0.9", 1, "ib0"),  # the one towards rank 0
        ("node0", "127.0.0.1", 1, "eth0"),  # rank 0's own host, whose name is 127.0.1.1 in its /etc/hosts
        ("127.0.0.1", "127.0.0.1", 1, "lo"),  # whoever says so has one host
        ("localhost", "127.0.0.1", None, "lo"),
        ("node0", "127.0.0.1", 2, None),  # all ranks on one host
    ],
)
def test_the_interface_that_other_hosts_reach(
    monkeypatch: pytest.MonkeyPatch, address: str, local_address: str, local_ranks: int | None, name: str | None
) -> None:
    probe = MagicMock()
    probe.return_value.__enter__.return_value.getsockname.return_value = (local_address, 1)
    order = ("lo", "down0", "eth0", "ib0")
    items = {key: [SimpleNamespace(family=socket.AF_INET, address=INTERFACES[key])] for key in order}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: items)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {key: SimpleNamespace(isup=key != "down0") for key in order})
    monkeypatch.setattr(launch_environment.socket, "socket", probe)
    monkeypatch.setattr(launch_environment.socket, "gethostbyname", lambda host: host)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    launch_environment._name_interface(address, LaunchEnvironment("torch", 0, 2, 0, local_ranks))
    assert os.environ.get("GLOO_SOCKET_IFNAME") == name


@pytest.mark.parametrize("error", [psutil.AccessDenied, psutil.NoSuchProcess])
def test_a_parent_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch, error: type[psutil.Error]) -> None:
    """srun's is root's, which /proc hides where it is mounted with hidepid=1; a launcher may have just ended."""

    def parent(process: psutil.Process) -> None:
        raise error(1)

    monkeypatch.setattr(psutil.Process, "parent", parent)
    assert launch_environment.launcher_processes(read(TORCHRUN)) == ()
    assert launch_environment.job_on_host(TORCHRUN) is None


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], dict[str, str]]:
    """The environment that ``join`` leaves behind, given these variables."""
    monkeypatch.setattr(launch_environment, "_name_interface", lambda address, launch: None)

    def join(variables: dict[str, str]) -> dict[str, str]:
        with patch.dict(os.environ, variables, clear=True):
            launch_environment.join()
            return dict(os.environ)

    return join


STALE = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
ONE = {"RANK": "0", "WORLD_SIZE": "1"}
ONE_TASK = {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    "variables",
    [
        STALE,
        {**STALE, **ONE_TASK},
        {**STALE, **ONE},
        {"MASTER_ADDR": "node7", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"MASTER_PORT": "abc"},
        {"MASTER_PORT": "0"},
    ],
)
def test_a_process_alone_meets_itself_whatever_a_site_has_exported(joined, variables: dict[str, str]) -> None:
    environment = joined(variables)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"] not in ("29500", "abc", "0")


def test_a_process_that_torchrun_has_not_started_is_alone_below_it(joined) -> None:
    """A script of its worker may start one without its variables, but for the run's id."""
    assert joined({"TORCHELASTIC_RUN_ID": "none"})["MASTER_ADDR"] == "127.0.0.1"


def test_white_space_around_a_port_is_nothing(joined) -> None:
    joined({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node7", "MASTER_PORT": " 29500\n"})


def test_the_one_rank_of_torchrun_meets_its_agent(joined) -> None:
    assert joined({**STALE, **ONE, "TORCHELASTIC_RUN_ID": "none"}).items() >= STALE.items()


@pytest.mark.parametrize("launcher", [STEP, {"RANK": "1", "WORLD_SIZE": "2"}, MPIRUN])
@pytest.mark.parametrize("port", ["0", "65536", "abc"])
def test_ports_are_checked_whoever_set_them(joined, launcher: dict[str, str], port: str) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT = '?{port}'?: is not a port"):
        joined({**launcher, "MASTER_ADDR": "node7", "MASTER_PORT": port})


@pytest.mark.parametrize(
    ("launcher", "size"),
    [
        ({**STEP, "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "2"),
        ({**DEEPSPEED, **STALE}, "2"),
        ({**STEP, "SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}, None),
    ],
)
def test_libraries_learn_how_many_ranks_a_host_has(joined, launcher: dict[str, str], size: str | None) -> None:
    assert joined(launcher).get("LOCAL_WORLD_SIZE") == size


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu-[03-04]", "gpu-03"),
        ("gpu-03,gpu-07", "gpu-03"),
        ("rack[0-1]n[03-04,7]", "rack0n03"),
        ("a[1,3]-ib", "a1-ib"),
        ("n[08-12],m1", "n08"),
        ("node1", "node1"),
        ("", "127.0.0.1"),
    ],
)
def test_rank_0_is_on_the_first_host_of_slurms_list(joined, hosts: str, first: str) -> None:
    assert joined({**STEP, "SLURM_STEP_NODELIST": hosts})["MASTER_ADDR"] == first


def test_steps_that_may_share_a_host_have_ports_of_their_own(joined) -> None:
    steps = [{**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (7, 8, 9) for step in range(20)]
    ports = {int(joined(step)["MASTER_PORT"]) for step in steps}
    assert len(ports) == len(steps) and min(ports) >= 16384 and max(ports) < 32768
    assert joined({**STEP, "SLURM_STEP_RESV_PORTS": "12001-12002"})["MASTER_PORT"] == "12001"


def test_the_ranks_of_a_step_have_the_same_in_common_after_they_have_joined(joined) -> None:
    step = {**STEP, "SLURM_RESTART_COUNT": "1"}
    assert launch_environment.job_on_host(step) == launch_environment.job_on_host(joined(step)) == "7 0 1"
