"""The YAML of an experiment, strictly typed (docs/design.md §5). Imports no torch: a bad config fails at once.

Every key has one owner and a sentence. An unknown key, a wrong type or a value out of range is a ``UserError`` that
names the key in full.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from esi_ds.core.criteria import objectives
from esi_ds.errors import UserError


class Section(BaseModel):
    """No unknown keys, no silent conversion of one type to another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes, which lm-eval seeds


class Run(Section):
    output_dir: str = Field(description="folder of everything the run writes")
    seed: Seed = Field(0, description="of noise and random orders; nothing else is random")
    resume: Literal["auto", "never"] = Field("auto", description="auto: go on where this folder's run stopped")
    tensorboard: bool = Field(True, description="write TensorBoard files")
    collective_timeout_s: int = Field(1800, gt=0, description="seconds a rank waits for the others before it gives up")
    start_timeout_s: int = Field(600, gt=0, description="the same while the ranks find each other: one may have died")


class Model(Section):
    path: str = Field(description="hub id or folder of a causal language model with safetensors weights")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of the weights while they are used")
    trust_remote_code: bool = Field(False, description="run the model's own code")
    chat_template: str | None = Field(None, description="Jinja text or file instead of the tokenizer's template")
    system_prompt: str | None = Field(None, description="system turn in front of every prompt")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    roles: dict[str, str] = Field({}, description="role of parameters that are not recognised, by name with * in it")


class VerdictWords(Section):
    safe: str = Field(min_length=1, description="the word, with its leading space, that says safe")
    unsafe: str = Field(min_length=1, description="the word that says unsafe")


class JudgeModel(Section):
    """A judge whose weights are loaded."""

    path: str = Field(description="hub id or folder of the judge")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run the judge's own code")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: the model's")
    placement: Literal["auto", "replicated", "sharded"] = Field("auto", description="whole on every rank, or ZeRO-3")


class GuardModel(JudgeModel):
    """A causal guard model and how it is asked."""

    family: Literal["auto", "llama-guard-3", "qwen3guard", "custom"] = Field("auto", description="row of the table")
    template: str | None = Field(None, description="custom: text with {prompt} and {response}")
    verdict_prefix: str = Field("", description="custom: forced behind the text, before the verdict")
    verdict: VerdictWords | None = Field(None, description="custom: the two words")


class EsiGuard(GuardModel):
    kind: Literal["guard"] = Field("guard", description="a causal guard model")
    score: Literal["margin", "logit", "logprob", "prob"] = Field("margin", description="what J is")
    context: Literal["prompt_and_response", "response_only"] = Field(
        "prompt_and_response", description="what the guard reads"
    )


class ClassifierModel(JudgeModel):
    """A sequence classifier and how it is asked."""

    kind: Literal["classifier"] = Field(description="a sequence classifier")
    template: str = Field(description="text with {response} and mostly {prompt}")
    unsafe_labels: list[str | int] | None = Field(None, description="names or numbers; null: all (multi-label only)")
    multi_label: bool | None = Field(None, description="labels by sigmoid; null: as the model's config says")


class EsiClassifier(ClassifierModel):
    score: Literal["margin", "logit", "logprob", "prob"] = Field("margin", description="what J is")


def _as_judge(given: Any) -> Any:
    """A judge that does not say what it is, is a guard."""
    return {"kind": "guard", **given} if isinstance(given, dict) else given


EsiJudge = Annotated[EsiGuard | EsiClassifier, Field(discriminator="kind"), BeforeValidator(_as_judge)]


class Prompts(Section):
    path: str = Field(description="file, hub id or built-in name")
    split: str | None = Field(None, description="split of a hub data set")
    column: str = Field("auto", description="column of the prompts; auto finds the usual ones")
    limit: int | None = Field(None, ge=1, description="take the first so many")


class RowSource(Section):
    path: str = Field(description="file or hub id of rows to learn")
    columns: str = Field("auto", description="question,answer or question,input,answer or messages; auto finds them")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set")
    limit: int | None = Field(None, ge=1, description="take the first so many rows")


class LossData(RowSource):
    max_length: int = Field(1024, ge=2, description="tokens of a row; longer ones are cut at the end")


class Data(Section):
    prompts: Prompts | None = Field(None, description="harmful requests")
    responses: str | None = Field(
        None, description='JSONL {"prompt","response"} used instead of generating; see README for "judge_score"'
    )
    tuning: LossData | None = Field(None, description="criteria tuning_grad, directed, conflict: rows of the loss")
    benign: LossData | None = Field(None, description="select.contrastive: rows whose skill should stay")


class Esi(Section):
    estimator: Literal["soft", "gumbel", "score_function", "paper_code"] = Field(
        "soft", description="see docs/method.md"
    )
    temperature: float = Field(0.3, gt=0, description="of the softmax over the model's logits")
    samples: int = Field(1, ge=1, description="gumbel: noise draws per prompt")
    max_new_tokens: int = Field(256, ge=1, description="length of generated responses")
    batch_size: int = Field(8, ge=1, description="prompts per rank and micro-batch")
    save_scores: bool = Field(True, description="write scores/, 4 bytes a weight")
    on_nonfinite: Literal["skip", "stop"] = Field("skip", description="when a gradient is not finite")
    save_every: Literal["auto"] | int = Field("auto", description="micro-batches between saves; auto: 5 % of the time")
    generation: Literal["auto", "gathered", "per_token"] = Field("auto", description="how responses are generated")
    accumulator_device: Literal["auto", "cpu"] = Field("auto", description="where gradient sums live")


class Select(Section):
    criterion: Literal["esi", "grad", "snip", "tuning_grad", "directed", "conflict", "magnitude", "random"] = Field(
        "esi", description="what is scored"
    )
    contrastive: bool = Field(False, description="divide scores by how much benign rows need the weight")
    order: Literal["top", "bottom", "random"] = Field("top", description="which end of the scores")
    ratio: float = Field(0.01, gt=0, le=1, description="share of the weights")
    of: Literal["all", "scored"] = Field("all", description="which weights the ratio is of")
    scope: Literal["model", "matrix"] = Field("model", description="one ranking, or one per logical matrix")


class BenignMix(Section):
    path: str = Field(description="file or hub id of benign rows")
    columns: str = Field("auto", description="as in tune.data")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set")
    fraction: float = Field(0.0, ge=0, le=1, description="share of benign rows in a batch")


class TuneData(RowSource):
    benign: BenignMix | None = Field(None, description="rows mixed in to hold over-refusal")


class Tune(Section):
    mask: str = Field(description="mask folder")
    data: TuneData = Field(description="what is learnt")
    max_steps: int = Field(100, ge=1, description="optimizer steps")
    lr: float = Field(1e-4, gt=0, description="learning rate")
    scheduler: Literal["constant", "linear", "cosine"] = Field("cosine", description="of the learning rate")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on trained weights only")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="of AdamW"
    )
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    clip: float | None = Field(1.0, gt=0, description="norm of the trained weights' gradient")
    batch_size: int = Field(4, ge=1, description="sequences per rank and micro-batch")
    gradient_accumulation: int = Field(1, ge=1, description="micro-batches a step")
    max_length: int = Field(1024, ge=2, description="tokens of a row; longer ones are cut at the end")
    unscored: Literal["freeze", "train"] = Field("freeze", description="embeddings, norms, biases, routers")
    router: Literal["freeze", "train"] | None = Field(None, description="routers alone; null: as unscored says")
    reduction: Literal["auto", "compact", "scatter"] = Field("auto", description="SET: how gradients reach their rank")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    export: bool = Field(True, description="write model/")
    patch: bool = Field(True, description="write patch/")


class Task(Section):
    name: str = Field(description="gsm8k, ag_news, pubmedqa, medqa, mmlu, examples/benign, lm-eval's name, or a YAML")
    path: str | None = Field(None, description="local file of its rows; null: the hub")
    fewshot_path: str | None = Field(None, description="local file of worked examples, with path")
    limit: int | None = Field(None, ge=1, description="take the first so many rows; of a group: of each member")
    num_fewshot: int | None = Field(None, ge=0, description="worked examples in the prompt; null: as the task says")


def _as_task(given: Any) -> Any:
    """A task may be given by its name alone."""
    return {"name": given} if isinstance(given, str) else given


def _as_numbers(given: Any) -> Any:
    """One number may be written without the list around it."""
    return [given] if isinstance(given, (int, float)) and not isinstance(given, bool) else given


class Perturb(Section):
    mask: str = Field(description="mask folder")
    scores: str | None = Field(None, description="scores the mask was made from; null: scores/ beside the mask")
    orders: list[Literal["top", "random", "bottom"]] = Field(
        ["top", "random", "bottom"], min_length=1, description="which weights are disturbed, k of them in each"
    )
    noise: Annotated[list[Annotated[float, Field(ge=0)]], BeforeValidator(_as_numbers)] = Field(
        [0.38], min_length=1, description="in units of σ; one number, or the points of a curve"
    )
    ratios: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(None, description="k; null: the mask's own")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="of the noise, and of the random weights")


class EvalModelJudge(Section):
    """Of every judge that gives a probability of unsafe."""

    name: str | None = Field(None, description="in the tables; default: the path")
    threshold: float = Field(0.5, gt=0, lt=1, description="unsafe above this probability")
    max_length: int | None = Field(None, ge=1, description="tokens of a text, where the model takes more")


class EvalGuard(GuardModel, EvalModelJudge):
    kind: Literal["guard"] = Field(description="a causal guard model")


class EvalClassifier(ClassifierModel, EvalModelJudge):
    """Unsafe where a label's probability, or the labels' together, is above the threshold."""


class EvalYesNo(JudgeModel, EvalModelJudge):
    kind: Literal["yes_no"] = Field(description="a causal model that answers yes or no, as HarmBench-cls")
    template: str = Field(description="text with {prompt} and {response}")
    unsafe: list[str] = Field(["Yes"], min_length=1, description="words that say that the attack succeeded")
    safe: list[str] = Field(["No"], min_length=1, description="words that say that it failed")
    verdict_prefix: str = Field("", description="forced behind the text, before the word")


# Questions a worker of an endpoint asks between two agreements of the ranks to go on: so long the other ranks wait.
ENDPOINT_ROUNDS = 2


class EvalRubric(Section):
    kind: Literal["rubric"] = Field(description="a model behind OPENAI_BASE_URL, with OPENAI_API_KEY")
    name: str | None = Field(None, description="in the tables; default: the model")
    model: str = Field(description="as the endpoint calls it")
    template: str | None = Field(None, description="rubric with {prompt} and {response}; null: our own")
    threshold: int = Field(5, ge=2, le=5, description="unsafe from this score on")
    prompt_price: float | None = Field(None, ge=0, description="dollars per million tokens read")
    completion_price: float | None = Field(None, ge=0, description="dollars per million tokens written")
    concurrency: int = Field(8, ge=1, description="questions asked at a time")
    request_timeout: float = Field(60.0, gt=0, description="seconds of one attempt")
    item_timeout: float = Field(300.0, gt=0, description="seconds of one question with all its attempts")
    max_attempts: int = Field(5, ge=1, description="of one question")
    max_tokens: int = Field(1024, ge=1, description="length of a reply")
    extra: dict[str, Any] = Field(
        {}, description="keys of the request's body; null takes one out, as temperature or max_tokens"
    )


class EvalWords(Section):
    kind: Literal["words"] = Field(description="refusal words: a cheap extra")
    name: str | None = Field(None, description="in the tables; default: words")
    words: str = Field("jailbreakbench", description="list of refusal words (esi_ds/eval/refusals.py)")


EvalJudge = Annotated[EvalGuard | EvalClassifier | EvalYesNo | EvalRubric | EvalWords, Field(discriminator="kind")]


def _as_list(given: Any) -> Any:
    """One set may be written without the list around it."""
    return [given] if isinstance(given, dict) else given or []


PromptSets = Annotated[list[Prompts], BeforeValidator(_as_list)]


class EvalModel(Section):
    path: str = Field(description="hub id or folder of a model to compare")
    name: str | None = Field(None, description="in the tables; default: the path")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    before: str = Field("base", description="name of the model it is compared with; base is model.path")


class Eval(Section):
    models: list[EvalModel] = Field([], description="evaluated beside model.path, which the tables call base")
    judges: list[EvalJudge] = Field([], description="of attack success; none: refusal words alone")
    prompts: PromptSets = Field([], description="one set of harmful requests, or several")
    benign: PromptSets = Field([], description="one set of benign requests, or several, for over-refusal")
    before: bool = Field(True, description="SET and SPA answer before tuning too; off in grids, where it is known")
    refusal_words: str = Field("xstest", description="list by which refusals of benign requests are found")
    tasks: list[Annotated[Task, BeforeValidator(_as_task)]] = Field([], description="run by lm-eval (extra eval)")
    max_new_tokens: int = Field(256, ge=1, description="length of answers")
    batch_size: int = Field(8, ge=1, description="prompts per rank and micro-batch")


class Config(Section):
    run: Run = Field(description="where the run writes, and whether it goes on")
    model: Model = Field(description="the model whose weights are scored or tuned")
    judge: EsiJudge | None = Field(None, description="what tells safe answers from unsafe ones")
    data: Data = Field(Data(), description="what the model is asked")
    esi: Esi = Field(Esi(), description="how scores are estimated")
    select: Select = Field(Select(), description="which weights go into the mask")
    tune: Tune | None = Field(None, description="SET and SPA")
    perturb: Perturb | None = Field(None, description="noise on the weights of a mask")
    eval: Eval | None = Field(None, description="attack success, over-refusal, tasks")
    deepspeed: str | dict[str, Any] = Field(
        "ds_configs/zero3.json", description="ZeRO mechanics: a file or a mapping; see deepspeed_config.py"
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; everybody means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def load_config(path: str, overrides: list[str], deepspeed_config: str | None = None) -> Config:
    """A config file with ``key.path=value`` overrides; ``deepspeed_config`` replaces its ``deepspeed``."""
    file = Path(path)
    if not file.is_file():
        raise UserError("--config", path, "there is no such file", "give a YAML file")
    try:
        raw = parse_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError("--config", path, f"is no UTF-8 text: {error}", "give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(
            "--config", path, f"is no valid YAML: {' '.join(str(error).split())}", "fix that line"
        ) from error
    if not isinstance(raw, dict):
        raise UserError("--config", path, "holds no mapping of sections", "see configs/demo/esi.yaml")
    # A file beside the YAML may be meant. Overrides come after this: they are written where the command is given.
    given = raw.get("deepspeed")
    if isinstance(given, str) and not Path(given).is_file() and (file.parent / given).is_file():
        raw["deepspeed"] = str((file.parent / given).resolve())
    for override in overrides:
        _apply(raw, override)
    if deepspeed_config is not None:
        raw["deepspeed"] = deepspeed_config
    return validate(raw)


def _apply(raw: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError("override", override, "is not key.path=value", "write for instance select.ratio=0.05")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(key, text, "is no valid YAML value", "quote it") from error
    place: Any = raw
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        index: str | int = part
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise UserError(key, text, f"{part} is no number of the list before it", "count from 0")
            index = int(part)
        elif not isinstance(place, dict):
            raise UserError(key, text, f"what stands before {part} is no section", "give a key.path of the config")
        if following is None:
            place[index] = value
        else:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[index]


def validate(raw: dict) -> Config:
    """A Config of a plain mapping. Raises UserError for the first thing that is wrong."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error) from None
    if isinstance(config.judge, EsiGuard):
        _check_guard(config.judge, "judge")
    if config.eval is not None:
        _check_eval(config.eval, config.run.collective_timeout_s)
    every = config.esi.save_every
    if every != "auto" and every < 1:
        raise UserError("esi.save_every", every, "must be at least 1", "give a number of micro-batches, or auto")
    return config


def _explain(error: ValidationError) -> UserError:
    """The first problem, unknown keys before all else: a misspelt key is often why another one is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    path, section = _follow(problem["loc"])
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.0)
        return UserError(key, None, "is an unknown key", f"the nearest known one is {'.'.join([*path[:-1], near[0]])}")
    if problem["type"] == "missing":
        return UserError(key, None, "is missing", "set it in the config or as key.path=value")
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = problem.get("ctx", {}).get("expected_tags", "guard, classifier, yes_no, rubric, words")
        return UserError(f"{key}.kind", None, "is missing or unknown", f"name one of {kinds}")
    given = problem["input"]
    if problem["type"] in ("model_type", "model_attributes_type"):
        return UserError(key, repr(given), "must be a section of keys", "write its keys, or leave it out")
    # A union complains once for each of its members.
    same = [other for other in problems if other["loc"][: len(path)] == problem["loc"][: len(path)]]
    message = " or ".join(dict.fromkeys(other["msg"][0].lower() + other["msg"][1:] for other in same))
    return UserError(key, repr(given) if isinstance(given, str) else given, message, "see the keys in the README")


def _follow(location: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The keys of a pydantic location, and the innermost section it lies in. Pydantic also names the member of a
    union that it tried (a type, or the ``kind`` of a judge): no keys of ours."""
    section: type[BaseModel] = Config
    choices: list[type[BaseModel]] = []
    path: list[str] = []
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif part in section.model_fields and not choices:
            path.append(part)
            choices = _sections(section.model_fields[part].annotation)
        elif choices and (kind := [c for c in choices if part in typing.get_args(c.model_fields["kind"].annotation)]):
            choices = kind
        elif not _is_type_name(part):
            path.append(part)
        if len(choices) == 1:
            section, choices = choices[0], []
    return path, section


def _is_type_name(part: str) -> bool:
    return part in ("str", "int", "float", "bool") or part.startswith(("literal[", "dict[", "list["))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a key may hold: its own type, members of a union, elements of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _sections(argument)]


def _check_guard(guard: GuardModel, field: str) -> None:
    """Keys that belong together; ``field`` is the section's place in the config."""
    if guard.family != "custom":
        for key in ("template", "verdict", "verdict_prefix"):
            if getattr(guard, key):
                raise UserError(
                    f"{field}.{key}",
                    guard.verdict_prefix or None,
                    f"belongs to family custom, not {guard.family}",
                    f"set {field}.family: custom, or leave it out",
                )
        return
    for key in ("template", "verdict"):
        if getattr(guard, key) is None:
            raise UserError(f"{field}.{key}", None, "is missing", "family custom needs template and verdict")
    if guard.template.count("{response}") != 1:
        raise UserError(f"{field}.template", guard.template, "must hold {response} exactly once", "write it in")
    if getattr(guard, "context", None) != "response_only" and "{prompt}" not in guard.template:
        raise UserError(f"{field}.template", guard.template, "holds no {prompt}", "write it in")
    if guard.verdict.safe == guard.verdict.unsafe:
        raise UserError(f"{field}.verdict", guard.verdict.safe, "says the same for safe and unsafe", "give two words")


def _check_eval(section: Eval, patience: int) -> None:
    """Names in the tables are told apart, and no endpoint outlasts the other ranks' ``patience``, in seconds."""
    for number, judge in enumerate(section.judges):
        if isinstance(judge, EvalGuard):
            _check_guard(judge, f"eval.judges.{number}")
        if isinstance(judge, EvalRubric) and ENDPOINT_ROUNDS * judge.item_timeout >= patience:
            raise UserError(
                f"eval.judges.{number}.item_timeout",
                judge.item_timeout,
                f"times {ENDPOINT_ROUNDS} is no less than run.collective_timeout_s = {patience}, for which ranks wait",
                "lower it, or raise run.collective_timeout_s",
            )
    names = [("base", "base"), *((f"eval.models.{n}.name", label(m)) for n, m in enumerate(section.models))]
    _check_unique(names)
    _check_unique([(f"eval.judges.{n}.name", label(j)) for n, j in enumerate(section.judges)])
    for number, model in enumerate(section.models):
        others = [name for _, name in names if name != label(model)]
        if model.before not in others:
            raise UserError(
                f"eval.models.{number}.before", model.before, "is no other model's name", f"name one of {others}"
            )


def _check_unique(names: list[tuple[str, str]]) -> None:
    """(field, name) pairs of one table."""
    seen: set[str] = set()
    for field, name in names:
        if name in seen:
            raise UserError(field, name, "names two of them", "give another name")
        seen.add(name)


def label(section: EvalModel | EvalJudge) -> str:
    """What a model or a judge is called in tables and files."""
    if section.name is not None:
        return section.name
    if isinstance(section, EvalWords):
        return "words"
    return section.model if isinstance(section, EvalRubric) else section.path


def require_esi(config: Config) -> None:
    """What the ESI stage cannot do without, and rows that nothing would read."""
    criterion = config.select.criterion
    needed = objectives(criterion, config.select.contrastive)
    if "safety" in needed:
        if config.judge is None and not scores_given(config):
            remedy = f"criterion {criterion} needs a judge.path"
            if config.esi.estimator == "score_function":
                remedy += ', or a number "judge_score" in every row of data.responses'
            raise UserError("judge", None, "is missing", remedy)
        if config.data.prompts is None and config.data.responses is None:
            raise UserError("data.prompts", None, "is missing", "give data.prompts.path, or data.responses")
    for name, user, remedy in (
        ("tuning", f"criterion {criterion}", "set select.criterion to tuning_grad, directed or conflict"),
        ("benign", "select.contrastive", "set select.contrastive: true"),
    ):
        given = getattr(config.data, name)
        if given is None and name in needed:
            raise UserError(f"data.{name}", None, "is missing", f"{user} needs a data.{name}.path")
        if given is not None and name not in needed:
            raise UserError(f"data.{name}.path", given.path, "is read by nothing", f"{remedy}, or leave it out")


def scores_given(config: Config) -> bool:
    """Whether the judge's scores are read with the responses, and no judge is asked."""
    return config.judge is None and config.esi.estimator == "score_function" and config.data.responses is not None


def require_tune(config: Config) -> Tune:
    """The ``tune`` section, without which SET and SPA cannot run. Raises UserError."""
    if config.tune is None:
        raise UserError("tune", None, "is missing", "give tune.mask and tune.data.path")
    benign = config.tune.data.benign
    if benign is not None and benign.fraction == 1:
        raise UserError("tune.data.benign.fraction", 1.0, "leaves nothing of tune.data", "give a smaller share")
    return config.tune


def resolved_yaml(config: Config) -> str:
    """The whole config, defaults included; loads back to the same."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def require_eval(config: Config) -> Eval:
    """The ``eval`` section, without which an evaluation cannot run. Raises UserError where it names no prompts."""
    section = config.eval
    if section is None or not (section.prompts or section.benign or section.tasks):
        raise UserError("eval", None, "asks nothing", "give eval.prompts.path, eval.benign.path or eval.tasks")
    return section


def require_perturb(config: Config) -> Perturb:
    """The ``perturb`` section, without which a perturbation cannot run. Raises UserError."""
    if config.perturb is None:
        raise UserError("perturb", None, "is missing", "give perturb.mask")
    return config.perturb


# How a run is gone on with, not what it makes: may differ from one start to the next.
# ZeRO's mechanics, expert parallelism among them, may have to, where the next start has other nodes.
OF_THIS_START = ("run.resume", "run.collective_timeout_s", "run.start_timeout_s", "deepspeed")


def differences(first: Config, second: Config) -> list[str]:
    """Dotted keys that differ; those of ``OF_THIS_START`` and below them do not count."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in {**a, **b}:
                walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        elif a != b and not path.startswith(OF_THIS_START):
            found.append(path)

    walk(first.model_dump(), second.model_dump(), "")
    return found
