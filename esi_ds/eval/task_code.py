"""What a task's definition may run: nothing, unless the config trusts it.

A YAML of lm-eval is a program: ``!function`` imports a module beside it, ``class`` names a task written in Python,
metrics that lm-eval does not know are programs fetched by ``evaluate``, and its Jinja templates, unless they are
sandboxed, reach Python's modules. Definitions that come with lm-eval are installed code like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401  fills the registry
import lm_eval.tasks
import lm_eval.utils
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.registry import metric_registry

from esi_ds.errors import UserError
from esi_ds.reading import check_type, read_text, reading

INSTALLED = Path(lm_eval.tasks.__file__).parent.resolve()
MAX_BYTES = 1 << 24
MAX_FILES = 1000
# Keys that name a program, or a file of prompts that lm-eval reads with a loader that builds Python objects.
PROGRAMS = ("class", "use_prompt", "unsafe_code")
REMEDY = "read it, and set {field}.trust_remote_code: true if you trust it"


class _Tagged(yaml.SafeLoader):
    """Reads any tag's content as None, and remembers the first tag in ``tag``."""

    tag: str | None = None

    def note(self, suffix: str, node: yaml.Node) -> None:
        self.tag = self.tag or f"!{suffix}"


_Tagged.add_multi_constructor("!", _Tagged.note)


def check_definition(name: str, field: str) -> None:
    """Raise UserError if the YAML, or one that it includes, names code.

    name: path of the YAML. field: the task's key in the config. Nothing is imported.
    """
    for path, definition, tag in _definitions(name, field):
        code = f"the tag {tag}" if tag else _code(definition)
        if code:
            problem = f"runs code: {path.name} has {code}"
            raise UserError(f"{field}.name", name, problem, REMEDY.format(field=field))


def further_files(name: str, field: str) -> list[Path]:
    """What a YAML's task depends on besides it: the YAMLs that it includes, and where one names code the Python files
    beside it. Raises UserError."""
    definitions = list(_definitions(name, field))
    included = [path for path, *_ in definitions[1:]]
    beside = {file for path, _, tag in definitions if tag for file in path.parent.glob("*.py")}
    return sorted({*included, *beside})


def _definitions(name: str, field: str) -> Iterator[tuple[Path, dict[str, Any], str | None]]:
    """The YAML and those that it includes, but for lm-eval's own: path, keys, and the first tag that is not YAML's.

    Raises UserError.
    """
    waiting, seen = [Path(name)], set[Path]()
    while waiting:
        with reading(f"{field}.name", name, "check the YAML and what it includes"):
            path = waiting.pop().expanduser().resolve()
            if path in seen or path.is_relative_to(INSTALLED):
                continue
            seen.add(path)
            if len(seen) > MAX_FILES:
                raise ValueError(f"it includes more than {MAX_FILES} files")
            definition, tag = _read(path)
            included = definition.get("include", [])
            included = included if isinstance(included, list) else [included]
            waiting += [path.parent / check_type(entry, str) for entry in included]
        yield path, definition, tag


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The keys of a definition, and the first tag that is not YAML's own."""
    loader = _Tagged(read_text(path, MAX_BYTES))
    try:
        return check_type(loader.get_single_data(), dict[str, Any]), loader.tag
    finally:
        loader.dispose()


def _code(definition: dict[str, Any]) -> str | None:
    """What in a definition names a program, members of a group included; None if nothing does."""
    for section in _sections(definition):
        for key in PROGRAMS:
            if section.get(key):
                return f"the key {key}"
        metric = section.get("metric")
        if isinstance(metric, str) and (section.get("hf_evaluate") or metric not in metric_registry):
            return f"the metric {metric}, which is not lm-eval's"
    return None


def _sections(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every mapping in the definition, once: YAML's aliases can make more paths to them than anyone can walk."""
    waiting: list[Any] = [definition]
    seen: set[int] = set()
    while waiting:
        content = waiting.pop()
        if id(content) in seen or not isinstance(content, (dict, list)):
            continue
        seen.add(id(content))
        if isinstance(content, dict):
            yield content
        waiting += content.values() if isinstance(content, dict) else content


@contextlib.contextmanager
def sandboxed() -> Iterator[None]:
    """Inside the block, lm-eval's templates are rendered in Jinja's sandbox; what they may say gives the same text."""
    usual = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(
        loader=usual.loader, undefined=usual.undefined, keep_trailing_newline=usual.keep_trailing_newline
    )
    sandbox.filters.update(usual.filters)
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = usual
