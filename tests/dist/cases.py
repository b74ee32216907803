"""What every worker that runs a list of cases does."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esi_ds.cli import leave
from esi_ds.zero import runtime


def tensor_bytes() -> int:
    """Bytes of all live tensors' storages in this process."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and not item.is_meta]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


@contextmanager
def frees_all() -> Iterator[None]:
    """What the block has loaded is freed at its end: as many bytes of tensors live as before it."""
    before = tensor_bytes()
    yield
    grown = tensor_bytes() - before
    assert grown <= 0, f"{grown} bytes of tensors stay"


def run_cases(run_case: Callable[[dict[str, Any]], None], freeze: bool = True) -> None:
    """Run each case of the JSON file named last on the command line, on all ranks; then end the process.

    freeze: collections leave alone what earlier cases have left, which ``tensor_bytes`` does not count then.
    """
    runtime.start()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # see runtime: NaN where a row is masked whole
    for case in json.loads(Path(sys.argv[-1]).read_text()):
        if freeze:
            gc.collect()
            gc.freeze()  # DeepSpeed keeps every engine's modules, without tensors: collections would go through all
        run_case(case)
    runtime.stop()
    leave(0)
