"""What every rank sets before it loads a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d
from transformers.integrations import sdpa_attention

from esi_ds.errors import UserError
from esi_ds.launch_environment import LaunchEnvironment
from esi_ds.zero import runtime


def test_ranks_that_are_shown_the_same_gpu_are_refused() -> None:
    """Each is shown one device, so that none sees that it is shared."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank, uuid in enumerate(("a", "b")):
        runtime._claim_gpu(store, rank, uuid)
    runtime._claim_gpu(store, 1, "b")
    with pytest.raises(UserError, match=r"rank = 2: has the same GPU as rank 1 \(b\); start one rank per GPU"):
        runtime._claim_gpu(store, 2, "b")


@pytest.fixture
def attention() -> Iterator[None]:
    """torch's own choice, and that of this process again afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_attention_of_cudnn_is_off_and_the_others_are_on(attention: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a group that existed before, as in a study, where many stages run in one process."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with runtime.process_group():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "uses_groups"),
    [
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float32, (9, 0), False),
        ("cuda", torch.float16, (7, 0), False),
        ("cpu", torch.float32, None, True),
    ],
)
def test_attention_repeats_keys_where_no_kernel_takes_groups(
    device: str, dtype: torch.dtype, capability: Any, uses_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sdpa_attention.use_gqa_in_sdpa
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", getattr(original, "__wrapped__", original))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for _ in range(2):
        with runtime.process_group():
            key = SimpleNamespace(is_cuda=device == "cuda", device=device, dtype=dtype, shape=(1, 2, 5, 64))
            assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is uses_groups
    assert not hasattr(sdpa_attention.use_gqa_in_sdpa.__wrapped__, "__wrapped__")
    monkeypatch.delattr(sdpa_attention, "use_gqa_in_sdpa")  # as a later version of transformers may
    with runtime.process_group():
        pass


NAMES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("local_rank", "on_host", "devices", "visible", "index"),
    [(0, 1, 1, None, 0), (1, 2, 2, None, 1), (1, 2, 4, "0,1,2,3", 1), (1, 2, 1, "3", 0), (None, None, 8, None, 0)],
)
def test_a_ranks_device(
    local_rank: int | None,
    on_host: int | None,
    devices: int,
    visible: str | None,
    index: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv(NAMES[1], visible)
    launch = LaunchEnvironment("torch", local_rank or 0, 8, local_rank, on_host)
    assert runtime._device_index(launch, devices, NAMES) == index


@pytest.mark.parametrize(
    ("local_rank", "on_host", "devices", "visible"),
    [(0, 2, 1, None), (1, 2, 1, None), (1, None, 1, None), (0, 2, 1, ""), (0, 4, 2, "0,1"), (0, 2, 1, "3,4")],
)
def test_ranks_do_not_share_a_device(
    local_rank: int, on_host: int | None, devices: int, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv(NAMES[0], visible)
    with pytest.raises(UserError, match=r"has no device: this host shows \d; start one rank per device"):
        runtime._device_index(LaunchEnvironment("torch", local_rank, 4, local_rank, on_host), devices, NAMES)


@pytest.mark.parametrize(("timeout_s", "heartbeat_s"), [(77, "480"), (1800, "1800")])
def test_every_group_and_nccl_wait_as_long_as_the_config_says(
    timeout_s: int, heartbeat_s: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that name no timeout get torch's defaults: DeepSpeed's. Variables that the user has set stay."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, timedelta(seconds=1))
    variables = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": heartbeat_s,
    }
    for name in variables:
        monkeypatch.setenv(name, "")  # what stood there before comes back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    runtime._set_timeouts(timeout_s)
    assert distributed_c10d.default_pg_timeout == timedelta(seconds=timeout_s)
    assert distributed_c10d.default_pg_nccl_timeout == timedelta(seconds=timeout_s)
    assert {name: os.environ[name] for name in variables} == variables
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
