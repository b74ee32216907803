"""``docs/configuration.md``, made of the config's types and sentences: ``python -m esi_ds.config.describe FILE``."""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from esi_ds.config.loading import Config
from esi_ds.config.section import sections_of

HEAD = """# Configuration

Every key of an experiment's YAML, with its type, default and meaning. A key may also be given on the command line, as
`section.key=value`. An unknown key, a wrong type or a value out of range ends the run at once, with one line that names
the key. This page is written by `python -m esi_ds.config.describe docs/configuration.md`, and a test compares the two.
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", Any: "anything"}
BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def type_text(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type in words, with its bounds; empty for sections, which have tables of their own."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], [*_flat(arguments[1:]), *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        words = [type_text(argument, metadata) for argument in arguments if argument is not type(None)]
        nullable = ["null"] if type(None) in arguments else []
        return " or ".join([word for word in words if word] + nullable)
    if origin is list:
        inner = type_text(arguments[0])
        return f"list of {inner}" if inner else "list"
    if origin is dict:
        return "mapping"
    if sections_of(annotation):
        return ""
    bounds = [
        f"{sign} {_number(getattr(bound, name))}"
        for bound in metadata
        for kind, name, sign in BOUNDS
        if isinstance(bound, kind)
    ]
    if any(isinstance(bound, MinLen) for bound in metadata) and annotation is str:
        bounds.append("not empty")
    return " ".join([NAMES.get(annotation, str(annotation)), ", ".join(bounds)]).strip()


def _flat(metadata: typing.Sequence[Any]) -> Iterator[Any]:
    """Bounds given as pydantic's ``Field(...)`` within an annotation, and plain ones."""
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def default_text(field: FieldInfo) -> str:
    """The default as YAML writes it; a key without one is required."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    if isinstance(field.default, str):
        return f"`{field.default}`" if field.default else '`""`'
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"  # JSON is YAML; words keep their capitals


def tables(section: type[BaseModel], path: str, about: str) -> Iterator[str]:
    """Markdown of one section and of those within it."""
    rows, inner = [], []
    for name, field in section.model_fields.items():
        sections = sections_of(field.annotation)
        key = f"{path}.{name}" if path else name
        is_list = typing.get_origin(field.annotation) is list or "list[" in str(field.annotation)
        for below in sections:
            kind = below.model_fields.get("kind")
            label = f" with `kind: {typing.get_args(kind.annotation)[0]}`" if kind and len(sections) > 1 else ""
            inner.append((below, f"{key}[]" if is_list else key, label, field.description or ""))
        kinds = type_text(field.annotation, field.metadata)
        if sections:
            words = kinds.split(" or ")
            kept = [word for word in words if word not in ("", "list", "null")]
            null = ["null"] if "null" in words else []
            kinds = " or ".join([*kept, "list of sections" if is_list else "section", *null])
        rows.append(f"| `{name}` | {kinds} | {default_text(field)} | {field.description} |")
    if path:
        yield f"\n{'#' * min(2 + path.count('.'), 4)} {about}\n"
    else:
        yield "\n## Sections\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
    for below, key, label, description in inner:
        first = description.partition(". ")[0].rstrip(".")
        yield from tables(below, key, f"`{key}`{label}: {first[0].lower()}{first[1:]}")


def markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD.rstrip("\n"), *tables(Config, "", "")]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown())
