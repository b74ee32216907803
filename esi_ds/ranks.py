"""Which process of the job this is: the one place that reads what launchers leave in the environment.

``deepspeed`` and ``torchrun`` set torch's variables; ``srun`` sets Slurm's, ``mpirun`` Open MPI's or PMI's. Nothing
here imports torch. Variables that contradict each other are refused: a job that silently falls into several jobs of one
process each would write one folder from all of them.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from esi_ds.errors import UserError

# Below Linux's ephemeral ports (32768 and up), so that no outgoing connection sits on a port derived from a job id.
FIRST_PORT, NUM_PORTS = 16384, 16384


@dataclass(frozen=True)
class Place:
    """This process's place in the job. ``local_*``: among this host's processes; None: the launcher does not say."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None


@dataclass(frozen=True)
class Launcher:
    """A launcher's variables; the names in one field are alternatives, the first that is set counts.

    mark: set by the launcher itself and by nobody's shell profile; without it the variables do not count.
    """

    name: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_world_size: tuple[str, ...]
    mark: str


TORCH = Launcher("torch", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), "RANK")
# A batch script's own shell has SLURM_PROCID too; only srun's processes have a step.
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
PMI = Launcher("MPI", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), "PMI_RANK")
# The variables that torchrun and deepspeed's launcher set besides torch's: proof that one of them started this process.
NESTED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
ALONE = Place("python", rank=0, world_size=1, local_rank=0, local_world_size=1)


def find(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place: torch's variables, then Slurm's, then MPI's; none of them: a job of one process.

    Raises UserError where one launcher's variables are incomplete or impossible, or two launchers' contradict.
    """
    torch, slurm, open_mpi, pmi = (_read(launcher, environment) for launcher in (TORCH, SLURM, OPEN_MPI, PMI))
    mpi = open_mpi or pmi
    if torch and not any(name in environment for name in NESTED):
        for other in (slurm, mpi):
            if other and not _same(torch, other):
                raise _contradiction(torch, other, "unset RANK and WORLD_SIZE where the job starts")
    # A launcher inside another one's processes: the inner one knows its ranks, the outer one how many there must be.
    if mpi and slurm and _same(mpi, slurm):
        mpi = None  # srun with a PMI plugin
    inner = torch or mpi or slurm
    if inner is None:
        return ALONE
    for outer in (slurm, mpi):
        one_host = inner.local_world_size is not None and inner.world_size == inner.local_world_size
        alone = inner.world_size == 1 or (one_host and inner.launcher == "torch")
        if outer and outer is not inner and outer.world_size > 1 and alone and not _same(inner, outer):
            raise _contradiction(inner, outer, "start one launcher per job, or tell the inner one all its nodes")
    return inner


def _same(one: Place, other: Place) -> bool:
    return (one.rank, one.world_size) == (other.rank, other.world_size)


def _contradiction(one: Place, other: Place, remedy: str) -> UserError:
    return UserError(
        f"{one.launcher} variables",
        f"rank {one.rank} of {one.world_size}",
        f"contradict {other.launcher}'s, rank {other.rank} of {other.world_size}",
        remedy,
    )


def _read(launcher: Launcher, environment: Mapping[str, str]) -> Place | None:
    """A launcher's variables as a place; None where they are not set."""
    size_name = next((name for name in launcher.world_size if name in environment), None)
    if launcher is TORCH and (launcher.rank in environment) != (size_name is not None):
        missing = launcher.world_size[0] if size_name is None else launcher.rank
        raise UserError(missing, None, "is not set, but its twin is", "set both, or start with a launcher")
    if launcher.mark not in environment or launcher.rank not in environment or size_name is None:
        return None
    rank, world_size = _number(launcher.rank, environment), _number(size_name, environment)
    if rank >= world_size:
        raise UserError(launcher.rank, rank, f"is no rank of {size_name} = {world_size}", "set ranks 0 to size - 1")
    local_rank = _number(launcher.local_rank, environment) if launcher.local_rank in environment else None
    local_size_name = next((name for name in launcher.local_world_size if name in environment), None)
    local_world_size = None
    # Slurm's tasks per node differ by node where they do not divide ("2,1"): then this node's count is not known here.
    if local_size_name and (found := re.fullmatch(r"(\d+)(\(x\d+\))?", environment[local_size_name])):
        local_world_size = int(found[1])
    if local_rank is not None and local_world_size is not None and local_rank >= local_world_size:
        raise UserError(
            launcher.local_rank,
            local_rank,
            f"is no rank of {local_size_name} = {local_world_size}",
            "set local ranks 0 to size - 1",
        )
    return Place(launcher.name, rank, world_size, local_rank, local_world_size)


def _number(name: str, environment: Mapping[str, str]) -> int:
    if not environment[name].strip().isdecimal():
        raise UserError(
            name, environment[name], "is no number", "set it to a rank or a count, or start with a launcher"
        )
    return int(environment[name])


# How the command lines of launchers read that leave their ranks running when they are killed.
DEEPSPEED = "deepspeed.launcher.launch"
LAUNCHERS = (DEEPSPEED, "torchrun", "torch.distributed", "mpirun", "mpiexec", "prte", "orted", "hydra")


def launcher(place: Place) -> tuple[tuple[int, int], ...]:
    """(process, its parent) from this process up to the command that the user gave; () without a launcher.

    A pair that does not hold any more says that a launcher is gone.
    """
    import psutil

    if place is ALONE:
        return ()
    parent = psutil.Process().parent()
    if parent is None or not any(name in " ".join(parent.cmdline()) for name in LAUNCHERS):
        return ()
    found = [(os.getpid(), parent.pid)]
    words = parent.cmdline()
    if any(DEEPSPEED in word for word in words):
        found.append((parent.pid, parent.ppid()))
        # Above it is the command itself, or, of several hosts, an ssh whose pdsh may run here.
        told = {word for word in words if word.startswith(("--world_info=", "--master_port="))}
        for process in psutil.process_iter(["pid", "ppid", "name", "cmdline"]):
            if told and process.info["name"].startswith("pdsh") and told <= set(process.info["cmdline"] or ()):
                found.append((process.info["pid"], process.info["ppid"]))
    return tuple(found)


def join() -> Place:
    """``find``, and torch's variables set for it: rank, sizes, local rank, the address and port where rank 0 listens.

    Under MPI one broadcast and one gather of mpi4py's; elsewhere no communication.
    """
    place = find()
    if place.launcher in (OPEN_MPI.name, PMI.name) and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        place, address, port = _ask_mpi(place)
    elif place.world_size == 1:  # of Slurm's too: two such runs in one step would get one port
        address, port = "127.0.0.1", free_port()
    elif place.launcher == SLURM.name:
        address, port = _slurm_address(), _slurm_port(place)
    else:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    name,
                    None,
                    f"is not set, but WORLD_SIZE = {place.world_size}",
                    "name the host of rank 0 and a free port",
                )
        address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", os.environ)
        if not 0 < port < 65536:  # with 0 every rank would wait at a port of its own
            raise UserError("MASTER_PORT", port, "is no port", "name a free port of rank 0's host, 1 to 65535")
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    local_rank = place.local_rank or 0
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(local_rank))
    _name_interface(os.environ["MASTER_ADDR"], place)
    return replace(place, local_rank=local_rank)


def free_port() -> int:
    """A port of this host nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _slurm_address() -> str:
    """The step's first host, which has rank 0 under Slurm's default distribution of tasks."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not any(mark in hosts for mark in "[,"):
        return hosts or "127.0.0.1"
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            "MASTER_ADDR",
            None,
            f"is not set, and scontrol cannot name the first of {hosts} ({error})",
            "set MASTER_ADDR",
        ) from error
    return shown.stdout.split()[0]


def _slurm_port(place: Place) -> int:
    """A port that every rank derives alike and no other step of a job that may share the host."""
    reserved = os.environ.get("SLURM_STEP_RESV_PORTS") or ""
    if found := re.match(r"\d+", reserved):
        return int(found[0])
    job, step = int(os.environ.get("SLURM_JOB_ID", "0")), int(os.environ["SLURM_STEP_ID"])
    return FIRST_PORT + (job * 7 + step) % NUM_PORTS


def _ask_mpi(place: Place) -> tuple[Place, str, int]:
    """Ranks as MPI has them; rank 0 picks a free port and tells it."""
    world = mpi_world(place)
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if local.Get_size() == world.Get_size() else hosts[0]
    port = world.bcast(free_port() if place.rank == 0 else None)
    told = replace(place, local_rank=local.Get_rank(), local_world_size=local.Get_size())
    MPI.Finalize()  # its work is done; mpirun calls a process that ends without it a failure
    return told, address, port


def mpi_world(place: Place):
    """mpi4py's communicator of all processes. Raises UserError where it has none, or not this place in it."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "mpi4py",
            None,
            f"is needed under {place.launcher} and cannot be loaded ({error})",
            "pip install 'esi_ds[mpi]'",
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (place.rank, place.world_size):
        told = Place("mpi4py", world.Get_rank(), world.Get_size(), None, None)
        raise _contradiction(told, place, "install the mpi4py that was built for this mpirun's MPI")
    return world


def _name_interface(address: str, place: Place) -> None:
    """gloo takes the interface of the host's own name, often the loopback: name the one towards rank 0.

    On rank 0's host that may be the loopback too (Debian's /etc/hosts gives the host's name 127.0.1.1), where no other
    host comes in: then the first other one that is up. Whoever names the loopback itself has one host, and gets it.
    """
    if place.world_size == 1 or place.world_size == place.local_world_size or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(address), 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return  # the connection itself will say what is wrong with the address
    is_cut_off = own.startswith("127.") and not (address.startswith("127.") or address == "localhost")
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, items in psutil.net_if_addrs().items():
        found = [item.address for item in items if item.family == socket.AF_INET]
        leads_out = name in up and any(not item.startswith("127.") for item in found)
        if leads_out if is_cut_off else own in found:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
