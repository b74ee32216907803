"""The whole config: read, overridden, validated and written again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from esi_ds import shipped
from esi_ds.config.checks import (
    OF_THIS_SERVER,
    OF_THIS_START,
    check_date,
    check_deepspeed_keys,
    check_numbers,
    check_template_kwargs,
    check_thought_marks,
)
from esi_ds.config.data import Control, Data, ModelEndpoint, check_control, check_model_endpoint
from esi_ds.config.deepspeed_file import read_deepspeed_file
from esi_ds.config.errors import explain
from esi_ds.config.evaluation import Eval, check_eval
from esi_ds.config.judges import EsiGuard, EsiJudge, check_guard
from esi_ds.config.scoring import Esi, Select, check_criteria
from esi_ds.config.section import MAX_TIMEOUT_S, Section, Seed
from esi_ds.config.tuning import Perturb, Tune
from esi_ds.config.yaml import apply_override, dump_yaml, read_yaml
from esi_ds.core.criteria import objectives
from esi_ds.errors import UserError
from esi_ds.reading import reading

DEEPSPEED = "ds_configs/zero3.json"


class Run(Section):
    output_dir: str = Field(description="The folder that receives everything the run writes.")
    seed: Seed = Field(
        0, description="The seed of all that is random: noise, random masks, the order of rows, sampled answers."
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="Whether to continue the run that stopped in this folder (auto) or to refuse (never)."
    )
    share: Literal["private", "group", "all"] = Field(
        "private", description="Who besides you may read the run folder: nobody, your group or everybody."
    )
    tensorboard: bool = Field(True, description="Whether to write TensorBoard files.")
    collective_timeout_s: int = Field(
        1800,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="How long a rank waits for the others in a collective before it gives up, in seconds.",
    )
    start_timeout_s: int = Field(
        600,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="How long a rank waits at the start for the others to appear, in seconds.",
    )
    save_every_min: float = Field(
        10.0,
        ge=0,
        le=MAX_TIMEOUT_S,
        description="The least time of work between two saves, and before the first one, in minutes, if a stage's "
        "save_every is auto; 0 saves after every micro-batch or step.",
    )


class Model(Section):
    path: str = Field(description="A hub id or a folder of a causal language model with safetensors weights.")
    revision: str | None = Field(None, description="The branch, tag or commit of a hub id; null means the default.")
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="The type of the weights while the model computes; auto takes bf16 where the machine computes it "
        "natively, else fp32.",
    )
    trust_remote_code: bool = Field(
        False, description="Whether to run code that comes with the model, or with any model of eval.models."
    )
    chat_template: str | None = Field(
        None, description="Jinja text, or a file that holds it, used instead of the tokenizer's chat template."
    )
    template_kwargs: dict[str, Any] = Field(
        {}, description="Values that the chat template reads, such as enable_thinking: false or reasoning_effort: high."
    )
    date: str = Field(
        "auto",
        description="The date, such as 2026-11-28, for chat templates that write today's date; auto is the day on "
        "which the run began.",
    )
    thought_marks: list[str] | None = Field(
        None, description="The two marks that open and close a thought of this model, in addition to the usual ones."
    )
    system_prompt: str | None = Field(
        None,
        description="The system turn before every prompt; null means none, and then a template may write a default of "
        "its own. An empty text is a turn without text, which most templates write in place of their default.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Whether to recompute activations: less memory for about a third more time."
    )
    roles: dict[str, str] = Field(
        {}, description="Roles of parameters that are not recognised, by name; * in a name stands for any text."
    )


class Config(Section):
    run: Run = Field(description="Where the run writes, and whether it resumes.")
    model: Model = Field(description="The model whose weights are scored or tuned.")
    judge: EsiJudge | None = Field(None, description="The judge whose score ESI differentiates.")
    data: Data = Field(Data(), description="What the model is asked, and the rows of further criteria.")
    control: Control | None = Field(
        None,
        description="A benign objective to compare with, in the report and for criteria specific, excess, exclusive.",
    )
    esi: Esi = Field(Esi(), description="How scores are estimated.")
    select: Select = Field(Select(), description="Which weights the mask selects.")
    tune: Tune | None = Field(None, description="How SET and SPA tune the model.")
    perturb: Perturb | None = Field(None, description="How much noise the weights of a mask get.")
    eval: Eval | None = Field(None, description="How attack success, over-refusal and skill are measured.")
    deepspeed: str | dict[str, Any] = Field(
        DEEPSPEED,
        description="The DeepSpeed config: a mapping, a file, or the name of one in ds_configs/.",
    )

    @property
    def objectives(self) -> tuple[str, ...]:
        """The passes of ESI, in their order."""
        return objectives(self.select.criteria, self.select.contrastive, self.control is not None)

    @property
    def scores_responses(self) -> bool:
        """Whether any pass of ESI reads the judge's scores of responses."""
        return "safety" in self.objectives or (self.control is not None and self.control.prompts is not None)


def load_config(path: str, overrides: list[str], deepspeed_config: str | None = None) -> Config:
    """Read a config file, or the recipe of that name, apply ``key.path=value`` overrides and validate the result.

    ``deepspeed_config`` replaces the file's ``deepspeed``. An override such as ``deepspeed.gradient_clipping=1.0``
    changes what the DeepSpeed file says. Raises UserError.
    """
    with reading("--config", path, "give a YAML file, or the name of a recipe", "is not the name of a file"):
        is_file = Path(path).exists() and not Path(path).is_dir()  # a model or a run may have a recipe's name
        file = Path(path) if is_file or path.endswith((".yaml", ".yml")) else shipped.own_recipe(path)
    if not os.path.lexists(file):
        raise UserError("--config", path, "there is no such file", "give a YAML file, or the name of a recipe")
    raw = read_yaml(file, "--config", "give a YAML file, such as the recipe demo/esi")
    if not isinstance(raw, dict):
        raise UserError("--config", path, "is not a mapping of sections", "see the recipe demo/esi")
    # A relative path may be meant from the YAML's folder. One in an override is meant from the working directory.
    deepspeed = raw.get("deepspeed")
    if isinstance(deepspeed, str):
        with reading("deepspeed", deepspeed, "give ds_configs/zero3.json or a mapping", "is not the name of a file"):
            if not Path(deepspeed).is_file() and (file.parent / deepspeed).is_file():
                raw["deepspeed"] = str((file.parent / deepspeed).resolve())
    if deepspeed_config is not None:
        raw["deepspeed"] = deepspeed_config
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "deepspeed" and deepspeed_config is not None:
            raise UserError(key, value, f"contradicts --deepspeed_config {deepspeed_config}", "give one of them")
        if key.startswith("deepspeed.") and isinstance(file_name := raw.get("deepspeed", DEEPSPEED), str):
            raw["deepspeed"] = read_deepspeed_file(file_name)
        apply_override(raw, override)
    return validate(raw)


def begun_config(run: Path) -> Config | None:
    """The config that the run in the folder began with; None where there is none. Raises UserError where it cannot be
    read."""
    file = run / "config.yaml"
    return validate(read_yaml(file, "run.output_dir", "give a new folder")) if file.is_file() else None


def validate(raw: Any) -> Config:
    """The Config of a plain mapping. Raises UserError for the first mistake."""
    check_numbers(raw, "")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise explain(error, Config) from None
    check_date(config.model.date)
    check_template_kwargs(config.model.template_kwargs)
    check_thought_marks(config.model.thought_marks)
    check_deepspeed_keys(config.deepspeed)
    if isinstance(config.judge, EsiGuard):
        check_guard(config.judge, "judge")
    if isinstance(config.data.responses, ModelEndpoint):
        check_model_endpoint(config.data.responses, "data.responses", config.run.collective_timeout_s)
    if config.eval is not None:
        check_eval(config.eval, config.run.collective_timeout_s)
    check_criteria(config.select)
    if config.control is not None:
        check_control(config.control)
    _check_save_every("esi.save_every", config.esi.save_every, "micro-batches")
    if config.tune is not None:
        _check_save_every("tune.save_every", config.tune.save_every, "steps")
    return config


def _check_save_every(field: str, every: Literal["auto"] | int, unit: str) -> None:
    if every != "auto" and every < 1:
        raise UserError(field, every, "must be at least 1", f"give a number of {unit}, or auto")


def resolved_yaml(config: Config) -> str:
    """The whole config as YAML, defaults included; it loads back to an equal config."""
    return dump_yaml(config.model_dump())


def model_name(path: str, revision: str | None) -> str:
    """What messages and records call a model on the hub."""
    return path if revision is None else f"{path} ({revision})"


def differences(first: Config, second: Config, commits: Mapping[str, str] | None = None) -> list[str]:
    """Dotted keys whose values differ, except ``OF_THIS_START``, the keys below them, and ``OF_THIS_SERVER``.

    commits: name of a model on the hub → its commit, of which a ``revision`` may be another name.
    """
    keys: list[str] = []
    missing = object()  # null is not the same as no key: in ``extra`` it removes one, and templates ask what is defined

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            a, b = ({**section, **_commit_of(section, commits or {})} for section in (a, b))
            for key in {**a, **b}:
                walk(a.get(key, missing), b.get(key, missing), f"{path}.{key}" if path else key)
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for number, pair in enumerate(zip(a, b, strict=True)):
                walk(*pair, f"{path}.{number}")
        elif a != b and not path.startswith(OF_THIS_START) and not OF_THIS_SERVER.fullmatch(path):
            keys.append(path)

    walk(first.model_dump(), second.model_dump(), "")
    return keys


def _commit_of(section: Mapping[str, Any], commits: Mapping[str, str]) -> dict[str, str]:
    """``revision`` of a model's section, where its commit is known."""
    path, revision = section.get("path"), section.get("revision")
    commit = commits.get(model_name(path, revision)) if isinstance(path, str) and "revision" in section else None
    return {} if commit is None else {"revision": commit}
