"""Paths of the config that lead nowhere: refused at once, before torch is imported and downloads are tried.

A missing folder may have the form of a hub id (``judges/guard``), so that only the hub can tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from esi_ds.config import Config, JudgeModel, Prompts, Rows
from esi_ds.data.benchmarks import source_of
from esi_ds.data.rows import exists, looks_like_file
from esi_ds.errors import UserError
from esi_ds.models import hub


def check_paths(config: Config, stage: str) -> None:
    """Raise UserError for the first path that the stage reads and that is neither there nor on the hub.

    Paths that cannot be hub ids come first: they need no request.
    """
    models = {field: path for field, path in _models(config, stage) if not exists(path)}
    data = {field: source for field, source in _data(config, stage) if not exists(source)}
    for field, path in models.items():
        if not hub.is_hub_id(path):
            raise hub.no_model(field, path)
    for field, path in data.items():
        if looks_like_file(path) or not hub.is_hub_id(path):
            raise UserError(field, path, "there is no such file", "give a file, a hub id or a built-in name")
    for field, path in models.items():
        hub.check_exists(path, "model", field)
    if isinstance(config.data.responses, str):  # its own prompts are scored where the hub does not give others
        data.pop("data.prompts.path", None)
    for field, path in data.items():
        hub.check_exists(path, "dataset", field)


def _models(config: Config, stage: str) -> Iterator[tuple[str, str]]:
    """(key, path) of every model and judge that the stage loads."""
    yield "model.path", config.model.path
    if stage == "esi" and config.judge is not None and config.scores_responses:
        yield "judge.path", config.judge.path
    if config.eval is None or stage not in ("eval", "perturb"):
        return
    for number, model in enumerate(config.eval.models if stage == "eval" else ()):
        if model.path is not None:
            yield f"eval.models.{number}.path", model.path
    for number, judge in enumerate(config.eval.judges):
        if isinstance(judge, JudgeModel):
            yield f"eval.judges.{number}.path", judge.path


def _data(config: Config, stage: str) -> Iterator[tuple[str, str]]:
    """(key, file or hub id) of every data set that the stage reads."""
    if stage == "esi":
        prompts = config.data.prompts
        if prompts is not None and "safety" in config.objectives:
            yield "data.prompts.path", source_of(prompts.path)
        sources: list[tuple[str, Prompts | Rows | None]] = [
            ("data.tuning.path", config.data.tuning),
            ("data.benign.path", config.data.benign),
        ]
        if config.control is not None:
            sources += [("control.prompts.path", config.control.prompts), ("control.rows.path", config.control.rows)]
        for key, read in sources:
            if read is not None:
                yield key, source_of(read.path) if isinstance(read, Prompts) else read.path
        return
    if stage in ("set", "spa") and config.tune is not None:
        yield "tune.data.path", config.tune.data.path
        benign = config.tune.data.benign
        if benign is not None and benign.fraction > 0:
            yield "tune.data.benign.path", benign.path
    if config.eval is not None:
        sets: tuple[tuple[str, list[Prompts]], ...] = (("prompts", config.eval.prompts), ("benign", config.eval.benign))
        for name, sections in sets:
            for number, section in enumerate(sections):
                field = f"eval.{name}.{number}.path" if len(sections) > 1 else f"eval.{name}.path"
                yield field, source_of(section.path)
