"""The part of tasks.py that talks to lm-eval; imported only where tasks are asked for.

lm-eval's public interface only: ``TaskManager``, ``simple_evaluate``, ``HFLM``, and a task definition's own keys
(``custom_dataset`` hands it rows that are in memory, so nothing of a local file goes through a cache or the network).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as LmTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.config import Task
from esi_ds.data.benchmarks import EXAMPLES
from esi_ds.data.rows import Row, read_rows
from esi_ds.errors import UserError
from esi_ds.eval.harness_output import quiet, results
from esi_ds.eval.task_rows import NEEDED, read_task_rows
from esi_ds.eval.tasks import Ranks, TaskResult

OURS = Path(__file__).parent / "lm_eval_tasks"
THEIRS = Path(lm_eval.tasks.__file__).parent
# Our names: the folder of the definition, and what lm-eval calls the task. Its index of all 14,000 takes five seconds.
KNOWN = {
    "gsm8k": (THEIRS / "gsm8k", "gsm8k"),
    "ag_news": (OURS, "ag_news"),
    "pubmedqa": (THEIRS / "pubmedqa", "pubmedqa"),
    "medqa": (THEIRS / "medqa", "medqa_4options"),
    "mmlu": (THEIRS / "mmlu" / "default", "mmlu"),
    "examples/benign": (OURS, "examples/benign"),
}
DEFAULT_ROWS = {"examples/benign": str(EXAMPLES / "benign_heldout.jsonl")}
ALONE_IN = "esi_ds: one task"
MMLU_DATASET = "cais/mmlu"
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """One entry of ``eval.tasks``, read and checked: lm-eval's task or group, and the file of its rows."""

    config: Task
    field: str
    task: LmTask | Group
    rows: str | None

    @property
    def is_yaml(self) -> bool:
        return _is_yaml(self.config.name)


def prepare(tasks: Sequence[Task], field: str) -> list[Prepared]:
    """See ``tasks.prepare_tasks``."""
    prepared = []
    with quiet():
        for number, task in enumerate(tasks):
            prepared.extend(_prepare_one(task, f"{field}.{number}"))
    return prepared


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Sequence[Prepared],
    batch_size: int,
    seed: int,
    is_chat: bool,
    system_prompt: str | None,
    ranks: Ranks,
) -> list[TaskResult]:
    """See ``tasks.run_tasks_on``."""
    found: list[TaskResult] = []
    with quiet(show=ranks.rank == 0):
        lm = SharedLM(model, tokenizer, batch_size, is_chat, ranks)
        for item in prepared:
            lm.begin(item)
            outcome = simple_evaluate(
                model=lm,
                tasks=[item.task],
                limit=item.config.limit,
                bootstrap_iters=1000,
                apply_chat_template=is_chat,
                system_instruction=system_prompt,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            # lm-eval gives nothing to ranks whose LOCAL_RANK is not 0.
            found += ranks.gather(outcome and results(outcome, item, lm.cut, is_chat))[0]
    return found


class SharedLM(HFLM):
    """lm-eval's own model of transformers, whose requests are divided between the ranks, document by document.

    To lm-eval it is one process: ``rank`` 0 of 1. All requests of a document stay on one rank, where HFLM reads their
    common beginning once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        is_chat: bool,
        ranks: Ranks,
    ):
        # A chat template writes the special tokens itself. bf16's own softmax has three digits: choices would tie.
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            add_bos_token=False if is_chat else None,
        )
        self.ranks = ranks
        self.item: Prepared | None = None
        self.cut: dict[str, set[int]] = {}

    def begin(self, item: Prepared) -> None:
        """The requests that follow are this task's."""
        self.item, self.cut = item, {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._count_cut(requests, lambda request: (self.max_length + 1, "".join(request.args[:2])))
        return self._share(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            wanted = self._num_new_tokens(request)
            if wanted >= self.max_length:
                problem = f"generates up to {wanted} tokens, and the model takes {self.max_length} with the prompt"
                raise UserError(self.item.field, self.item.config.name, problem, "leave the task out")
        self._count_cut(requests, lambda request: (self.max_length - self._num_new_tokens(request), request.args[0]))
        return self._share(super().generate_until, requests, disable_tqdm)

    def _num_new_tokens(self, request: Instance) -> int:
        """Under the names that lm-eval takes for it, first come first served."""
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        return int(next((request.args[1][name] for name in names if name in request.args[1]), self.max_gen_toks))

    def _count_cut(self, requests: list[Instance], read: Callable[[Instance], tuple[int, str]]) -> None:
        """Documents of which HFLM will drop the beginning; read: from a request to (tokens that fit, text)."""
        for request in requests:
            limit, text = read(request)
            # Every token is a byte at least.
            if len(text.encode()) > limit and len(self.tok_encode(text)) > limit:
                self.cut.setdefault(request.task_name, set()).add(request.doc_id)

    def _share(self, answer: Callable, requests: list[Instance], disable_tqdm: bool) -> list[Any]:
        """Answers to all requests, on every rank. One gather."""
        documents: dict[tuple[str, int], int] = {}
        owners = [
            documents.setdefault((request.task_name, request.doc_id), len(documents)) % self.ranks.size
            for request in requests
        ]
        mine = [number for number, owner in enumerate(owners) if owner == self.ranks.rank]
        answers, failure = [], None
        try:
            if mine:
                answers = answer([requests[number] for number in mine], disable_tqdm or self.ranks.rank != 0)
        except Exception as error:  # the others wait in the gather: they are told
            failure = error
        everyone = self.ranks.gather((mine, answers, failure and f"{type(failure).__name__}: {failure}"))
        if failure:
            raise failure
        for rank, (_, _, problem) in enumerate(everyone):
            if problem:
                raise RuntimeError(f"rank {rank} failed in {self.item.config.name}: {problem}")
        placed = {
            number: value for numbers, values, _ in everyone for number, value in zip(numbers, values, strict=True)
        }
        return [placed[number] for number in range(len(requests))]


def _prepare_one(task: Task, field: str) -> list[Prepared]:
    """One entry; a tag of lm-eval names several tasks."""
    if task.fewshot_path is not None and task.path is None:
        raise UserError(f"{field}.fewshot_path", task.fewshot_path, "goes with path", "give path too, or neither")
    path = task.path or DEFAULT_ROWS.get(task.name)
    if _is_yaml(task.name):
        if path is not None:
            raise UserError(f"{field}.path", path, "the YAML names its own data", "write it as dataset_kwargs there")
        spec: Any = str(Path(task.name).expanduser())
        manager = TaskManager(include_defaults=False)
    else:
        manager, spec = _find(task, field)
        if path is not None:
            spec = _with_rows(manager, spec, task, path, field)
    loaded = _load(manager, spec, task, field)
    for built in loaded:
        leaves = built.get_all_tasks() if isinstance(built, Group) else [built]
        for leaf in leaves:
            _set_num_fewshot(leaf, task, field)
    return [Prepared(task, field, built, path) for built in loaded]


def _is_yaml(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


def _find(task: Task, field: str) -> tuple[TaskManager, str]:
    """A manager that knows the task, and lm-eval's name for it."""
    if task.name in KNOWN:
        folder, name = KNOWN[task.name]
        return TaskManager(include_defaults=False, include_path=str(folder)), name
    manager = TaskManager()
    if task.name not in manager.all_tasks:
        near = difflib.get_close_matches(task.name, [*KNOWN, *manager.all_tasks], n=1, cutoff=0.0)
        raise UserError(f"{field}.name", task.name, "is no task of lm-eval", f"the nearest is {near[0]}")
    return manager, task.name


def _load(manager: TaskManager, spec: Any, task: Task, field: str) -> list[LmTask | Group]:
    """lm-eval's objects of a name, a YAML or a definition; its rows are read (or fetched) by this."""
    if _is_yaml(task.name) and not Path(spec).is_file():
        raise UserError(f"{field}.name", task.name, "there is no such file", "give a task's YAML, or lm-eval's name")
    try:
        loaded = manager.load([spec])
    except Exception as error:  # lm-eval and datasets raise whatever their many back ends and templates raise
        problem = f"cannot be built ({type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]})"
        if task.path is not None:
            rows = read_rows(task.path, f"{field}.path")
            remedy = f"give rows with the columns of the hub's set; {task.path} has {', '.join(map(str, rows[0]))}"
        elif _is_yaml(task.name):
            remedy = "check the YAML and its data"
        else:
            remedy = f"check the network, or give a local file: {field}.path"
        raise UserError(f"{field}.name", task.name, problem, remedy) from error
    loaded["groups"].pop(ALONE_IN, None)
    loaded["group_map"].pop(ALONE_IN, None)
    inside = {name for names in loaded["group_map"].values() for name in names}
    roots = [group for name, group in loaded["groups"].items() if name not in inside]
    return [*roots, *(leaf for name, leaf in loaded["tasks"].items() if name not in inside)]


def _with_rows(manager: TaskManager, name: str, task: Task, path: str, field: str) -> Overrides:
    """The task's definition with a local file's rows in place of the hub's set."""
    definition = manager.task_index[name].cfg
    is_mmlu = name == "mmlu" or (definition or {}).get("dataset_path") == MMLU_DATASET
    if name not in manager.all_subtasks and name != "mmlu":
        raise UserError(f"{field}.path", path, f"{name} is a group of tasks", "name its members, each with its file")
    if "class" in definition:
        raise UserError(f"{field}.path", path, f"{name} is a program that reads its own data", "leave it out")
    shape = "mmlu" if is_mmlu else task.name if task.name in NEEDED else None
    rows = _read(shape, path, f"{field}.path")
    worked = _read(shape, task.fewshot_path, f"{field}.fewshot_path") if task.fewshot_path else []
    if not is_mmlu:
        return _alone({"task": name, **_on_rows(definition, rows, worked, task, field)})
    members = []
    wanted = dict.fromkeys(row["subject"] for row in rows) if name == "mmlu" else [definition["dataset_name"]]
    for subject in wanted:
        member = f"mmlu_{subject}" if name == "mmlu" else name
        if member not in manager.task_index:
            subjects = [found.removeprefix("mmlu_") for found in manager.all_subtasks]
            near = difflib.get_close_matches(subject, subjects, n=1, cutoff=0.0)
            raise UserError(f"{field}.path", path, f"{subject} is no subject of MMLU", f"the nearest is {near[0]}")
        chosen, examples = ([row for row in some if row["subject"] == subject] for some in (rows, worked))
        if not chosen:
            raise UserError(f"{field}.path", path, f"has no row of {subject}", "give that subject's file")
        overrides = _on_rows(manager.task_index[member].cfg, chosen, examples, task, field)
        members.append({"task": member, **overrides})
    return {**definition, "task": members} if name == "mmlu" else _alone(members[0])


def _alone(member: Overrides) -> Overrides:
    """lm-eval changes a definition it knows only for a member of a group: a group of one, which ``_load`` takes off."""
    return {"group": ALONE_IN, "task": [member]}


def _read(shape: str | None, path: str, field: str) -> list[Row]:
    return read_rows(path, field) if shape is None else read_task_rows(shape, path, field)


def _on_rows(definition: Overrides, rows: list[Row], worked: list[Row], task: Task, field: str) -> Overrides:
    """Keys of a task definition that give it these rows; ``worked`` is where few-shot examples come from.

    Never the rows themselves: every prompt would hold answers of other questions that are asked.
    """
    fewshot = definition.get("fewshot_config") or {}
    wanted = definition.get("num_fewshot") or 0 if task.num_fewshot is None else task.num_fewshot
    has_own = "samples" in fewshot and not (definition.get("fewshot_split") or fewshot.get("split"))
    if wanted > len(worked) and not has_own:
        raise UserError(
            f"{field}.fewshot_path",
            task.fewshot_path,
            f"{task.name} wants {wanted} worked examples, and there are {len(worked)}",
            f"give a file of its training rows there, or {field}.num_fewshot: 0",
        )
    try:
        splits = {"test": Dataset.from_list(rows), **({"worked": Dataset.from_list(worked)} if worked else {})}
    except (ValueError, TypeError) as error:  # pyarrow's are ValueErrors
        raise UserError(f"{field}.path", task.path, f"its columns mix types: {error}", "give one type each") from error
    split = "worked" if worked else None
    return {
        "custom_dataset": lambda **_: DatasetDict(splits),
        "dataset_kwargs": {},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": split,
        "fewshot_config": {name: value for name, value in fewshot.items() if name != "split"} or None,
    }


def _set_num_fewshot(leaf: LmTask, task: Task, field: str) -> None:
    if task.num_fewshot is None:
        return
    if task.num_fewshot > 0 and leaf.get_config("num_fewshot") == 0:
        problem = f"{leaf.task_name} is defined without worked examples"
        raise UserError(f"{field}.num_fewshot", task.num_fewshot, problem, "leave it out")
    leaf.set_config(key="num_fewshot", value=task.num_fewshot)
