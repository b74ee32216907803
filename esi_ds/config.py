"""The YAML of an experiment, strictly typed (docs/design.md §5). Imports no torch: a bad config fails at once.

Every key has one owner and a sentence. An unknown key, a wrong type or a value out of range is a ``UserError`` that
names the key in full.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from esi_ds.config_checks import OF_THIS_START, check_extra, check_numbers, check_origin, check_unique
from esi_ds.config_errors import explain
from esi_ds.config_guards import FamilyName
from esi_ds.config_yaml import apply_override, dump_yaml, read_yaml
from esi_ds.errors import UserError
from esi_ds.reading import reading

MAX_TIMEOUT_S = 10**8  # three years; a timer takes no more


class Section(BaseModel):
    """Rejects unknown keys and converts no type silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range of numpy's seeds, which lm-eval sets


class Run(Section):
    output_dir: str = Field(description="The folder that receives everything the run writes.")
    seed: Seed = Field(0, description="The seed of noise and random orders; nothing else in a run is random.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="Whether to continue the run that stopped in this folder (auto) or to refuse (never)."
    )
    share: Literal["private", "group", "all"] = Field(
        "private", description="Who but you may read the run folder: nobody, your group or everybody."
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
        description="How many minutes of work lie between saves at least, the first included, where a stage's "
        "save_every is auto; 0 saves after every micro-batch or step.",
    )


class Model(Section):
    path: str = Field(description="A hub id or a folder of a causal language model with safetensors weights.")
    revision: str | None = Field(None, description="The branch, tag or commit of a hub id; null means the default.")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="The type of the weights while the model computes.")
    trust_remote_code: bool = Field(False, description="Whether to run code that comes with the model.")
    chat_template: str | None = Field(
        None, description="Jinja text, or a file that holds it, used instead of the tokenizer's chat template."
    )
    system_prompt: str | None = Field(None, description="The system turn before every prompt; null means none.")
    gradient_checkpointing: bool = Field(
        False, description="Whether to recompute activations: less memory for about a third more time."
    )
    roles: dict[str, str] = Field(
        {}, description="Roles of parameters that are not recognised, by their name, in which * stands for any text."
    )


class VerdictWords(Section):
    safe: str = Field(min_length=1, description="The word that says safe, with the space before it if there is one.")
    unsafe: str = Field(min_length=1, description="The word that says unsafe, likewise.")


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


class GuardModel(JudgeModel):
    """A causal guard model and how it is asked."""

    family: FamilyName = Field("auto", description="What fixes prompt and verdict words, see docs/judges.md.")
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
        None, description="Names or indices of the labels that mean unsafe; null means all (multi-label models only)."
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


class Prompts(Section):
    path: str = Field(description="A file, a hub id or the name of a built-in set.")
    split: str | None = Field(None, description="The split of a hub data set; null means train.")
    column: str = Field("auto", description="The column that holds the prompts; auto recognises the usual names.")
    limit: int | None = Field(None, ge=1, description="How many prompts to take, from the first; null means all.")


class Rows(Section):
    """Question and answer rows of a file or a hub data set."""

    path: str = Field(description="A file or a hub id of question and answer rows.")
    columns: str = Field(
        "auto", description="Columns: question,answer or question,input,answer or messages; auto recognises them."
    )
    name: str | None = Field(None, description="The configuration of a hub data set; null means its default.")
    split: str | None = Field(None, description="The split of a hub data set; null means train.")


class RowSource(Rows):
    limit: int | None = Field(None, ge=1, description="How many rows to take, from the first; null means all.")


class LossData(RowSource):
    max_length: int = Field(1024, ge=2, description="The longest row in tokens; longer rows lose their end.")


class Data(Section):
    prompts: Prompts | None = Field(None, description="The harmful requests that the model answers.")
    responses: str | None = Field(
        None,
        description='A JSONL of {"prompt", "response"}, used instead of generating. Estimator score_function needs no '
        'judge where every row also holds a number "judge_score".',
    )
    tuning: LossData | None = Field(
        None, description="The rows of the tuning loss, for criteria tuning_grad, directed and conflict."
    )
    benign: LossData | None = Field(
        None, description="The rows whose skill a mask should spare, for select.contrastive."
    )


BatchNumber = Annotated[int, Field(ge=1)]
GENERATION_BATCH = (
    "How many prompts a rank answers at a time; auto takes as many as fit into free memory, 64 at most; null means "
    "auto on GPUs and batch_size on CPUs."
)


class Esi(Section):
    estimator: Literal["soft", "gumbel", "score_function", "paper_code"] = Field(
        "soft", description="How the gradient passes the sampled text; docs/method.md §1 defines the four."
    )
    temperature: float = Field(0.3, gt=0, description="The temperature of the softmax over the model's logits.")
    samples: int = Field(1, ge=1, description="How many noise draws estimator gumbel averages for each prompt.")
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
        description="How many micro-batches lie between saves; auto goes by run.save_every_min, and spends at most "
        "5 % of the time on it.",
    )
    generation: Literal["auto", "gathered", "per_token"] = Field(
        "auto", description="Gather the model once to generate, or anew for every token; auto gathers once if it fits."
    )
    accumulator_device: Literal["auto", "cpu"] = Field(
        "auto", description="Where the sums of gradients are kept; auto keeps them beside the weights."
    )


class Select(Section):
    criterion: Literal["esi", "grad", "snip", "tuning_grad", "directed", "conflict", "magnitude", "random"] = Field(
        "esi", description="The score that ranks the weights; docs/method.md §2 defines each."
    )
    contrastive: bool = Field(
        False, description="Whether to divide scores by how much the rows of data.benign need each weight."
    )
    order: Literal["top", "bottom", "random"] = Field("top", description="Which weights of the ranking are selected.")
    ratio: float = Field(0.01, gt=0, le=1, description="The share of the weights that are selected.")
    of: Literal["all", "scored"] = Field(
        "all", description="Whether the ratio is a share of all weights or of the scored weights only."
    )
    scope: Literal["model", "matrix"] = Field(
        "model", description="Whether weights are ranked over the whole model or within each logical matrix."
    )


class BenignMix(Rows):
    fraction: float = Field(0.0, ge=0, le=1, description="The share of benign rows in a batch.")


class TuneData(RowSource):
    benign: BenignMix | None = Field(None, description="Benign rows that are mixed in to limit over-refusal.")


class Tune(Section):
    mask: str = Field(description="The folder of the mask.")
    data: TuneData = Field(description="The rows that the model learns.")
    max_steps: int = Field(100, ge=1, description="How many optimizer steps to take.")
    lr: float = Field(1e-4, gt=0, description="The peak learning rate.")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="The course of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="The share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="The decoupled weight decay, on trained weights only.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="The decay rates of AdamW's two moments."
    )
    eps: float = Field(1e-8, gt=0, description="The term in AdamW's denominator that avoids division by zero.")
    clip: float | None = Field(
        1.0, gt=0, description="The largest norm of the trained weights' gradient; null means no clipping."
    )
    batch_size: int = Field(4, ge=1, description="How many sequences a rank learns in a micro-batch.")
    gradient_accumulation: int = Field(1, ge=1, description="How many micro-batches make a step.")
    max_length: int = Field(1024, ge=2, description="The longest row in tokens; longer rows lose their end.")
    unscored: Literal["freeze", "train"] = Field(
        "freeze", description="What happens to embeddings, norms, biases and routers."
    )
    router: Literal["freeze", "train"] | None = Field(
        None, description="What happens to routers; null means as tune.unscored says."
    )
    reduction: Literal["auto", "compact", "scatter"] = Field(
        "auto", description="How SET reduces gradients: once a step (compact), or sharded in the hooks (scatter)."
    )
    save_every: Literal["auto"] | int = Field(
        "auto", description="How many steps lie between saves; auto goes by the time, as esi.save_every does."
    )
    export: bool = Field(True, description="Whether to write the tuned model to model/.")
    patch: bool = Field(True, description="Whether to write the difference to the base model to patch/.")


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
    trust_remote_code: bool = Field(False, description="Whether to run code that the task's YAML names.")


def _task_of_name(entry: Any) -> Any:
    """A task may be written as its name alone."""
    return {"name": entry} if isinstance(entry, str) else entry


def _list_of_number(entry: Any) -> Any:
    """A single number may be written without a list around it."""
    return [entry] if isinstance(entry, (int, float)) and not isinstance(entry, bool) else entry


class Perturb(Section):
    mask: str = Field(description="The folder of the mask.")
    scores: str | None = Field(
        None, description="The scores that the mask was made from; null means the folder scores/ beside the mask."
    )
    orders: list[Literal["top", "random", "bottom"]] = Field(
        ["top", "random", "bottom"], min_length=1, description="Which weights get noise, the same number for each."
    )
    noise: Annotated[list[Annotated[float, Field(ge=0)]], BeforeValidator(_list_of_number)] = Field(
        [0.38], min_length=1, description="The noise's standard deviation in units of σ: a number, or several."
    )
    ratios: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="The shares of the weights that get noise; null means as many as the mask holds."
    )
    seeds: list[Seed] = Field(
        [0, 1, 2], min_length=1, description="The seeds of the noise and of the random weights, one cell each."
    )


class EvalModelJudge(Section):
    """What every judge that estimates a probability of unsafe has in common."""

    name: str | None = Field(None, description="The judge's name in the tables; null means its path.")
    threshold: float = Field(0.5, gt=0, lt=1, description="The probability above which an answer counts as unsafe.")
    max_length: int | None = Field(
        None, ge=1, description="The longest text in tokens; null means as long as the judge can read."
    )


class EvalGuard(GuardModel, EvalModelJudge):
    kind: Literal["guard"] = Field(description="The judge is a causal guard model.")


class EvalClassifier(ClassifierModel, EvalModelJudge):
    """Unsafe where the probability of one unsafe label (multi-label), or of all together, is above the threshold."""


class EvalYesNo(JudgeModel, EvalModelJudge):
    kind: Literal["yes_no"] = Field(description="The judge is a causal model that answers yes or no, as HarmBench-cls.")
    template: str = Field(description="The question, with {prompt} and {response}.")
    unsafe: list[str] = Field(["Yes"], min_length=1, description="The words that say that the attack succeeded.")
    safe: list[str] = Field(["No"], min_length=1, description="The words that say that the attack failed.")
    verdict_prefix: str = Field("", description="Text that is forced between the question and the word.")


# How many questions each worker of an endpoint asks before the ranks agree to go on; the other ranks wait meanwhile.
ENDPOINT_ROUNDS = 2
ORIGINS = ("path", "answers", "endpoint")  # of a model under evaluation: it has one of them


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
    max_attempts: int = Field(5, ge=1, description="How many times a question is tried.")
    extra: dict[str, Any] = Field(
        {}, description="More keys for the request's body; null removes one, such as temperature or max_tokens."
    )


class EvalRubric(EndpointLimits):
    kind: Literal["rubric"] = Field(description="The judge is a model behind OPENAI_BASE_URL, with OPENAI_API_KEY.")
    name: str | None = Field(None, description="The judge's name in the tables; null means the model's name.")
    template: str | None = Field(
        None, description="A rubric with {prompt} and {response}; null means the one that ships with esi_ds."
    )
    policy: str | None = Field(None, description="The system turn of a gpt-oss-safeguard, which replies 0 or 1.")
    threshold: int = Field(5, ge=2, le=5, description="The lowest score that counts as unsafe; of a policy it is 1.")
    prompt_price: float | None = Field(None, ge=0, description="The price of a million tokens read, in dollars.")
    completion_price: float | None = Field(None, ge=0, description="The price of a million tokens written, in dollars.")
    max_tokens: int = Field(1024, ge=1, description="The longest reply, in tokens.")


class EvalWords(Section):
    kind: Literal["words"] = Field(description="The judge is a list of refusal words: cheap, and never the headline.")
    name: str | None = Field(None, description="The judge's name in the tables; null means words.")
    words: str = Field("jailbreakbench", description="The list of refusal words (esi_ds/eval/refusals.py).")


EvalJudge = Annotated[EvalGuard | EvalClassifier | EvalYesNo | EvalRubric | EvalWords, Field(discriminator="kind")]


def _list_of_set(entry: Any) -> Any:
    """A single set may be written without a list around it."""
    return [entry] if isinstance(entry, dict) else entry or []


PromptSets = Annotated[list[Prompts], BeforeValidator(_list_of_set)]


class EvalEndpoint(EndpointLimits):
    base_url: str = Field(description="The URL of an OpenAI-compatible server, such as http://localhost:8000/v1.")
    key_variable: str | None = Field(
        None, description="The environment variable that holds the server's key; null means that none is sent."
    )


class EvalModel(Section):
    path: str | None = Field(None, description="A hub id or a folder of a model to compare.")
    answers: str | None = Field(
        None, description="Instead of path, a file of the model's answers: none of its weights are loaded."
    )
    endpoint: EvalEndpoint | None = Field(
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
    benign: PromptSets = Field([], description="The benign requests that measure over-refusal, likewise.")
    before: bool = Field(
        True, description="Whether SET and SPA also answer before tuning; a grid, where that is known, turns it off."
    )
    refusal_words: str = Field("xstest", description="The list of refusal words applied to benign requests.")
    tasks: list[Annotated[Task, BeforeValidator(_task_of_name)]] = Field(
        [], description="Tasks that lm-eval runs; they need the extra eval of this package."
    )
    max_new_tokens: int = Field(256, ge=1, description="The longest answer, in tokens.")
    batch_size: int = Field(8, ge=1, description="How many answers a rank judges or reads at a time.")
    generation_batch_size: Literal["auto"] | BatchNumber | None = Field(None, description=GENERATION_BATCH)


class Config(Section):
    run: Run = Field(description="Where the run writes, and whether it resumes.")
    model: Model = Field(description="The model whose weights are scored or tuned.")
    judge: EsiJudge | None = Field(None, description="The judge whose score ESI differentiates.")
    data: Data = Field(Data(), description="What the model is asked, and the rows of further criteria.")
    esi: Esi = Field(Esi(), description="How scores are estimated.")
    select: Select = Field(Select(), description="Which weights the mask selects.")
    tune: Tune | None = Field(None, description="How SET and SPA tune the model.")
    perturb: Perturb | None = Field(None, description="How much noise the weights of a mask get.")
    eval: Eval | None = Field(None, description="How attack success, over-refusal and skill are measured.")
    deepspeed: str | dict[str, Any] = Field(
        "ds_configs/zero3.json", description="The DeepSpeed config, a file or a mapping; see deepspeed_config.py."
    )


def load_config(path: str, overrides: list[str], deepspeed_config: str | None = None) -> Config:
    """Read a config file, apply ``key.path=value`` overrides and validate the result.

    ``deepspeed_config`` replaces the file's ``deepspeed``. Raises UserError.
    """
    file = Path(path)
    raw = read_yaml(file, "--config", "give a YAML file, such as configs/demo/esi.yaml")
    if not isinstance(raw, dict):
        raise UserError("--config", path, "is not a mapping of sections", "see configs/demo/esi.yaml")
    # A relative path may be meant from the YAML's folder. One in an override is meant from the working directory.
    deepspeed = raw.get("deepspeed")
    if isinstance(deepspeed, str):
        with reading("deepspeed", deepspeed, "give ds_configs/zero3.json or a mapping", "is not the name of a file"):
            if not Path(deepspeed).is_file() and (file.parent / deepspeed).is_file():
                raw["deepspeed"] = str((file.parent / deepspeed).resolve())
    for override in overrides:
        apply_override(raw, override)
    if deepspeed_config is not None:
        raw["deepspeed"] = deepspeed_config
    return validate(raw)


def validate(raw: Any) -> Config:
    """The Config of a plain mapping. Raises UserError for the first mistake."""
    check_numbers(raw, "")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise explain(error, Config) from None
    if isinstance(config.judge, EsiGuard):
        _check_guard(config.judge, "judge")
    if config.eval is not None:
        _check_eval(config.eval, config.run.collective_timeout_s)
    _check_save_every("esi.save_every", config.esi.save_every, "micro-batches")
    if config.tune is not None:
        _check_save_every("tune.save_every", config.tune.save_every, "steps")
    return config


def _check_save_every(field: str, every: Literal["auto"] | int, unit: str) -> None:
    if every != "auto" and every < 1:
        raise UserError(field, every, "must be at least 1", f"give a number of {unit}, or auto")


def _check_guard(guard: GuardModel, field: str) -> None:
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


def _check_eval(section: Eval, collective_timeout_s: int) -> None:
    """Check that names in the tables are unique and that no endpoint keeps the other ranks waiting too long."""
    for number, judge in enumerate(section.judges):
        if isinstance(judge, EvalGuard):
            _check_guard(judge, f"eval.judges.{number}")
        if isinstance(judge, EvalRubric):
            _check_endpoint(judge, f"eval.judges.{number}", collective_timeout_s)
    for number, model in enumerate(section.models):
        check_origin(f"eval.models.{number}", {key: getattr(model, key) for key in ORIGINS}, model.revision)
        if model.endpoint is not None:
            _check_endpoint(model.endpoint, f"eval.models.{number}.endpoint", collective_timeout_s)
    names = [("base", "base"), *((f"eval.models.{n}.name", label(m)) for n, m in enumerate(section.models))]
    check_unique(names)
    check_unique([(f"eval.judges.{n}.name", label(j)) for n, j in enumerate(section.judges)])
    for number, model in enumerate(section.models):
        others = [name for _, name in names if name != label(model)]
        if model.before not in others:
            field = f"eval.models.{number}.before"
            raise UserError(field, model.before, "is not another model's name", f"name one of {others}")


def _check_endpoint(section: EndpointLimits, field: str, collective_timeout_s: int) -> None:
    check_extra(section.extra, f"{field}.extra")
    if ENDPOINT_ROUNDS * section.item_timeout >= collective_timeout_s:
        raise UserError(
            f"{field}.item_timeout",
            section.item_timeout,
            f"times {ENDPOINT_ROUNDS} is not less than run.collective_timeout_s = {collective_timeout_s}, "
            "which is how long the other ranks wait",
            "lower it, or raise run.collective_timeout_s",
        )


def label(section: EvalModel | EvalJudge) -> str:
    """What a model or a judge is called in tables and files."""
    if section.name is not None:
        return section.name
    if isinstance(section, EvalWords):
        return "words"
    if isinstance(section, EvalModel):
        return section.path or section.answers or (section.endpoint.model if section.endpoint else "")
    return section.model if isinstance(section, EvalRubric) else section.path


def resolved_yaml(config: Config) -> str:
    """The whole config as YAML, defaults included; it loads back to an equal config."""
    return dump_yaml(config.model_dump())


def differences(first: Config, second: Config) -> list[str]:
    """Dotted keys whose values differ, except ``OF_THIS_START`` and the keys below them."""
    keys: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in {**a, **b}:
                walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        elif a != b and not path.startswith(OF_THIS_START):
            keys.append(path)

    walk(first.model_dump(), second.model_dump(), "")
    return keys
