"""What is shown in a terminal: texts of models, data and files cannot move its cursor, recolour it or retitle it."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# Control characters of ASCII and Latin-1 but for tab and line feed, marks that reverse the direction of writing, and
# halves of surrogate pairs, which no terminal can be sent.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CONTROL_BUT_RETURN = re.compile(CONTROL.pattern.replace("\x0b-\x1f", "\x0b\x0c\x0e-\x1f"))


def printable(text: str) -> str:
    r"""The text with every control character written out, such as \x1b; tabs and line feeds stay."""
    return CONTROL.sub(_written_out, text)


def help_text(docstring: str | None) -> str:
    """A module's docstring as a command's help: without the double backticks of reStructuredText."""
    return (docstring or "").replace("``", "").strip()


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


class ReaderGone(BrokenPipeError):
    """Nobody reads what is printed any more, as behind `| head`."""


@contextmanager
def _naming_its_reader() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone(*error.args) from error


def _let_go(stream: TextIO) -> None:
    """Have what is still buffered go nowhere: flushing it would fail again, when the process ends at the latest."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def let_go_of_closed_output() -> None:
    """Flush stdout; if nobody reads it, what has been done has not failed."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go(sys.stdout)


class _CleanStream:
    """A text stream that writes control characters out; carriage returns stay, as progress bars are made of them."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with _naming_its_reader():
            return self._stream.write(CONTROL_BUT_RETURN.sub(_written_out, text))

    def flush(self) -> None:
        with _naming_its_reader():
            self._stream.flush()

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def clean_output() -> Iterator[None]:
    """Whatever is printed within, by this process and from Python, is printable; also a decorator of ``main``."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _CleanStream(stream)) for stream in before)
    try:
        yield
        sys.stdout.flush()
    except ReaderGone:
        _let_go(before[0])
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        sys.stdout, sys.stderr = before
