"""Prompts, rows and the run's data in the config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from esi_ds.config.checks import check_url
from esi_ds.config.judges import EndpointLimits, check_endpoint
from esi_ds.config.section import Section
from esi_ds.errors import UserError


class Prompts(Section):
    path: str = Field(description="A file, a hub id or the name of a built-in set.")
    name: str | None = Field(None, description="The configuration of a hub data set; null means its default.")
    split: str | None = Field(None, description="The split of a hub data set; null means train.")
    column: str = Field("auto", description="The column that holds the prompts; auto recognises the usual names.")
    limit: int | None = Field(
        None, ge=1, description="How many prompts to take, starting with the first; null means all."
    )
    goal: str | None = Field(
        None,
        description="The column with each attack's goal, which judges read instead of the prompt; null means none.",
    )
    behaviors: str | None = Field(
        None, description="The CSV of HarmBench's behaviours, if path is a JSON of its test cases."
    )


class Rows(Section):
    """Question and answer rows of a file or a hub data set."""

    path: str = Field(description="A file or a hub id of question and answer rows.")
    columns: str = Field(
        "auto",
        description="The columns to read: question,answer or question,input,answer or messages; auto recognises them.",
    )
    name: str | None = Field(None, description="The configuration of a hub data set; null means its default.")
    split: str | None = Field(None, description="The split of a hub data set; null means train.")
    chat_template: str | None = Field(
        None,
        description="Jinja text, or a file that holds it, in which these rows are written instead of the model's chat "
        "template; model.template_kwargs do not reach it.",
    )
    learn: Literal["answers", "all"] = Field(
        "answers", description="Which tokens have a loss: those of the assistant's turns, or all, prompts included."
    )
    end_token: bool = Field(
        True, description="Whether a last answer that the template does not end gets the tokenizer's end token."
    )

    @property
    def how_written(self) -> str:
        """What a report says of rows that are not written, or learnt, as a chat with the model is; else ""."""
        parts = ["in a template of their own"] if self.chat_template is not None else []
        parts += ["a loss on every token"] if self.learn == "all" else []
        parts += ["no end token is added"] if not self.end_token else []
        return ", ".join(parts)


class RowSource(Rows):
    limit: int | None = Field(None, ge=1, description="How many rows to take, starting with the first; null means all.")


class LossData(RowSource):
    max_length: int = Field(1024, ge=2, description="The longest row in tokens; longer rows lose their end.")


class Control(Section):
    """What has nothing to do with safety; one of the two."""

    prompts: Prompts | None = Field(
        None, description="Benign requests, which the model answers and the judge scores as it does data.prompts."
    )
    rows: LossData | None = Field(None, description="Benign rows whose loss is the objective; no judge is asked.")

    @property
    def origin(self) -> tuple[str, str]:
        """(key, path) of the data."""
        if self.rows is not None:
            return "control.rows.path", self.rows.path
        assert self.prompts is not None  # check_control
        return "control.prompts.path", self.prompts.path


def check_control(section: Control) -> None:
    """Raise UserError unless the section names prompts or rows, and not both."""
    if section.prompts is None and section.rows is None:
        raise UserError("control", None, "names no data", "give control.prompts.path or control.rows.path")
    if section.prompts is not None and section.rows is not None:
        problem = "is given together with control.prompts"
        raise UserError("control.rows.path", section.rows.path, problem, "give only one of them")


class ModelEndpoint(EndpointLimits):
    """A model that another engine serves."""

    base_url: str = Field(description="The URL of an OpenAI-compatible server, such as http://localhost:8000/v1.")
    replies_as: str | None = Field(
        None,
        min_length=1,
        description="The model's name in the server's replies, if a gateway replies in another name; null means model.",
    )
    key_variable: str | None = Field(
        None, description="The environment variable that holds the server's key; null means that none is sent."
    )


def check_model_endpoint(section: ModelEndpoint, field: str, collective_timeout_s: int) -> None:
    """Raise UserError for a URL that cannot be asked or holds a secret, and as ``check_endpoint`` does."""
    check_url(f"{field}.base_url", section.base_url)
    check_endpoint(section, field, collective_timeout_s)


def _kind_of_responses(value: Any) -> str:
    """The member of ``Responses`` that a value is meant as."""
    return "ModelEndpoint" if isinstance(value, dict | ModelEndpoint) else "str"


Responses = Annotated[
    Annotated[str, Tag("str")] | Annotated[ModelEndpoint, Tag("ModelEndpoint")], Discriminator(_kind_of_responses)
]


class Data(Section):
    prompts: Prompts | None = Field(None, description="The harmful requests that the model answers.")
    responses: Responses | None = Field(
        None,
        description='A JSONL of {"prompt", "response"}, used instead of generating, or a server to ask for them. The '
        "file answers data.prompts; if that is null, all prompts in the file are scored. "
        'Estimator score_function needs no judge if every row of the file also holds a number "judge_score".',
    )
    tuning: LossData | None = Field(
        None, description="The rows of the tuning loss, for criteria tuning_grad, directed, conflict and exclusive."
    )
    benign: LossData | None = Field(
        None, description="Rows of a skill that the mask should spare, for select.contrastive."
    )
