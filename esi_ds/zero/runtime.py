"""The process group: start, ranks, and the few collectives the rest of the package uses.

Every helper returns its input unchanged where there is one process, so callers never branch on the world size.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from esi_ds import cores, launch_environment
from esi_ds.errors import UserError
from esi_ds.launch_environment import LaunchEnvironment
from esi_ds.ranks import Item, Ranks
from esi_ds.reading import first_line

Key = TypeVar("Key")
VISIBILITY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # of GPUs


def start(timeout_s: int = 1800, start_timeout_s: int = 600) -> None:
    """Join the job's process group (gloo on CPU, NCCL on GPUs). A plain ``python`` process is a group of one.

    timeout_s: how long a collective waits for a missing rank before it fails. start_timeout_s: how long to wait for all
    ranks now; a rank on another host has no other way to learn that rank 0 died before it listened. Raises UserError
    where no group forms, and where two ranks would share a GPU.
    """
    _avoid_unsafe_attention()
    _avoid_written_attention()
    if torch.distributed.is_initialized():
        return
    launch = launch_environment.join()
    _quieten()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device().type != "cpu":
        # Before the first collective: NCCL works on the current device, which would be the first GPU on every rank.
        # DeepSpeed reads LOCAL_RANK too.
        variables = {*VISIBILITY, *get_accelerator().visible_devices_envs()}
        os.environ["LOCAL_RANK"] = str(_device_index(launch, get_accelerator().device_count(), variables))
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    _set_timeouts(timeout_s)
    # DeepSpeed's shared-memory all-reduce for CPUs is not used here. It would compile at the first start (and a killed
    # compilation leaves a lock on which every later start waits) and keep 66 MiB in /dev/shm per rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        # A rendezvous with a timeout of its own; the group's then finds rank 0's server running.
        meeting = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=start_timeout_s)))
        if device().type == "cuda":
            _claim_gpu(meeting[0], launch.rank, str(torch.cuda.get_device_properties(device()).uuid))
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))
        del meeting
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        problem = f"no process group forms there ({first_line(error)})"
        remedy = (
            "set MASTER_ADDR to a host that all ranks reach and MASTER_PORT to a free port of it; if both are "
            "right, rank 0 has ended: its own message says why"
        )
        raise UserError("MASTER_ADDR and MASTER_PORT", where, problem, remedy) from error
    _share_cores()


def _set_timeouts(timeout_s: int) -> None:
    """Have every collective wait for ``timeout_s``, and NCCL end a rank whose collective failed or waited longer.

    DeepSpeed makes groups of its own, the one of all ZeRO-3 collectives among them, without naming a timeout: they get
    torch's default, which is 10 minutes under NCCL. Variables that the user has set stay.
    """
    timeout = timedelta(seconds=timeout_s)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    for name, value in {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # the watchdog aborts the process; without it the others wait forever
        "TORCH_NCCL_ENABLE_MONITORING": "1",  # and a second thread does if the watchdog itself hangs,
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(max(480, timeout_s)),  # not sooner than a collective may take
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # the last collectives of each rank, to /tmp/nccl_trace_rank_<rank>
    }.items():
        os.environ.setdefault(name, value)


def _avoid_unsafe_attention() -> None:
    """Switch cuDNN's attention off, for every model of this process: the judges and lm-eval's, too.

    With a mask, its backward pass on Hopper gives NaN at lengths of 64 modulo 128 where all logits of a row are far
    below 0 (pytorch#196678: a known head of Qwen2.5 does it), and from torch 2.11 it is the first choice there. Flash
    and memory-efficient attention remain.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _avoid_written_attention() -> None:
    """Have transformers repeat grouped keys and values where a GPU has no flash attention: in fp32, and before Ampere.

    Only the memory-efficient kernel remains there, which takes no groups. Without padding transformers would ask for
    them, and torch would write out [length, length] for each head, which autograd keeps. Again: no effect.
    """
    from transformers.integrations import sdpa_attention

    uses_groups = getattr(sdpa_attention, "use_gqa_in_sdpa", None)
    if uses_groups is None or hasattr(uses_groups, "__wrapped__"):
        return

    @wraps(uses_groups)
    def mended(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
        if key.is_cuda and (key.dtype == torch.float32 or torch.cuda.get_device_capability(key.device) < (8, 0)):
            return False
        return bool(uses_groups(attention_mask, key, value))

    sdpa_attention.use_gqa_in_sdpa = mended


def _quieten() -> None:
    """Limit libraries to errors, and disable their progress bars."""
    import transformers

    os.environ.setdefault("DS_LOG_LEVEL", "error")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)


def _device_index(launch: LaunchEnvironment, num_devices: int, visibility: Iterable[str]) -> int:
    """Index of this rank's device among the visible ones.

    visibility: variables by which a launcher may show each rank only one. Raises UserError where this host shows fewer
    devices than it has ranks; if each rank is shown one, ``_claim_gpu`` finds those that are shown the same.
    """
    if launch.local_rank is None:
        return 0
    if num_devices == 1 and any(re.fullmatch(r"[^\s,]+", os.environ.get(name, "")) for name in visibility):
        return 0
    last = max(launch.local_rank, (launch.local_world_size or 1) - 1)
    if last >= num_devices:
        raise UserError(
            "local rank", last, f"has no device: this host shows {num_devices}", "start one rank per device"
        )
    return launch.local_rank


def _claim_gpu(store: torch.distributed.Store, rank: int, uuid: str) -> None:
    """Raise UserError where another rank has the GPU already, which NCCL refuses with a traceback on every rank.

    store: of the job. uuid: of this rank's GPU. The rank that comes second raises; the launcher ends the others.
    """
    owner = store.compare_set(f"esi_ds/gpu/{uuid}", "", str(rank)).decode()
    if owner != str(rank):
        problem = f"has the same GPU as rank {owner} ({uuid})"
        remedy = (
            "start one rank per GPU: the launcher, or CUDA_VISIBLE_DEVICES, must show each rank of a host a GPU of "
            "its own, or all of them"
        )
        raise UserError("rank", rank, problem, remedy)


def _share_cores() -> None:
    """Bind this rank to its share of the host's cores, and compute with one thread on each (``cores.share``).

    A number of threads that the user has set stays. Threads that run already keep their cores; those that compute are
    started later. One gather.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    address = _gpu_address()
    near = cores.near_gpu(address) if address is not None else ()
    affinity = cores.Affinity(socket.gethostname(), tuple(sorted(os.sched_getaffinity(0))), near)
    share = cores.share(gather_objects(affinity), rank())
    if share.cores != affinity.cores:
        os.sched_setaffinity(0, share.cores)
    if launch_environment.threads_set_by_user():
        return
    torch.set_num_threads(share.num_threads)  # OpenMP's in this process: DeepSpeed's Adam on the CPU, too
    os.environ["OMP_NUM_THREADS"] = str(share.num_threads)  # for another OpenMP that an extension may bring along
    with suppress(RuntimeError):  # once such work has begun the number is fixed
        torch.set_num_interop_threads(share.num_threads)


def _gpu_address() -> str | None:
    """This rank's GPU on the PCI bus; None on CPUs, and where torch does not tell."""
    if device().type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device())
    try:
        domain, bus, number = attrgetter("pci_domain_id", "pci_bus_id", "pci_device_id")(properties)
    except AttributeError:
        return None
    return f"{domain:04x}:{bus:02x}:{number:02x}.0"


def compute_resources() -> dict[str, int | str]:
    """What this rank computes with, for the manifest: ``threads``, ``cores`` as the kernel lists them, and the GPU's
    ``gpu_address`` if there is one."""
    resources: dict[str, int | str] = {"threads": torch.get_num_threads()}
    if hasattr(os, "sched_getaffinity"):
        resources["cores"] = cores.describe(os.sched_getaffinity(0))
    address = _gpu_address()
    return resources if address is None else {**resources, "gpu_address": address}


def stop() -> None:
    """Leave the process group, without which gloo and NCCL complain at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def process_group(timeout_s: int = 1800, start_timeout_s: int = 600) -> Iterator[None]:
    """Join the job's process group inside the block. A group that existed before is used, and stays.

    (A study runs many stages in one process, and DeepSpeed keeps handles of the first group.)
    """
    existed = torch.distributed.is_initialized()
    start(timeout_s, start_timeout_s)
    try:
        yield
    except BaseException:
        # Closing the connections would make the other ranks fail, and report that, before this rank has reported its
        # error. The process is about to end anyway.
        if not existed and world_size() == 1:
            stop()
        raise
    if not existed:
        stop()


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and talks to the user."""
    return rank() == 0


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return torch.device("cpu" if accelerator.device_name() == "cpu" else accelerator.current_device_name())


def synchronize() -> None:
    """Wait until this rank's GPU has done all that was asked of it; on CPUs nothing is ever pending."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def seed_everything(seed: int) -> None:
    """Seed python and torch alike on every rank; what must differ between ranks or prompts is keyed, not drawn."""
    random.seed(seed)
    torch.manual_seed(seed)


def collective_timeout_s() -> float:
    """How long a collective waits for a missing rank before it fails."""
    return distributed_c10d.default_pg_timeout.total_seconds()


def barrier() -> None:
    """Wait for all ranks. One barrier."""
    if world_size() > 1:
        torch.distributed.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place and returned, for a tensor on any device. One all-reduce."""
    return _all_reduce(tensor, torch.distributed.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place and returned, for a tensor on any device. One all-reduce."""
    return _all_reduce(tensor, torch.distributed.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return tensor
    moved = tensor.to(device())
    torch.distributed.all_reduce(moved, op=operation)
    return tensor.copy_(moved)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on some rank. One all-reduce."""
    return all_reduce_max(torch.tensor([float(flag)])).item() > 0


def gather_objects(item: Any) -> list[Any]:
    """Every rank's small picklable object, in rank order, on every rank; never objects read from a file. One gather."""
    if world_size() == 1:
        return [item]
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, item)
    return gathered


def gather_dict(entries: Mapping[Key, Item]) -> dict[Key, Item]:
    """The entries of every rank, in rank order, on every rank. One gather."""
    return {key: item for part in gather_objects(entries) for key, item in part.items()}


def raise_first(error: UserError | None) -> None:
    """Raise the error of the first rank that has one, on every rank. One gather."""
    for error_of_a_rank in gather_objects(error):
        if error_of_a_rank is not None:
            raise error_of_a_rank


class JobRanks(Ranks):
    """The ranks of the job's process group; ``add`` is one all-reduce, ``gather`` one gather."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), world_size()

    def add(self, counts: Tensor) -> Tensor:
        return all_reduce_sum(counts)

    def gather(self, item: Item) -> list[Item]:
        return gather_objects(item)


def broadcast_object(item: Any) -> Any:
    """Rank 0's small picklable object, on every rank. One broadcast."""
    if world_size() == 1:
        return item
    holder = [item]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def from_main(read: Callable[[], Item]) -> Item:
    """What ``read`` returns on rank 0, on every rank; a UserError of rank 0 is raised on every rank. One broadcast.

    For what lies on disk: on a shared file system another rank may see an older state.
    """
    result: Any = None
    if is_main():
        try:
            result = read()
        except UserError as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result


def memory_bytes() -> int:
    """Bytes that this process holds: allocated on the GPU, or the resident set on the CPU."""
    if device().type == "cuda":
        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
