"""Damage of files and of JSON, drawn by hypothesis, and what readers of damaged files may do.

A reader may give the content or raise UserError with a whole message. Any other exception fails the test, and so does a
reader that takes ``LIMIT_S``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from esi_ds.errors import UserError

Result = TypeVar("Result")

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))  # of `make fuzz`: how many times as many examples, and random ones
LIMIT_S = 10.0
MARK = "@@damaged@@"
# What stands in the place of a JSON value: other types, extremes, names that lead out, text that is no JSON.
VALUES = [
    "null", "true", "-1", "0", "1", "0.5", "1e308", "1e999", "NaN", "-Infinity", "9007199254740993", "1" * 400,
    "1" * 5000, '""', '"x"', '"\\u0000"', '"\\ud800"', '"../../x"', '"/dev/zero"', '"a\\nb"', "[]", "{}", "[[]]",
    '{"a": 1, "a": 2}', "[1, null]", "[" * 3000 + "]" * 3000, "[" * 100_000, "'x'", "",
]  # fmt: skip


def fuzz(examples: int) -> settings:
    """Settings of a fuzz test: the same examples on every run, unless ``FUZZ_SCALE`` asks for more."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[phase for phase in Phase if phase != Phase.explain],  # it traces every line of every example
        suppress_health_check=list(HealthCheck),
    )


class TooSlow(BaseException):
    """No ``Exception``: a reader that turns every exception into UserError must not swallow it."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooSlow within the block after ``LIMIT_S`` seconds."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {LIMIT_S:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], Result]) -> Result | UserError:
    """What the reader gives, or its refusal."""
    with limited():
        try:
            return read()
        except UserError as error:
            assert error.field and error.problem and error.remedy and "\n" not in str(error)
            return error


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a flipped bit, a part lost, doubled, zeroed or foreign, or nothing left."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "lose", "double", "zero", "foreign", "append", "empty"]))
    start = draw(st.integers(0, max(len(content) - 1, 0)))
    end = min(len(content), start + draw(st.integers(1, 64)))
    if kind == "flip" and content:
        return content[:start] + bytes([content[start] ^ 1 << draw(st.integers(0, 7))]) + content[start + 1 :]
    pieces = {
        "cut": content[:start],
        "lose": content[:start] + content[end:],
        "double": content[:end] + content[start:],
        "zero": content[:start] + bytes(end - start) + content[end:],
        "foreign": content[:start] + draw(st.binary(min_size=1, max_size=8)) + content[end:],
        "append": content + draw(st.binary(min_size=1, max_size=8)),
    }
    return pieces.get(kind, b"")


@st.composite
def damaged_json(draw: st.DrawFn, text: str) -> str:
    """The JSON with one value replaced, lost, renamed or doubled."""
    content = {"": json.loads(text)}
    holder, key = draw(st.sampled_from(list(_places(content))))
    kind = draw(st.sampled_from(["replace", "replace", "lose", "rename", "double"]))
    if isinstance(holder, list) and kind in ("lose", "double"):
        holder[key : key + 1] = [] if kind == "lose" else [holder[key]] * 2
    elif isinstance(holder, dict) and key and kind in ("lose", "rename"):
        value = holder.pop(key)
        if kind == "rename":
            holder[draw(st.sampled_from([key + "x", key.upper(), "", "\0"]))] = value
    else:
        holder[key] = MARK
    return json.dumps(content[""]).replace(json.dumps(MARK), draw(st.sampled_from(VALUES)))


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(list or mapping, index or key) of every value."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from _places(content[key])


@st.composite
def damaged_folder(draw: st.DrawFn, sound: Path) -> tuple[str, Callable[[Path], None]]:
    """What to do to a copy of the folder ``sound``: words for it, and the function that does it."""
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())
    name = draw(st.sampled_from(files))
    kind = draw(st.sampled_from(["bytes", "bytes", "json", "json", "json", "gone", "folder", "pipe", "link", "other"]))
    content = (sound / name).read_bytes()
    if kind == "json" and name.suffix == ".json":
        new = draw(damaged_json(content.decode())).encode(errors="surrogatepass")
    elif kind == "other":
        new = (sound / draw(st.sampled_from(files))).read_bytes()
    else:
        new = draw(damaged_bytes(content))

    def damage(copy: Path) -> None:
        file = copy / name
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "link":
            file.symlink_to("nowhere")
        elif kind != "gone":
            file.write_bytes(new)

    return f"{kind} {name}", damage


def replace(folder: Path, sound: Path) -> Path:
    """The folder as a fresh copy of ``sound``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    return folder
