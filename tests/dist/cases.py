"""What every worker that runs a list of cases does."""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from esi_ds.cli import leave
from esi_ds.zero import runtime
from esi_ds.zero.batching import batch_size_for, check_causal, check_gradient
from esi_ds.zero.engine import ShardedModel

PATIENCE_S = 10.0


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute that ``owner`` has: where it has none of the name, the original would stay in use unnoticed."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, value)


def take_a_second(module: ModuleType) -> None:
    """What ``module`` times takes a second each time, so that a rate is the number of what was done."""
    replace(module, "time", SimpleNamespace(monotonic=itertools.count().__next__))


def tensor_bytes() -> int:
    """Bytes of all live tensors' storages in this process."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and not item.is_meta]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


@contextmanager
def frees_all() -> Iterator[None]:
    """What the block has loaded is freed at its end: as many bytes of tensors live as before it.

    gloo's threads let go of the tensors of the last collective a moment after it.
    """
    before = tensor_bytes()
    yield
    end = time.monotonic() + PATIENCE_S
    while (grown := tensor_bytes() - before) > 0 and time.monotonic() < end:
        time.sleep(0.05)
    assert grown <= 0, f"{grown} bytes of tensors stay"


def ask_each_model_once(*stages: ModuleType) -> None:
    """What ``stages`` ask a model before they use it, up to seven passes, is asked once of each in this process: the
    cases that follow would hear the same."""
    answers: dict[tuple[Any, ...], Any] = {}

    def once(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(model: ShardedModel, ids: list[int], *rest: int) -> Any:
            module = model.module
            code = tuple(type(part).forward for part in module.modules())
            key = (ask, module.name_or_path, module.dtype, module.is_gradient_checkpointing, str(module), code, *rest)
            if key not in answers:
                answers[key] = ask(model, ids, *rest)
            return answers[key]

        return asked

    for stage in stages:
        for ask in (check_causal, check_gradient, batch_size_for):
            if hasattr(stage, ask.__name__):
                setattr(stage, ask.__name__, once(ask))


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
