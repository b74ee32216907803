"""pydantic's complaints about a config as one message that names the key in full."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from esi_ds.config.section import sections_of
from esi_ds.errors import UserError

ONE_LETTER = 0.8  # as ``difflib`` measures it: names of five letters or more that differ by one


def explain(error: ValidationError, root: type[BaseModel]) -> UserError:
    """The first problem; unknown keys come first, because a misspelt key is often why another one is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    path, section, field = _follow(problem["loc"], root)
    if isinstance(problem["input"], list):  # a value or a list of such values: what is wrong lies within the list
        for other in problems:
            inner, _, inner_field = _follow(other["loc"], root)
            if len(inner) > len(path) and inner[: len(path)] == path:
                problem, path, field = other, inner, inner_field
                break
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        # A letter of another alphabet may look like the right one.
        spelling = "" if path[-1].isascii() else f", spelt {ascii(path[-1])[1:-1]}"
        return UserError(key, None, f"is an unknown key{spelling}", _known(path, section, root))
    if problem["type"] == "missing":
        return UserError(key, None, "is missing", "set it in the config or as key.path=value")
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = problem.get("ctx", {}).get("expected_tags", "guard, classifier, yes_no, rubric, words")
        return UserError(f"{key}.kind", None, "is missing or unknown", f"name one of {kinds}")
    value = problem["input"]
    if problem["type"] in ("model_type", "model_attributes_type"):
        return UserError(key, _shown(value), "must be a section of keys", "write its keys, or leave it out")
    empty = "has no value: " if value is None else ""
    # A union complains once for each of its members.
    same_key = [other for other in problems if other["loc"][: len(path)] == problem["loc"][: len(path)]]
    message = " or ".join(dict.fromkeys(other["msg"][0].lower() + other["msg"][1:] for other in same_key))
    meaning = (field.description or "").rstrip(".") if field else ""
    remedy = f"meaning: {meaning[0].lower()}{meaning[1:]}" if meaning else "see docs/configuration.md"
    return UserError(key, None if value is None else _shown(value), empty + message, remedy)


def _shown(value: Any) -> Any:
    """A value as YAML would have it, texts in quotation marks; numbers and booleans as they are."""
    return value if isinstance(value, int | float) else repr(value)


def _known(path: Sequence[str], section: type[BaseModel], root: type[BaseModel]) -> str:
    """What an unknown key may stand for: a key of the section for another ``kind``, one of its own keys that is spelt
    almost so, the key of that name in other sections, or one that is spelt alike."""
    *parents, name = path
    if kinds := _kinds_with(name, _sections_at(parents, root)):
        return f"it belongs to kind: {' or '.join(kinds)}"
    here = ".".join(part for part in path if not part.isdecimal())
    elsewhere = [key for key in dict.fromkeys(_keys(root)) if key.rpartition(".")[2] == name and key != here]
    also = f"a key of other sections: {', '.join(elsewhere[:4])}"
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    nearest = f"the nearest known one is {'.'.join([*parents, *near])}"
    if near and difflib.get_close_matches(name, near, cutoff=ONE_LETTER):
        return f"{nearest}; {name} is also {also}" if elsewhere else nearest
    if elsewhere:
        return f"{name} is {also}"
    if near:
        return nearest
    return f"the known ones are {', '.join('.'.join([*parents, field]) for field in section.model_fields)}"


def _kinds_with(name: str, sections: Sequence[type[BaseModel]]) -> list[str]:
    """The kinds of the sections of a union that have the key."""
    kinds = [section.model_fields["kind"] for section in sections if {name, "kind"} <= section.model_fields.keys()]
    return [kind for field in kinds for kind in typing.get_args(field.annotation)]


def _sections_at(path: Sequence[str], root: type[BaseModel]) -> list[type[BaseModel]]:
    """Every section that may stand under a key, which may name numbers of lists."""
    sections = [root]
    for part in path:
        if not part.isdecimal():
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [below for field in fields for below in sections_of(field.annotation)]
    return sections


def _keys(section: type[BaseModel], parents: Sequence[str] = ()) -> Iterator[str]:
    """All keys below a section, dotted; those of lists without a number."""
    for name, field in section.model_fields.items():
        yield ".".join([*parents, name])
        for below in sections_of(field.annotation):
            yield from _keys(below, [*parents, name])


def _follow(
    location: Sequence[str | int], root: type[BaseModel]
) -> tuple[list[str], type[BaseModel], FieldInfo | None]:
    """The keys of a pydantic location, the innermost section it lies in, and the innermost key that a section has.

    pydantic also names the member of a union that it tried (a type, a section's class, or the ``kind`` of a judge),
    which is not a key.
    """
    section, field = root, None
    choices: list[type[BaseModel]] = []
    path: list[str] = []
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif part in section.model_fields and not choices:
            path.append(part)
            field = section.model_fields[part]
            choices = sections_of(field.annotation)
        elif choices and (kind := [c for c in choices if part in typing.get_args(c.model_fields["kind"].annotation)]):
            choices = kind
        elif not _is_type_name(part) and part != section.__name__:
            path.append(part)
        if len(choices) == 1:
            section, choices = choices[0], []
    return path, section, field


def _is_type_name(part: str) -> bool:
    return part in ("str", "int", "float", "bool") or part.startswith(("literal[", "dict[", "list["))
