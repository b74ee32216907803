"""The structure of the package: who imports whom, how long functions and files are, and what classes are called."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import import_boundaries
import pytest
from conftest import ROOT
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
        ("words.py", "if not TYPE_CHECKING:\n    import torch", "words imports torch"),
        ("words.py", "if TYPE_CHECKING:\n    import re\nelse:\n    import torch", "words imports torch"),
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


def too_long(file: Path, most_lines: int = 60) -> Iterator[str]:
    """Functions of a file that have more lines."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            if num_lines > most_lines:
                yield f"{file}:{node.lineno}: {node.name} has {num_lines} lines"


def test_functions_and_files_are_short() -> None:
    folders = ("esi_ds", "tests", "examples", "tiny_models", "real_models", "study", "benchmarks", "launch")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 500
    assert [line for file in files for line in too_long(file)] == []
    package = [file for file in files if file.is_relative_to(ROOT / "esi_ds")]
    assert [str(file) for file in package if len(file.read_text().splitlines()) > 600] == []


def test_a_function_that_is_too_long_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("class A:\n    def f():\n        a\n        b\n\n    def g():\n        a\n")
    assert list(too_long(file, 2)) == [f"{file}:2: f has 3 lines"]


def repeated_names(package: Path) -> list[str]:
    """Names that several classes of a package have."""
    names = Counter(
        node.name
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    return sorted(name for name, count in names.items() if count > 1)


def test_a_class_name_means_one_class(tmp_path: Path) -> None:
    assert repeated_names(ROOT / "esi_ds") == []
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("class Rows: ...\n")
    assert repeated_names(tmp_path) == ["Rows"]
