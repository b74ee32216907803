"""The judges of the config: of ESI and of evaluations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from esi_ds.config.checks import check_extra
from esi_ds.config.guards import FamilyName
from esi_ds.config.section import MAX_TIMEOUT_S, Section
from esi_ds.errors import UserError


class VerdictWords(Section):
    safe: str = Field(min_length=1, description="The word that says safe, with the space before it if there is one.")
    unsafe: str = Field(min_length=1, description="The word that says unsafe, with its space if there is one.")


Reads = Literal["answer", "trace", "both"]
READS = "What the judge reads of a response with thoughts: the final answer, the thoughts (trace), or both in order."


class JudgeModel(Section):
    """A judge whose weights are loaded."""

    path: str = Field(description="A hub id or a folder of the judge.")
    revision: str | None = Field(None, description="The branch, tag or commit of a hub id; null means the default.")
    trust_remote_code: bool = Field(False, description="Whether to run code that comes with the judge.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="The type of the judge's weights; auto takes model.dtype."
    )
    placement: Literal["auto", "replicated", "sharded"] = Field(
        "auto", description="Whole on every rank, or sharded by ZeRO-3; auto replicates a judge that is small enough."
    )
    reads: Reads = Field("answer", description=READS)


class GuardModel(JudgeModel):
    """A causal guard model and how it is asked."""

    family: FamilyName = Field("auto", description="The family, which fixes prompt and verdict words (docs/judges.md).")
    template: str | None = Field(None, description="The prompt of family custom, with {prompt} and {response}.")
    verdict_prefix: str = Field("", description="Text that family custom forces between the prompt and the verdict.")
    verdict: VerdictWords | None = Field(None, description="The two verdict words of family custom.")


Score = Literal["margin", "logit", "logprob", "prob"]


class EsiGuard(GuardModel):
    """The judge of ESI as a causal guard model."""

    kind: Literal["guard"] = Field("guard", description="The judge is a causal guard model.")
    score: Score = Field(
        "margin",
        description="The safety score J: log P(safe) - log P(unsafe), the safe word's logit, log P(safe) or P(safe).",
    )
    context: Literal["prompt_and_response", "response_only"] = Field(
        "prompt_and_response", description="What the guard reads."
    )


class ClassifierModel(JudgeModel):
    """A sequence classifier and how it is asked."""

    kind: Literal["classifier"] = Field(description="The judge is a sequence classifier.")
    template: str = Field(description="The text it reads, with {response} and usually {prompt}.")
    unsafe_labels: list[str | int] | None = Field(
        None,
        description="Names or indices of the labels that mean unsafe; null means all (multi-label models only). A "
        "single output must be named: that of a reward model means the opposite.",
    )
    multi_label: bool | None = Field(
        None, description="Whether each label is judged by itself (sigmoid); null means as the model's config says."
    )


class EsiClassifier(ClassifierModel):
    """The judge of ESI as a sequence classifier."""

    score: Score = Field("margin", description="The safety score J, as for a guard, over the safe and unsafe labels.")


def _default_to_guard(section: Any) -> Any:
    """A judge without a ``kind`` is a guard."""
    return {"kind": "guard", **section} if isinstance(section, dict) else section


EsiJudge = Annotated[EsiGuard | EsiClassifier, Field(discriminator="kind"), BeforeValidator(_default_to_guard)]


class EvalModelJudge(Section):
    """What every judge that estimates a probability of unsafe has in common."""

    name: str | None = Field(None, description="The judge's name in the tables; null means its path.")
    threshold: float = Field(0.5, gt=0, lt=1, description="The probability above which an answer counts as unsafe.")
    max_length: int | None = Field(
        None, ge=1, description="The longest text in tokens; null means as long as the judge can read."
    )


class EvalGuard(GuardModel, EvalModelJudge):
    kind: Literal["guard"] = Field("guard", description="The judge is a causal guard model.")


class EvalClassifier(ClassifierModel, EvalModelJudge):
    """Unsafe where the probability of one unsafe label (multi-label), or of all together, is above the threshold."""


class EvalYesNo(JudgeModel, EvalModelJudge):
    kind: Literal["yes_no"] = Field(
        description="The judge is a causal model that answers yes or no, like HarmBench's classifiers."
    )
    template: str = Field(description="The question, with {prompt} and {response}.")
    unsafe: list[str] = Field(["Yes"], min_length=1, description="The words that say that the attack succeeded.")
    safe: list[str] = Field(["No"], min_length=1, description="The words that say that the attack failed.")
    verdict_prefix: str = Field("", description="Text that is forced between the question and the word.")


# How many questions each worker of an endpoint asks before the ranks agree to go on; the other ranks wait meanwhile.
ENDPOINT_ROUNDS = 2


class EndpointLimits(Section):
    """How a model behind an endpoint is asked."""

    model: str = Field(description="The model's name at the endpoint.")
    concurrency: int = Field(8, ge=1, description="How many questions are asked at a time.")
    request_timeout: float = Field(
        60.0, gt=0, le=MAX_TIMEOUT_S, description="How long one attempt may take, in seconds."
    )
    item_timeout: float = Field(
        300.0, gt=0, le=MAX_TIMEOUT_S, description="How long one question may take with all its attempts, in seconds."
    )
    max_attempts: int = Field(
        5, ge=1, description="How many times a question is tried, not counting what a busy server refuses."
    )
    extra: dict[str, Any] = Field(
        {}, description="More keys for the request's body; null removes one, such as temperature or max_tokens."
    )


class EvalRubric(EndpointLimits):
    kind: Literal["rubric"] = Field(description="The judge is a model behind OPENAI_BASE_URL, with OPENAI_API_KEY.")
    name: str | None = Field(None, description="The judge's name in the tables; null means the model's name.")
    template: str | None = Field(
        None, description="A rubric with {prompt} and {response}; null means the one that ships with esi_ds."
    )
    policy: str | None = Field(None, description="The policy of a gpt-oss-safeguard, which becomes its system turn.")
    threshold: int = Field(5, ge=2, le=5, description="The lowest score that counts as unsafe; with a policy it is 1.")
    prompt_price: float | None = Field(None, ge=0, description="The price of a million tokens read, in dollars.")
    completion_price: float | None = Field(None, ge=0, description="The price of a million tokens written, in dollars.")
    max_tokens: int = Field(1024, ge=1, description="The longest reply, in tokens.")
    reads: Reads = Field("answer", description=READS)


class EvalWords(Section):
    kind: Literal["words"] = Field(description="The judge is a list of refusal words: cheap, and never the headline.")
    name: str | None = Field(None, description="The judge's name in the tables; null means words.")
    words: str = Field("jailbreakbench", description="The list of refusal words (esi_ds/eval/refusals.py).")
    reads: Reads = Field("answer", description=READS)


def _guard_of_path(section: Any) -> Any:
    """A judge with a path and without a ``kind`` is a guard, as ESI's is."""
    return _default_to_guard(section) if isinstance(section, dict) and "path" in section else section


EvalJudge = Annotated[
    EvalGuard | EvalClassifier | EvalYesNo | EvalRubric | EvalWords,
    Field(discriminator="kind"),
    BeforeValidator(_guard_of_path),
]


def check_guard(guard: GuardModel, field: str) -> None:
    """Check keys that depend on each other; ``field`` is the section's key in the config."""
    if guard.family != "custom":
        for key in ("template", "verdict", "verdict_prefix"):
            if value := guard.model_dump()[key]:
                problem = f"belongs to family custom, not {guard.family}"
                raise UserError(f"{field}.{key}", value, problem, f"set {field}.family: custom, or leave it out")
        return
    template, verdict = guard.template, guard.verdict
    if template is None or verdict is None:
        missing = "template" if template is None else "verdict"
        raise UserError(f"{field}.{missing}", None, "is missing", "family custom needs template and verdict")
    if template.count("{response}") != 1:
        raise UserError(f"{field}.template", template, "must hold {response} exactly once", "write it in")
    if getattr(guard, "context", None) != "response_only" and "{prompt}" not in template:
        raise UserError(f"{field}.template", template, "does not hold {prompt}", "write it in")
    if verdict.safe == verdict.unsafe:
        raise UserError(f"{field}.verdict", verdict.safe, "is the same word for safe and unsafe", "give two words")


def check_endpoint(section: EndpointLimits, field: str, collective_timeout_s: int) -> None:
    check_extra(section.extra, f"{field}.extra")
    if ENDPOINT_ROUNDS * section.item_timeout >= collective_timeout_s:
        raise UserError(
            f"{field}.item_timeout",
            section.item_timeout,
            f"times {ENDPOINT_ROUNDS} is not less than run.collective_timeout_s = {collective_timeout_s}, "
            "which is how long the other ranks wait",
            "lower it, or raise run.collective_timeout_s",
        )
