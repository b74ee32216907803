"""How models are evaluated, in the config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from esi_ds.config.checks import check_origin, check_unique
from esi_ds.config.data import ModelEndpoint, Prompts, check_model_endpoint
from esi_ds.config.judges import (
    EvalGuard,
    EvalJudge,
    EvalRubric,
    EvalWords,
    check_endpoint,
    check_guard,
)
from esi_ds.config.section import GENERATION_BATCH, BatchNumber, Section
from esi_ds.errors import UserError


class Task(Section):
    name: str = Field(
        description="Which task: gsm8k, ag_news, pubmedqa, medqa, mmlu, examples/benign, a name of lm-eval, or a YAML."
    )
    path: str | None = Field(None, description="A local file of the task's rows; null means the hub's data set.")
    fewshot_path: str | None = Field(None, description="A local file of worked examples; it needs path.")
    limit: int | None = Field(
        None, ge=1, description="How many rows to take, from the first of each member of a group; null means all."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="How many worked examples a prompt holds; null means as the task's definition says."
    )
    trust_remote_code: bool = Field(
        False, description="Whether to run code that the task's YAML names, or that the model writes (humaneval, mbpp)."
    )


def _task_of_name(entry: Any) -> Any:
    """A task may be written as its name alone."""
    return {"name": entry} if isinstance(entry, str) else entry


MIN_TEMPERATURE = 0.001
SAMPLING_KEYS = {"temperature", "top_p", "seed"}  # of a request's body
ORIGINS = ("path", "answers", "endpoint")  # of a model under evaluation: it has one of them


def _list_of_set(entry: Any) -> Any:
    """A single set may be written without a list around it."""
    return [entry] if isinstance(entry, dict) else entry or []


PromptSets = Annotated[list[Prompts], BeforeValidator(_list_of_set)]


class EvalModel(Section):
    path: str | None = Field(None, description="A hub id or a folder of a model to compare.")
    answers: str | None = Field(
        None, description="Instead of path, a file of the model's answers: none of its weights are loaded."
    )
    answers_of: str | None = Field(
        None, description="The model to take from a file of several models' answers; null means name."
    )
    endpoint: ModelEndpoint | None = Field(
        None, description="Instead of path, the server that is asked for the answers."
    )
    name: str | None = Field(
        None, description="The model's name in the tables; null means its path, its file's or its name at the endpoint."
    )
    revision: str | None = Field(None, description="The branch, tag or commit of a hub id; null means the default.")
    before: str = Field("base", description="The name of the model that this one is compared with; base is model.path.")


class Eval(Section):
    models: list[EvalModel] = Field(
        [], description="Models to evaluate besides model.path, which the tables call base."
    )
    judges: list[EvalJudge] = Field(
        [], description="The judges of attack success; an empty list means refusal words alone."
    )
    prompts: PromptSets = Field([], description="The harmful requests: one set, or a list of sets.")
    benign: PromptSets = Field([], description="The benign requests that measure over-refusal: one set, or a list.")
    before: bool = Field(
        True,
        description="Whether SET and SPA also answer before tuning; a grid of one model needs that only once.",
    )
    refusal_words: str = Field("xstest", description="The list of refusal words applied to benign requests.")
    tasks: list[Annotated[Task, BeforeValidator(_task_of_name)]] = Field(
        [],
        description="Tasks that lm-eval runs with the whole model on every rank; they need pip install 'esi_ds[eval]'.",
    )
    divergence: bool = Field(
        False,
        description=(
            "Whether KL(base ‖ model) is measured per token of the base's answers to benign requests; model.path is "
            "loaded beside one other model at a time."
        ),
    )
    coherence: bool = Field(
        True,
        description="Whether incoherent answers are counted, for which the base model reads all answers again; if they "
        "are not, a broken model looks safe.",
    )
    max_new_tokens: int = Field(256, ge=1, description="The longest answer, in tokens.")
    samples: int = Field(1, ge=1, description="How many answers a model gives to a prompt.")
    temperature: float = Field(
        0.0, ge=0, le=100, description="The temperature that answers are sampled at; 0 decodes greedily."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The total probability of the likeliest tokens, from which samples are drawn; 1: all.",
    )
    batch_size: int = Field(8, ge=1, description="How many answers a rank judges or reads at a time.")
    generation_batch_size: Literal["auto"] | BatchNumber | None = Field(None, description=GENERATION_BATCH)

    @property
    def sampling(self) -> dict[str, float]:
        """How answers are sampled, top_p even if it is 1: a server may have another default. Empty: they are greedy."""
        return {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}


def check_sampling(section: Eval) -> None:
    """Raise UserError for samples without a temperature, for one that fp32 would not tell from greedy, and for one
    that an endpoint alone would be given."""
    if section.temperature == 0:
        remedy = "set eval.temperature above 0, or leave it out"
        if section.samples > 1:
            raise UserError("eval.samples", section.samples, "would be copies of one greedy answer", remedy)
        if section.top_p < 1:
            raise UserError("eval.top_p", section.top_p, "chooses among samples, and answers are greedy", remedy)
    elif section.temperature < MIN_TEMPERATURE:
        problem = f"is below {MIN_TEMPERATURE}, which is nearly greedy"
        raise UserError("eval.temperature", section.temperature, problem, "give 0 for greedy answers, or more")
    for number, model in enumerate(section.models):
        extra = model.endpoint.extra if model.endpoint else {}
        if section.temperature == 0 and extra.get("temperature"):  # null: the server takes none
            field, value = f"eval.models.{number}.endpoint.extra.temperature", extra["temperature"]
            raise UserError(field, value, "would sample this model's answers alone", "set eval.temperature instead")
        for key in SAMPLING_KEYS & set(extra if section.temperature else ()):
            field, value = f"eval.models.{number}.endpoint.extra.{key}", extra[key]
            if value is None and (key == "seed" or (key == "top_p" and section.top_p == 1)):  # a server that takes none
                continue
            owner = "run.seed" if key == "seed" else f"eval.{key}"
            raise UserError(field, value, f"cannot be set here where answers are sampled: {owner} sets it", "remove it")


def check_eval(section: Eval, collective_timeout_s: int) -> None:
    """Check sampling, that names in the tables are unique and that no endpoint keeps other ranks waiting too long."""
    check_sampling(section)
    for number, judge in enumerate(section.judges):
        if isinstance(judge, EvalGuard):
            check_guard(judge, f"eval.judges.{number}")
        if isinstance(judge, EvalRubric):
            check_endpoint(judge, f"eval.judges.{number}", collective_timeout_s)
    for number, model in enumerate(section.models):
        check_origin(f"eval.models.{number}", {key: getattr(model, key) for key in ORIGINS}, model.revision)
        if model.answers_of is not None and model.answers is None:
            field = f"eval.models.{number}.answers_of"
            raise UserError(field, model.answers_of, "belongs to a file of answers", "leave it out, or give answers")
        if model.endpoint is not None:
            check_model_endpoint(model.endpoint, f"eval.models.{number}.endpoint", collective_timeout_s)
    names = [("base", "base"), *((f"eval.models.{n}.name", label(m)) for n, m in enumerate(section.models))]
    check_unique(names)
    check_unique([(f"eval.judges.{n}.name", label(j)) for n, j in enumerate(section.judges)])
    for number, model in enumerate(section.models):
        others = [name for _, name in names if name != label(model)]
        if model.before not in others:
            field = f"eval.models.{number}.before"
            raise UserError(field, model.before, "is not another model's name", f"name one of {others}")


def label(section: EvalModel | EvalJudge) -> str:
    """What a model or a judge is called in tables and files."""
    if section.name is not None:
        return section.name
    if isinstance(section, EvalWords):
        return "words"
    if isinstance(section, EvalModel):
        return section.path or section.answers or (section.endpoint.model if section.endpoint else "")
    return section.model if isinstance(section, EvalRubric) else section.path
