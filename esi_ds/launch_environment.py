"""Which process of the job this is, read from the variables that launchers set; no other module reads them.

``deepspeed`` and ``torchrun`` set torch's variables; ``srun`` sets Slurm's, ``mpirun`` Open MPI's, MVAPICH2's or
PMI's. Nothing here imports torch. Contradicting variables are an error: a job that silently fell apart into several
jobs of one process each would write all of them into one folder.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil

from esi_ds.errors import UserError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

# Below Linux's ephemeral ports (32768 and up), so that no outgoing connection sits on a port derived from a job id.
FIRST_PORT, NUM_PORTS = 16384, 16384


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher's variables say about this process.

    ``local_*`` count this host's processes only; None if the launcher does not say.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None


@dataclass(frozen=True)
class Launcher:
    """The names of a launcher's variables; of several names in one field the first that is set counts.

    mark: a variable that only the launcher sets, never a shell profile; without it the others are ignored.
    """

    name: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_world_size: tuple[str, ...]
    mark: str


TORCH = Launcher("torch", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), "RANK")
# The shell of a batch script has SLURM_PROCID too; only srun's processes have a step.
SLURM = Launcher(
    "Slurm",
    "SLURM_PROCID",
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "SLURM_LOCALID",
    ("SLURM_STEP_TASKS_PER_NODE",),
    "SLURM_STEP_ID",
)
OPEN_MPI = Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_SIZE",),
    "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    "OMPI_COMM_WORLD_RANK",
)
MVAPICH2 = Launcher(
    "MVAPICH2",
    "MV2_COMM_WORLD_RANK",
    ("MV2_COMM_WORLD_SIZE",),
    "MV2_COMM_WORLD_LOCAL_RANK",
    ("MV2_COMM_WORLD_LOCAL_SIZE",),
    "MV2_COMM_WORLD_RANK",
)
PMI = Launcher("MPI", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), "PMI_RANK")
MPI_LAUNCHERS = (OPEN_MPI, MVAPICH2, PMI)
# Set by torchrun and by deepspeed's launcher besides torch's variables: proof that one of them started this process.
NESTED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
ALONE = LaunchEnvironment("python", rank=0, world_size=1, local_rank=0, local_world_size=1)


def read(variables: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """torch's variables, else MPI's, else Slurm's; ``ALONE`` if none are set.

    Raises UserError if a launcher's variables are incomplete or impossible, or two launchers' contradict each other.
    """
    torch, slurm, *any_mpi = (_read_launcher(launcher, variables) for launcher in (TORCH, SLURM, *MPI_LAUNCHERS))
    mpi = next((launch for launch in any_mpi if launch), None)
    if torch and not any(name in variables for name in NESTED):
        for other in (slurm, mpi):
            if other and not _same(torch, other):
                raise _contradiction(torch, other, "unset RANK and WORLD_SIZE where the job starts")
    # One launcher started by another: the inner one numbers the ranks, the outer one says how many there must be.
    if mpi and slurm and _same(mpi, slurm):
        mpi = None  # srun with a PMI plugin
    inner = torch or mpi or slurm
    if inner is None:
        return ALONE
    for outer in (slurm, mpi):
        one_host = inner.local_world_size is not None and inner.world_size == inner.local_world_size
        alone = inner.world_size == 1 or (one_host and inner.launcher == "torch")
        if outer and outer is not inner and outer.world_size > 1 and alone and not _same(inner, outer):
            raise _contradiction(inner, outer, "start one launcher per job, or give the inner one all nodes of the job")
    return inner


def _same(one: LaunchEnvironment, other: LaunchEnvironment) -> bool:
    return (one.rank, one.world_size) == (other.rank, other.world_size)


def _contradiction(one: LaunchEnvironment, other: LaunchEnvironment, remedy: str) -> UserError:
    return UserError(
        f"{one.launcher} variables",
        f"rank {one.rank} of {one.world_size}",
        f"contradict {other.launcher}'s, rank {other.rank} of {other.world_size}",
        remedy,
    )


def _read_launcher(launcher: Launcher, variables: Mapping[str, str]) -> LaunchEnvironment | None:
    """What one launcher's variables say; None if they are not set."""
    size_name = next((name for name in launcher.world_size if name in variables), None)
    if launcher is TORCH and (launcher.rank in variables) != (size_name is not None):
        missing = launcher.world_size[0] if size_name is None else launcher.rank
        raise UserError(missing, None, "is not set, but its counterpart is", "set both, or use a launcher")
    if launcher.mark not in variables or launcher.rank not in variables or size_name is None:
        return None
    rank, world_size = _number(launcher.rank, variables), _number(size_name, variables)
    if rank >= world_size:
        raise UserError(launcher.rank, rank, f"is not below {size_name} = {world_size}", "set ranks 0 to size - 1")
    local_rank = _number(launcher.local_rank, variables) if launcher.local_rank in variables else None
    local_size_name = next((name for name in launcher.local_world_size if name in variables), None)
    local_world_size = None
    # Slurm lists different numbers of tasks per node ("2,1") without saying which node this is.
    if local_size_name and (same_on_all := re.fullmatch(r"(\d+)(\(x\d+\))?", variables[local_size_name])):
        local_world_size = int(same_on_all[1])
    if local_rank is not None and local_world_size is not None and local_rank >= local_world_size:
        raise UserError(
            launcher.local_rank,
            local_rank,
            f"is not below {local_size_name} = {local_world_size}",
            "set local ranks 0 to size - 1",
        )
    return LaunchEnvironment(launcher.name, rank, world_size, local_rank, local_world_size)


def _number(name: str, variables: Mapping[str, str]) -> int:
    if not variables[name].strip().isdecimal():
        raise UserError(name, variables[name], "is not a number", "set it to a rank or a count, or use a launcher")
    return int(variables[name])


def threads_set_by_user(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether ``OMP_NUM_THREADS`` is the user's, or that of ``deepspeed --bind_cores_to_rank``.

    torchrun sets 1 where there is none, which its own environment, as it was started with, does not have.
    """
    if "OMP_NUM_THREADS" not in variables:
        return False
    if "TORCHELASTIC_RUN_ID" not in variables:
        return True
    try:
        parent = psutil.Process().parent()
        return parent is None or "OMP_NUM_THREADS" in parent.environ()
    except psutil.Error:
        return True


# Words in the command lines of launchers that leave their ranks running when they are killed.
DEEPSPEED = "deepspeed.launcher.launch"
LAUNCHERS = (DEEPSPEED, "torchrun", "torch.distributed", "mpirun", "mpiexec", "mpispawn", "prte", "orted", "hydra")


def launcher_processes(launch: LaunchEnvironment) -> tuple[tuple[int, int], ...]:
    """(process id, parent's id) from this process up to the user's command; () without a launcher.

    A launcher has died once a process has another parent than its pair says.
    """
    if launch is ALONE:
        return ()
    parent, words = _launcher()
    if parent is None:
        return ()
    pairs = [(os.getpid(), parent.pid)]
    if any(DEEPSPEED in word for word in words):
        pairs.append((parent.pid, parent.ppid()))
        # Its parent is the user's command or, with several hosts, an ssh whose pdsh may run on this host.
        job_arguments = {word for word in words if word.startswith(("--world_info=", "--master_port="))}
        for process in psutil.process_iter(["pid", "ppid", "name", "cmdline"]):
            is_pdsh = (process.info["name"] or "").startswith("pdsh")
            if job_arguments and is_pdsh and job_arguments <= set(process.info["cmdline"] or ()):
                pairs.append((process.info["pid"], process.info["ppid"]))
    return tuple(pairs)


def job_on_host(variables: Mapping[str, str] = os.environ) -> str | None:
    """What the ranks of this job on this host have in common, and no other job has: the step of Slurm, else the
    launcher's process; the same before and after ``join``. None for a process alone, and for ranks that no launcher
    has started."""
    launch, slurm = read(variables), _read_launcher(SLURM, variables)
    if launch.world_size == 1:
        return None
    if slurm and _same(launch, slurm):  # not one of torchrun's ranks within a step
        return " ".join(variables.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    parent, _ = _launcher()
    return None if parent is None else f"{parent.pid} {parent.create_time()}"


def _launcher() -> tuple[psutil.Process | None, list[str]]:
    """The process that started this one and the words of its command line, if it is a launcher that can be seen."""
    with suppress(psutil.Error):  # it has just ended, or is another user's, as srun's is, where /proc hides those
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
        if any(name in " ".join(words) for name in LAUNCHERS):
            return parent, words
    return None, []


def join() -> LaunchEnvironment:
    """``read``, then set torch's variables to match: rank, size, their local ones, the address and port of rank 0.

    Under MPI one broadcast and one gather of mpi4py's; otherwise no communication. Raises UserError if the address of
    rank 0 is not known, or its port is not one, and what ``read`` and mpi4py refuse.
    """
    launch = read()
    # torchrun's one rank meets its agent where that says.
    if launch.world_size == 1 and (launch == ALONE or "TORCHELASTIC_RUN_ID" not in os.environ):
        # Any other process alone meets nobody: what a site or an earlier job exported is not of this run, and two runs
        # in one Slurm step would derive the same port.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif any(launch.launcher == mpi.name for mpi in MPI_LAUNCHERS) and not set(RENDEZVOUS) <= set(os.environ):
        launch, address, port = _ask_mpi(launch)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
    elif launch.launcher == SLURM.name:
        os.environ.setdefault("MASTER_ADDR", _first_host())
        os.environ.setdefault("MASTER_PORT", str(_slurm_port()))
    for name in RENDEZVOUS:
        if name not in os.environ:
            remedy = "name the host of rank 0 and a free port"
            raise UserError(name, None, f"is not set, but WORLD_SIZE = {launch.world_size}", remedy)
    text = os.environ["MASTER_PORT"].strip()
    if not (text.isdecimal() and 0 < int(text) < 65536):  # with 0 every rank would wait at a different port
        raise UserError("MASTER_PORT", text, "is not a port", "name a free port of rank 0's host, 1 to 65535")
    local_rank = launch.local_rank or 0
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(local_rank))
    if launch.local_world_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(launch.local_world_size)
    _name_interface(os.environ["MASTER_ADDR"], launch)
    return replace(launch, local_rank=local_rank)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _first_host() -> str:
    """The step's first host, which has rank 0 under Slurm's default distribution of tasks.

    ``rack[0-1]n[03-04,7],login`` begins with rack0n03. A container has no ``scontrol`` that could say so.
    """
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", hosts).split(",")[0]
    return first or "127.0.0.1"


def _slurm_port() -> int:
    """The same port on every rank, and another one for any other job step that may share the host."""
    reserved = os.environ.get("SLURM_STEP_RESV_PORTS") or ""
    if first_port := re.match(r"\d+", reserved):
        return int(first_port[0])
    job, step = int(os.environ.get("SLURM_JOB_ID", "0")), int(os.environ["SLURM_STEP_ID"])
    return FIRST_PORT + (job * 1009 + step) % NUM_PORTS  # up to 15 successive jobs, 1,000 steps each


def _ask_mpi(launch: LaunchEnvironment) -> tuple[LaunchEnvironment, str, int]:
    """(local ranks as MPI counts them, rank 0's address, a free port that rank 0 picked)."""
    world = mpi_world(launch)
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if local.Get_size() == world.Get_size() else hosts[0]
    port = world.bcast(free_port() if launch.rank == 0 else None)
    launch = replace(launch, local_rank=local.Get_rank(), local_world_size=local.Get_size())
    MPI.Finalize()  # not needed any more, and mpirun reports a process that ends without it as failed
    return launch, address, port


def mpi_world(launch: LaunchEnvironment) -> Intracomm:
    """mpi4py's communicator of all processes. Raises UserError if it is missing or disagrees with ``launch``."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "mpi4py",
            None,
            f"is needed under {launch.launcher} and cannot be loaded ({error})",
            "pip install 'esi_ds[mpi]'",
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        seen = LaunchEnvironment("mpi4py", world.Get_rank(), world.Get_size(), None, None)
        raise _contradiction(seen, launch, "install the mpi4py that was built for this mpirun's MPI")
    return world


def _name_interface(address: str, launch: LaunchEnvironment) -> None:
    """Have gloo use the network interface towards rank 0; by default it takes the host name's, often the loopback.

    On rank 0's host even that may be the loopback (Debian's /etc/hosts maps the host's name to 127.0.1.1), which other
    hosts cannot reach: then the first other interface that is up. An address that is itself the loopback means a job on
    one host and keeps it.
    """
    if launch.world_size == 1 or launch.world_size == launch.local_world_size or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(address), 9))  # sends nothing
            local_address = probe.getsockname()[0]
    except OSError:
        return  # connecting to rank 0 will report what is wrong with the address
    is_cut_off = local_address.startswith("127.") and not (address.startswith("127.") or address == "localhost")
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, items in psutil.net_if_addrs().items():
        addresses = [item.address for item in items if item.family == socket.AF_INET]
        leads_out = name in up and any(not item.startswith("127.") for item in addresses)
        if leads_out if is_cut_off else local_address in addresses:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
