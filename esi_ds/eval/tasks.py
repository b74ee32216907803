"""Skill before and after: GSM8K, AG News, PubMedQA, MedQA, MMLU, and whatever else lm-eval knows, run by lm-eval.

Prompts, few-shot examples, stop words, filters and metrics are lm-eval's. This module says which tasks run, on which
rows, and which results are kept: one value with its interval, and every document's score in order, so that two models
can be compared document by document (``statistics.mcnemar_exact``, ``paired_bootstrap``). Only the modules harness*.py
import lm-eval, and they are imported only when there are tasks.

lm-eval's data parallelism is not used. In 0.4.13, if a process group exists already, HFLM on CPUs takes every rank for
the only one, so that each does every document (tried); on GPUs it numbers ranks within their node only, and a rank
without a document raises while the others wait in a collective (read in its code). Instead every rank builds all
requests and answers its share, and the ranks exchange their answers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from packaging.version import Version

from esi_ds.config import Task
from esi_ds.errors import UserError

if TYPE_CHECKING:  # lm-eval is optional
    from esi_ds.eval.harness_tasks import PreparedTask

OLDEST = "0.4.12"  # the first version in which TaskManager.load builds tasks


def prepare_tasks(tasks: Sequence[Task], field: str = "eval.tasks") -> list[PreparedTask]:
    """Read and check every task before a model is loaded; the result serves any number of models.

    Reads local files. A task without one is fetched from the hub through ``datasets``. Raises UserError naming
    ``field`` and the task's number.
    """
    check_installed(tasks, field)
    return [prepared for number, task in enumerate(tasks) for prepared in prepare_task(task, f"{field}.{number}")]


def prepare_task(task: Task, field: str) -> list[PreparedTask]:
    """``prepare_tasks`` of one entry, at ``field`` of the config: several tasks where it names a tag of lm-eval."""
    from esi_ds.eval.harness_tasks import prepare

    return prepare(task, field)


def check_installed(tasks: Sequence[Task], field: str = "eval.tasks") -> None:
    """Raise UserError if there are tasks, and lm-eval is missing or too old. Does not import it."""
    if not tasks:
        return
    names = ", ".join(task.name for task in tasks)
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(field, names, "needs lm-eval", "pip install 'esi_ds[eval]'") from None
    if Version(version) < Version(OLDEST):
        raise UserError(field, names, f"needs lm-eval {OLDEST}, not {version}", "pip install 'esi_ds[eval]'")
