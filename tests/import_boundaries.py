"""Imports point down: launch → stages → (judge, models, data, eval, zero, report) → core → errors (docs/design.md §2).
A stage's room imports what stages share, and another room only where ``ROOMS`` says so.

No module imports itself by way of others, late and typing-only imports included. Run as a script it prints every import
that breaks a rule and exits 1; a test calls ``violations``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Layer of each part of the package; a part imports its own layer's siblings or lower layers only.
LAYERS = {
    "errors": 0,
    "terminal": 0,
    "words": 0,
    "reading": 0,
    "tensor_files": 0,
    "failures": 0,
    "config": 1,
    "host_memory": 1,
    "deepspeed_config": 1,
    "artifacts": 1,
    "versions": 1,
    "core": 1,
    "models": 2,
    "data": 2,
    "judge": 2,
    "eval": 2,
    "report": 2,
    "tracking": 2,
    "event_files": 1,
    "zero": 3,
    "stages": 4,
    "mask": 4,
    "reselect": 3,
    "ranks": 2,
    "patch": 4,
    "ask": 4,
    "shipped": 1,
    "recipes": 4,
    "slurm": 4,
    "doctor": 4,
    "launch": 6,
    "command": 7,
    "__main__": 8,
    "options": 1,
    "cli": 5,
    "launch_environment": 1,
    "cores": 1,
    "peers": 2,
    "journal": 1,
    "lock": 1,
    "status": 1,
}
# What may import the heavy or distributed libraries: name → parts that may.
RESERVED = {"deepspeed": {"zero"}, "torch.distributed": {"zero"}}
# Rooms of stages that others import: a perturbation evaluates, and a dry run prepares every stage.
STAGES = {"esi", "tune", "evaluate", "perturb"}
ROOMS = {"perturb": {"evaluate"}, "plan": STAGES}
WITHOUT_TORCH = {
    "command",
    "launch",
    "recipes",
    "shipped",
    "slurm",
    "__main__",
    "cores",
    "peers",
    "config",
    "host_memory",
    "deepspeed_config",
    "errors",
    "reading",
    "tensor_files",
    "failures",
    "artifacts",
    "versions",
    "options",
    "cli",
    "launch_environment",
    "journal",
    "lock",
    "status",
    "terminal",
    "words",
}


def loaded_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one that run where its module is imported: functions wait, and type checkers are alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (below for other in child.orelse for below in (other, *loaded_at_once(other)))
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from loaded_at_once(child)


def imports(file: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, module or module.name, whether the module's own import runs it) of everything that a file imports."""
    tree = ast.parse(file.read_text(), str(file))
    top = set(map(id, loaded_at_once(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}", id(node) in top) for alias in node.names)


def attribute_uses(file: Path) -> Iterator[tuple[int, str]]:
    """(line, "torch.distributed") wherever it is reached as an attribute of torch."""
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ):
            yield node.lineno, "torch.distributed"


def violations() -> list[str]:
    problems = []
    for file in sorted((ROOT / "esi_ds").rglob("*.py")):
        part = file.relative_to(ROOT / "esi_ds").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        where = file.relative_to(ROOT)
        for line, module, is_top in imports(file):
            name = module.split(".")
            if not name[0]:
                problems.append(f"{where}:{line}: {module} is relative: give the module's full name")
            if name[0] == "esi_ds" and len(name) > 1 and is_top and LAYERS.get(name[1], 0) > LAYERS[part]:
                problems.append(f"{where}:{line}: {part} imports {module}, which lies above it")
            room, other = file.parent.name, name[2] if len(name) > 2 and name[1] == "stages" else ""
            if part == "stages" and other in STAGES and other not in {room, *ROOMS.get(room, ())}:
                problems.append(f"{where}:{line}: {room} imports {module}, another stage's")
            if name[0] == "torch" and part in WITHOUT_TORCH and is_top:
                problems.append(f"{where}:{line}: {part} imports torch")
            for reserved, parts in RESERVED.items():
                if (module == reserved or module.startswith(f"{reserved}.")) and part not in parts:
                    problems.append(f"{where}:{line}: only {sorted(parts)} may import {reserved}")
        if part not in RESERVED["torch.distributed"]:
            problems += [f"{where}:{line}: only zero may use {name}" for line, name in attribute_uses(file)]
    return problems


def import_graph() -> dict[str, set[str]]:
    """Module of the package → modules of the package that it imports anywhere, at the top or later."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted((ROOT / "esi_ds").rglob("*.py"))
    }
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                submodules = names & files.keys()
                targets |= submodules
                if len(submodules) < len(names):  # something that the package or module itself defines
                    targets.add(node.module)
        graph[module] = targets & files.keys()
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One line per module that reaches itself: the shortest way round."""
    lines = []
    for start in graph:
        paths, seen = [[start]], {start}
        for path in paths:
            if start in graph[path[-1]]:
                lines.append(f"import circle: {' → '.join([*path, start])}")
                break
            for module in sorted(graph[path[-1]] - seen):
                seen.add(module)
                paths.append([*path, module])
    return lines


if __name__ == "__main__":
    problems = violations() + circles(import_graph())
    print("\n".join(problems) or "import boundaries: sound")
    sys.exit(1 if problems else 0)
