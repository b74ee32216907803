"""How scores are estimated and weights selected, in the config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esi_ds.config.section import GENERATION_BATCH, BatchNumber, Section
from esi_ds.errors import UserError


class Esi(Section):
    estimator: Literal["soft", "gumbel", "score_function", "paper_code"] = Field(
        "soft", description="How the gradient is taken through discrete text; docs/method.md §1 defines the four."
    )
    temperature: float = Field(
        0.3, gt=0, description="The temperature of the softmax over the model's logits, for estimators soft and gumbel."
    )
    samples: int = Field(1, ge=1, description="How many noise draws estimator gumbel averages for each prompt.")
    trace_gradient: bool = Field(
        False,
        description="Whether gradients also flow through the tokens of a response's thoughts, not only its answer's.",
    )
    max_new_tokens: int = Field(256, ge=1, description="The longest response to generate, in tokens.")
    batch_size: Literal["auto"] | BatchNumber = Field(
        8, description="How many prompts a rank scores in a micro-batch; auto takes as many as fit into free memory."
    )
    generation_batch_size: Literal["auto"] | BatchNumber | None = Field(None, description=GENERATION_BATCH)
    save_scores: bool = Field(True, description="Whether to write scores/, which takes 4 bytes a weight.")
    on_nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="Whether a gradient that is not finite drops its micro-batch or stops the run."
    )
    save_every: Literal["auto"] | int = Field(
        "auto",
        description="How many micro-batches lie between two saves; auto follows run.save_every_min, and spends at most "
        "5 % of the time on saving.",
    )
    generation: Literal["auto", "gathered", "per_token"] = Field(
        "auto", description="Gather the model once to generate, or again for every token; auto gathers once if it fits."
    )
    accumulator_device: Literal["auto", "cpu"] = Field(
        "auto", description="Where the sums of gradients are kept; auto keeps them beside the weights."
    )


Criterion = Literal[
    "esi",
    "grad",
    "snip",
    "tuning_grad",
    "directed",
    "conflict",
    "specific",
    "excess",
    "exclusive",
    "magnitude",
    "random",
]


class Select(Section):
    criterion: Criterion | list[Criterion] = Field(
        "esi",
        description="The score that ranks the weights, as docs/method.md §2 defines it; a list makes a mask of each "
        "from the same passes.",
    )
    contrastive: bool = Field(
        False, description="Whether to divide scores by how much the rows of data.benign need each weight."
    )
    normalise: Literal["none", "matrix"] = Field(
        "none", description="Whether to divide scores by the mean score of their logical matrix before they are ranked."
    )
    order: Literal["top", "bottom", "random"] = Field("top", description="Which weights of the ranking are selected.")
    ratio: float = Field(0.01, gt=0, le=1, description="The share of the weights that are selected.")
    of: Literal["all", "scored"] = Field(
        "all", description="Whether the ratio is a share of all weights or of the scored weights only."
    )
    scope: Literal["model", "matrix"] = Field(
        "model", description="Whether weights are ranked over the whole model or within each logical matrix."
    )

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """All criteria, in the order of the config."""
        return tuple(self.criterion) if isinstance(self.criterion, list) else (self.criterion,)

    def subfolder(self, criterion: Criterion) -> str:
        """Where in ``mask/`` and ``scores/`` a criterion's files lie: in a folder of its name if ``criterion`` is a
        list, else directly."""
        return criterion if isinstance(self.criterion, list) else ""


def check_criteria(section: Select) -> None:
    """Raise UserError where the list of criteria is empty or names one twice."""
    field, criteria = "select.criterion", section.criteria
    if not criteria:
        raise UserError(field, [], "names no criterion", "name at least one, such as esi")
    if len(set(criteria)) < len(criteria):
        raise UserError(field, list(criteria), "names a criterion twice", "name it once: its two masks would be equal")
    for name, value in (("scope", section.scope), ("order", section.order)):
        if section.normalise == "matrix" and value in ("matrix", "random"):
            problem, remedy = f"changes nothing with select.{name} = {value}", "leave it out"
            raise UserError("select.normalise", section.normalise, problem, remedy)
