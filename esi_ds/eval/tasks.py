"""Skill before and after: GSM8K, AG News, PubMedQA, MedQA, MMLU, and whatever else lm-eval knows, run by lm-eval.

Prompts, few-shot examples, stop words, filters and metrics are lm-eval's; this module says which tasks, on which rows,
and what of the outcome is kept: one value with its interval, and every document's score in order, so that two models
can be compared document by document (``statistics.mcnemar_exact``, ``paired_bootstrap``). Only the modules
harness*.py import lm-eval, and only where tasks are asked for.

Ranks: lm-eval's own data parallelism is not used. In 0.4.13, beside a process group that exists already, HFLM on CPUs
takes every rank for the only one, so that each does every document (tried); on GPUs it numbers ranks within their node
only, and a rank that gets no document raises while the others wait in a collective (read in its code). Its model
interface allows another way, which is taken: every rank builds all requests, answers its share, and all exchange the
answers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from esi_ds.config import Task
from esi_ds.errors import UserError
from esi_ds.eval.task_result import TaskResult
from esi_ds.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from esi_ds.eval.harness_tasks import Prepared
    from esi_ds.models.folder import ModelSource

# Since 0.4.12 tasks are built by TaskManager.load.
OLDEST = "0.4.12"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def prepare_tasks(tasks: Sequence[Task], field: str = "eval.tasks") -> list[Prepared]:
    """Everything that can be wrong with the tasks is found here, before a model is loaded.

    Reads local files; nothing is fetched for a task that has one. A task without goes to the hub through ``datasets``.
    Raises UserError naming ``field`` and the task's number. The outcome serves any number of models.
    """
    if not tasks:
        return []
    check_installed(tasks, field)
    from esi_ds.eval.harness_tasks import prepare

    return prepare(tasks, field)


def check_installed(tasks: Sequence[Task], field: str = "eval.tasks") -> None:
    """Raises UserError where lm-eval is not there, or too old. Imports nothing."""
    names = ", ".join(task.name for task in tasks)
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(field, names, "needs lm-eval", "pip install 'esi_ds[eval]'") from None
    if Version(found) < Version(OLDEST):
        raise UserError(field, names, f"needs lm-eval {OLDEST}, not {found}", "pip install 'esi_ds[eval]'")


def run_tasks(
    source: ModelSource,
    tasks: Sequence[Task],
    *,
    dtype: str,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    chat_template: str | None = None,
    apply_chat_template: bool | None = None,
    system_prompt: str | None = None,
    ranks: Ranks | None = None,
    field: str = "eval.tasks",
) -> list[TaskResult]:
    """Results of a model, in the tasks' order, the same on every rank; every rank must call it.

    A whole copy of the model is loaded on every rank, from safetensors. See ``run_tasks_on`` for the rest.
    """
    prepared = prepare_tasks(tasks, field)
    if not prepared:
        return []
    from transformers import AutoModelForCausalLM

    from esi_ds.data.chat import load_tokenizer

    tokenizer = load_tokenizer(source, chat_template=chat_template)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        problem = f"cannot be loaded ({str(error).strip().splitlines()[0]})"
        raise UserError(source.field, source.path, problem, "give a causal model with safetensors weights") from error
    return run_tasks_on(
        model.eval().to(device),
        tokenizer,
        prepared,
        batch_size=batch_size,
        seed=seed,
        apply_chat_template=apply_chat_template,
        system_prompt=system_prompt,
        ranks=ranks,
    )


def run_tasks_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Sequence[Prepared],
    *,
    batch_size: int,
    seed: int,
    apply_chat_template: bool | None = None,
    system_prompt: str | None = None,
    ranks: Ranks | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TaskResult]:
    """Results of a model that is loaded, whole, on this rank's device; ``prepared`` is ``prepare_tasks``'s.

    apply_chat_template: None: where the tokenizer has one. Few-shot examples are turns of the chat then, and
    ``system_prompt`` the system's turn. seed: which few-shot examples are drawn; lm-eval sets the global random states
    of python, numpy and torch to it. Log-likelihoods are summed in float32 whatever the weights are in.
    ranks: the processes that share the documents; None: this one alone. should_stop: asked between two slices.
    Performs one gather per slice of a task's requests of a kind. Rounding may differ with the number of ranks, as with
    the batch size. A rank that fails makes every rank fail. Raises Interrupted where a rank is told to stop; the task
    begins anew then.
    """
    from esi_ds.eval.harness import run

    is_chat = tokenizer.chat_template is not None if apply_chat_template is None else apply_chat_template
    if is_chat and tokenizer.chat_template is None:
        raise UserError("model.chat_template", None, "is not set and the tokenizer has none", "give a Jinja template")
    return run(model, tokenizer, prepared, batch_size, seed, is_chat, system_prompt, ranks or Ranks(), should_stop)
