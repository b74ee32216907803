"""The structure of the package: who imports whom."""

from __future__ import annotations

from pathlib import Path

import import_boundaries
import pytest
from import_boundaries import circles, import_graph, violations


def test_import_boundaries() -> None:
    assert violations() == []
    assert circles(import_graph()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["import circle: b → c → b", "import circle: c → b → c"]


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("core/loss.py", "import esi_ds.doctor", "core imports esi_ds.doctor, which lies above it"),
        ("core/loss.py", "from esi_ds import doctor", "core imports esi_ds.doctor, which lies above it"),
        ("core/loss.py", "class A:\n    import esi_ds.doctor", "core imports esi_ds.doctor, which lies above it"),
        ("core/loss.py", "from ..zero import engine", "..zero.engine is relative: give the module's full name"),
        ("core/loss.py", "import torch.distributed as dist", "only ['zero'] may import torch.distributed"),
        ("core/loss.py", "from torch import distributed as dist", "only ['zero'] may import torch.distributed"),
        ("core/loss.py", "def f():\n    from deepspeed import comm", "only ['zero'] may import deepspeed"),
        ("core/loss.py", "torch.distributed.barrier()", "only zero may use torch.distributed"),
        ("stages/esi/work.py", "import esi_ds.stages.tune", "esi imports esi_ds.stages.tune, another stage's"),
        ("stages/esi/work.py", "from esi_ds.stages import tune", "esi imports esi_ds.stages.tune, another stage's"),
        ("words.py", "import torch", "words imports torch"),
        ("words.py", "try:\n    from torch import nn\nexcept ImportError:\n    pass", "words imports torch"),
        ("core/loss.py", "from esi_ds import Mask", None),
        ("core/loss.py", "def f():\n    from esi_ds import doctor", None),
        ("words.py", "if TYPE_CHECKING:\n    import torch", None),
        ("stages/perturb/work.py", "from esi_ds.stages import evaluate", None),
        ("zero/engine.py", "from torch import distributed", None),
    ],
)
def test_an_import_that_breaks_a_rule_is_noticed(
    file: str, line: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_boundaries, "ROOT", tmp_path)
    path = tmp_path / "esi_ds" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
    assert [violation.partition(": ")[2] for violation in violations()] == ([problem] if problem else [])
