"""Builds lm-eval's tasks from their definitions, on the rows of a local file where the config names one.

``custom_dataset``, a key of definitions, hands lm-eval rows in memory: a local file's rows pass through no cache, and
nothing is fetched.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.api.group import Group
from lm_eval.api.task import Task as LmTask
from lm_eval.tasks import TaskManager

from esi_ds.artifacts import file_sha256
from esi_ds.config import Task
from esi_ds.data.benchmarks import EXAMPLES
from esi_ds.data.rows import Row, read_rows
from esi_ds.errors import UserError
from esi_ds.eval.harness_quiet import quiet
from esi_ds.eval.task_code import check_definition, further_files, sandboxed
from esi_ds.eval.task_files import read_afresh
from esi_ds.eval.task_names import names_in
from esi_ds.eval.task_rows import NEEDED, read_task_rows
from esi_ds.reading import first_line, reading

OURS = Path(__file__).parent / "lm_eval_tasks"
THEIRS = Path(lm_eval.tasks.__file__).parent
# Our name → the folder of the definition, and lm-eval's name. Indexing all 14,000 tasks would take five seconds.
KNOWN = {
    "gsm8k": (THEIRS / "gsm8k", "gsm8k"),
    "ag_news": (OURS, "ag_news"),
    "pubmedqa": (THEIRS / "pubmedqa", "pubmedqa"),
    "medqa": (THEIRS / "medqa", "medqa_4options"),
    "mmlu": (THEIRS / "mmlu" / "default", "mmlu"),
    "examples/benign": (OURS, "examples/benign"),
}
DEFAULT_ROWS = {"examples/benign": str(EXAMPLES / "benign_heldout.jsonl")}
MMLU_DATASET = "cais/mmlu"
# The name of a group that exists only while a task is loaded: see ``_with_rows``.
AROUND = "esi_ds: around"
Definition = dict[str, Any]  # the keys of a task's YAML


@dataclass(frozen=True)
class PreparedTask:
    """One entry of ``eval.tasks``, read and checked; of a tag of lm-eval, one of its tasks.

    field: the entry's key in the config. task: lm-eval's object. rows: the file of its rows; None: the hub's data set.
    sha256: of what local files gave to the entry; None: nothing.
    """

    config: Task
    field: str
    task: LmTask | Group
    rows: str | None
    sha256: str | None = None

    @property
    def their_name(self) -> str:
        """lm-eval's name of the task or group."""
        return str(self.task.name if isinstance(self.task, Group) else self.task.task_name)

    @property
    def name(self) -> str:
        """The task's name in logs and results: ours if it is in ``KNOWN``, else lm-eval's."""
        _, known = KNOWN.get(self.config.name, (None, None))
        return self.config.name if known == self.their_name else self.their_name

    @property
    def is_yaml(self) -> bool:
        return _is_yaml(self.config.name)


def prepare(task: Task, field: str) -> list[PreparedTask]:
    """See ``tasks.prepare_task``."""
    with quiet(), sandboxed(), read_afresh() as digests:
        return [replace(prepared, sha256=_sha256(prepared, digests)) for prepared in _prepare_one(task, field)]


def _sha256(task: PreparedTask, rows: Sequence[str]) -> str | None:
    """``PreparedTask.sha256``. rows: digests of what lm-eval has read from local files."""
    section = task.config
    names = [task.rows, section.fewshot_path, section.name if task.is_yaml else None]
    further = further_files(section.name, task.field) if task.is_yaml else []
    files = [file_sha256(Path(name).expanduser()) for name in (*names, *further) if name is not None]
    return hashlib.sha256(json.dumps([*files, *rows]).encode()).hexdigest() if files or rows else None


def _prepare_one(task: Task, field: str) -> list[PreparedTask]:
    """The tasks of one entry: several where it names a tag of lm-eval."""
    if task.fewshot_path is not None and task.path is None:
        raise UserError(f"{field}.fewshot_path", task.fewshot_path, "needs path", "give path too, or neither")
    path = task.path or DEFAULT_ROWS.get(task.name)
    if _is_yaml(task.name):
        if path is not None:
            raise UserError(
                f"{field}.path", path, "is not used: a YAML names its data itself", "set dataset_kwargs there"
            )
        with reading(f"{field}.name", task.name, "give a task's YAML, or lm-eval's name"):
            if not Path(task.name).expanduser().is_file():
                raise FileNotFoundError("there is no such file")
        if not task.trust_remote_code:
            check_definition(task.name, field)
        spec: Any = str(Path(task.name).expanduser())
        manager = TaskManager(include_defaults=False)
    else:
        manager, spec = _find(task, field)
        if path is not None:
            spec = _with_rows(manager, spec, task, path, field)
    loaded = _load(manager, spec, task, field)
    for built in loaded:
        for leaf in built.get_all_tasks() if isinstance(built, Group) else [built]:
            _check_runs(leaf, task, field)
            if task.path is None:
                leaf.set_config(key="num_fewshot", value=_num_fewshot(leaf.get_config("num_fewshot"), task, field))
    return [PreparedTask(task, field, built, path) for built in loaded]


def _check_runs(leaf: LmTask, task: Task, field: str) -> None:
    """Raise UserError for a task that lm-eval itself would refuse, but only when it is to run it."""
    if getattr(leaf, "MULTIMODAL", False):
        raise UserError(f"{field}.name", task.name, "needs images or sound, and only text is sent", "leave it out")
    if getattr(leaf, "UNSAFE_CODE", False) and not task.trust_remote_code:
        remedy = f"set {field}.trust_remote_code: true if this machine may run it, or leave the task out"
        raise UserError(f"{field}.name", task.name, "runs code that the model writes", remedy)


def _is_yaml(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


@functools.cache
def _manager_of_all() -> TaskManager:
    return TaskManager()


def _is_known(name: str) -> bool:
    """Whether lm-eval has a task, group or tag of this name; its index is made only where the definitions name it."""
    return name in names_in(THEIRS) and name in _manager_of_all().all_tasks


def _find(task: Task, field: str) -> tuple[TaskManager, str]:
    """A manager that knows the task, and lm-eval's name for the task."""
    if task.name in KNOWN:
        folder, name = KNOWN[task.name]
        return TaskManager(include_defaults=False, include_path=str(folder)), name
    if not _is_known(task.name):
        near = difflib.get_close_matches(task.name, {*KNOWN, *names_in(THEIRS)}, n=3) or KNOWN
        raise UserError(f"{field}.name", task.name, "is not a task of lm-eval", f"the nearest is {' or '.join(near)}")
    return _manager_of_all(), task.name


def _load(manager: TaskManager, spec: Any, task: Task, field: str) -> list[LmTask | Group]:
    """lm-eval's objects for a name, a YAML or a definition. Reads or fetches their rows."""
    try:
        loaded = manager.load([spec])
    except UserError:  # a full disk is not the task's fault
        raise
    except Exception as error:  # lm-eval's and datasets' back ends and templates raise anything
        problem = f"cannot be built ({type(error).__name__}: {first_line(error)})"
        if task.path is not None:
            rows = read_rows(task.path, f"{field}.path")
            remedy = f"give rows with the columns of the hub's set; {task.path} has {', '.join(map(str, rows[0]))}"
        elif _is_yaml(task.name):
            remedy = "check the YAML and its data"
        else:
            remedy = f"check the network, or give a local file: {field}.path"
        raise UserError(f"{field}.name", task.name, problem, remedy) from error
    around = loaded["groups"].pop(AROUND, None)
    loaded["group_map"].pop(AROUND, None)
    if around is not None and task.name == "mmlu":
        return [_as_group(manager.task_index["mmlu"].cfg, around)]
    inside = {name for names in loaded["group_map"].values() for name in names}
    roots = [group for name, group in loaded["groups"].items() if name not in inside]
    return [*roots, *(leaf for name, leaf in loaded["tasks"].items() if name not in inside)]


def _as_group(definition: Definition, around: Group) -> Group:
    """lm-eval's group, with the average that its definition prescribes, of the members of ``around`` only."""
    group = Group.from_config({name: value for name, value in definition.items() if name != "task"})
    for member in around:
        group.add(member)
    return group


def _with_rows(manager: TaskManager, name: str, task: Task, path: str, field: str) -> Definition:
    """The task's definition with a local file's rows instead of the hub's data set.

    lm-eval lets a known definition be changed only as a member of a group, so the result is a group around it, which
    ``_load`` removes again.
    """
    is_all_mmlu = name == "mmlu"
    if name not in manager.all_subtasks and not is_all_mmlu:
        raise UserError(f"{field}.path", path, f"{name} is a group of tasks", "name its members, each with its file")
    definition = manager.task_index[name].cfg
    if "class" in definition:
        raise UserError(f"{field}.path", path, f"{name} is a program that reads its data itself", "leave it out")
    is_mmlu = is_all_mmlu or definition.get("dataset_path") == MMLU_DATASET
    shape = "mmlu" if is_mmlu else task.name if task.name in NEEDED else None
    rows = _read(shape, path, f"{field}.path")
    worked = _read(shape, task.fewshot_path, f"{field}.fewshot_path") if task.fewshot_path else []
    if not is_mmlu:
        return {"group": AROUND, "task": [{"task": name, **_on_rows(definition, rows, worked, task, field)}]}
    subjects = dict.fromkeys(row["subject"] for row in rows) if is_all_mmlu else [definition["dataset_name"]]
    members = [_of_subject(manager, subject, rows, worked, task, path, field) for subject in subjects]
    return {"group": AROUND, "task": members}


def _of_subject(
    manager: TaskManager, subject: str, rows: list[Row], worked: list[Row], task: Task, path: str, field: str
) -> Definition:
    """The definition of MMLU's task of one subject, on that subject's rows."""
    names = {manager.task_index[name].cfg.get("dataset_name"): name for name in _mmlu_tasks(manager)}
    if subject not in names:
        near = difflib.get_close_matches(subject, names, n=1, cutoff=0.0)
        raise UserError(f"{field}.path", path, f"{subject} is not a subject of MMLU", f"the nearest is {near[0]}")
    chosen, examples = ([row for row in some if row["subject"] == subject] for some in (rows, worked))
    if not chosen:
        raise UserError(f"{field}.path", path, f"has no row of {subject}", "give that subject's file")
    definition = manager.task_index[names[subject]].cfg
    return {"task": names[subject], **_on_rows(definition, chosen, examples, task, field)}


def _mmlu_tasks(manager: TaskManager) -> list[str]:
    """The tasks of the original MMLU; lm-eval has many others with similar names and the same data set."""
    return [name for name in manager.all_subtasks if manager.task_index[name].yaml_path.parent == KNOWN["mmlu"][0]]


def _read(shape: str | None, path: str, field: str) -> list[Row]:
    return read_rows(path, field) if shape is None else read_task_rows(shape, path, field)


def _on_rows(definition: Definition, rows: list[Row], worked: list[Row], task: Task, field: str) -> Definition:
    """Keys of a task definition that give it these rows; few-shot examples come from ``worked``.

    They never come from ``rows``: every prompt would hold answers to other questions of the task.
    """
    fewshot = definition.get("fewshot_config") or {}
    num_fewshot = _num_fewshot(definition.get("num_fewshot"), task, field)
    defines_examples = "samples" in fewshot and not (definition.get("fewshot_split") or fewshot.get("split"))
    if num_fewshot > len(worked) and not defines_examples:
        raise UserError(
            f"{field}.fewshot_path",
            task.fewshot_path,
            f"{task.name} needs {num_fewshot} worked examples, and there are {len(worked)}",
            f"give a file of its training rows there, or {field}.num_fewshot: 0",
        )
    with reading(f"{field}.path", task.path, "give one type each", "its columns mix types"):
        splits = {"test": Dataset.from_list(rows), **({"worked": Dataset.from_list(worked)} if worked else {})}
    split = "worked" if worked else None
    return {
        "custom_dataset": lambda **_: DatasetDict(splits),
        "dataset_kwargs": {},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": split,
        "num_fewshot": num_fewshot,
        "fewshot_config": {name: value for name, value in fewshot.items() if name != "split"} or None,
    }


def _num_fewshot(defined: int | None, task: Task, field: str) -> int:
    """How many worked examples a prompt holds.

    defined: what the task's definition says. 0 there forbids examples, None does not. Raises UserError.
    """
    if task.num_fewshot is None:
        return defined or 0
    if task.num_fewshot > 0 and defined == 0:
        problem = f"{task.name} is defined without worked examples"
        raise UserError(f"{field}.num_fewshot", task.num_fewshot, problem, "leave it out")
    return task.num_fewshot
