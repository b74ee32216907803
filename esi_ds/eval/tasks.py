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
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from packaging.version import Version
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.config import Task
from esi_ds.data.thoughts import MARKS, Marks
from esi_ds.errors import UserError
from esi_ds.eval.task_result import TaskResult
from esi_ds.ranks import Ranks

if TYPE_CHECKING:  # lm-eval is optional
    from esi_ds.eval.harness_tasks import PreparedTask

OLDEST = "0.4.12"  # the first version in which TaskManager.load builds tasks


def prepare_tasks(tasks: Sequence[Task], field: str = "eval.tasks") -> list[PreparedTask]:
    """Read and check every task before a model is loaded; the result serves any number of models.

    Reads local files. A task without one is fetched from the hub through ``datasets``. Raises UserError naming
    ``field`` and the task's number.
    """
    check_installed(tasks, field)
    return [one for number, task in enumerate(tasks) for one in prepare_task(task, f"{field}.{number}")]


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


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Sequence[PreparedTask],
    *,
    end_ids: Collection[int],
    batch_size: int,
    seed: int,
    system_prompt: str | None = None,
    ranks: Ranks | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    marks: Marks = MARKS,
) -> list[TaskResult]:
    """Results in the order of ``prepared``, the same on every rank; every rank must call it.

    model: whole, on this rank's device. prepared: what ``prepare_tasks`` returns. end_ids: the tokens that end an
    answer. seed: of the draw of few-shot examples; lm-eval sets the global random states of python, numpy and torch
    to it.
    Where the tokenizer has a chat template, few-shot examples are turns of the chat, and ``system_prompt`` is the
    system's turn.
    ranks: the processes that share the documents; None: this one alone. should_stop: asked between two slices.
    marks: of thoughts. A task is given what stands outside of them, "" of a reply that ends within one.

    Log-likelihoods are summed in float32, whatever the weights' type. Rounding may depend on the number of ranks and
    on the batch size. Performs one gather per slice of a task's requests of one kind. A rank that fails makes every
    rank fail. Raises UserError for a chat template that rejects a turn or leaves it out, and Interrupted if a rank
    should stop; the task then has to start over.
    """
    if not prepared:
        return []
    from esi_ds.eval.harness import run

    is_chat, shared = tokenizer.chat_template is not None, (ranks or Ranks(), should_stop, marks)
    return run(model, tokenizer, end_ids, prepared, batch_size, seed, is_chat, system_prompt, *shared)
