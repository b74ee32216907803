"""lm-eval's messages on stderr, each kind once; and what it would say about the machine, not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from lm_eval import evaluator

# Beginnings of warnings about what is done here on purpose, or counted (prompts that are cut).
EXPECTED = (
    "`pretrained` model kwarg",
    "Passed an already-initialized model",
    "Combined length of context",
    "Overwriting default num_fewshot",
)
EXPECTED_PARTS = ("Custom kwargs can be passed",)


class _Once(logging.Filter):
    """Lets every kind of warning through once; lm-eval repeats them for every document."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        kind = text[:60]
        if kind in self.seen or text.startswith(EXPECTED) or any(part in text for part in EXPECTED_PARTS):
            return False
        self.seen.add(kind)
        return True


@contextlib.contextmanager
def quiet(show: bool = True) -> Iterator[None]:
    """Inside the block, lm-eval's warnings (each kind once) and its bars go to stderr, or nowhere without ``show``.

    lm-eval's bootstrap is kept in this process: it would start one process per core, from one that holds a GPU.
    """
    logger = logging.getLogger("lm_eval")
    before = (logger.level, logger.propagate, os.environ.get("DISABLE_MULTIPROC"))
    with contextlib.ExitStack() as stack:
        target = sys.stderr if show else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        handler = logging.StreamHandler(target)
        handler.addFilter(_Once())
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        os.environ["DISABLE_MULTIPROC"] = "1"
        stack.enter_context(contextlib.redirect_stdout(target))
        stack.enter_context(contextlib.redirect_stderr(target))
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]
            os.environ.pop("DISABLE_MULTIPROC")
            if before[2] is not None:
                os.environ["DISABLE_MULTIPROC"] = before[2]


@contextlib.contextmanager
def undescribed() -> Iterator[None]:
    """Inside the block, lm-eval does not describe the machine after a task, which nothing reads: it would start pip,
    git, a compiler and others from a process that holds a GPU, while the other ranks wait."""
    usual = (evaluator.add_env_info, evaluator.get_git_commit_hash)

    def say_nothing(*_: Any) -> None: ...

    evaluator.add_env_info = evaluator.get_git_commit_hash = say_nothing
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = usual
