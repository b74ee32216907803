"""What every rank sets before it loads a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esi_ds.zero import runtime


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
