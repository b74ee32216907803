"""What each stage needs of the config: sections that must be there, and data that would never be read."""

from __future__ import annotations

import math

from esi_ds.config import Config, Eval, LossData, Perturb, Tune
from esi_ds.config.scoring import Esi
from esi_ds.config.tuning import benign_among
from esi_ds.core.criteria import GRADIENTS
from esi_ds.errors import UserError
from esi_ds.words import counted

_OF_ANSWERS = ("models", "judges", "refusal_words", "tasks")
# Keys of ``eval`` that ask for what a stage does not do.
UNREAD_OF_EVAL = {"esi": ("prompts", "divergence", *_OF_ANSWERS), "set": _OF_ANSWERS, "spa": _OF_ANSWERS}


def require_esi(config: Config) -> None:
    """Raise UserError where a section that the criterion needs is missing, or where rows would never be read."""
    criteria = config.select.criteria
    needed = config.objectives
    _check_estimator(config.esi)
    users = {objective: criterion for criterion in reversed(criteria) for objective in GRADIENTS[criterion]}
    if "safety" in needed:
        if config.judge is None and not scores_given(config):
            remedy = f"criterion {users['safety']} needs a judge.path"
            if config.esi.estimator == "score_function":
                remedy += ', or a number "judge_score" in every row of the file data.responses'
            raise UserError("judge", None, "is missing", remedy)
        if config.data.prompts is None and not isinstance(config.data.responses, str):
            remedy = "give data.prompts.path, or a file data.responses"
            raise UserError("data.prompts", None, "is missing", remedy)
    if "control" in needed:
        _check_control(config, users.get("control"))
    if config.scores_responses:
        _check_trace(config)
    for name, user, remedy in (
        (
            "tuning",
            f"criterion {users.get('tuning')}",
            "set select.criterion to tuning_grad, directed, conflict or exclusive",
        ),
        ("benign", "select.contrastive", "set select.contrastive: true"),
    ):
        rows: LossData | None = getattr(config.data, name)
        if rows is None and name in needed:
            raise UserError(f"data.{name}", None, "is missing", f"{user} needs a data.{name}.path")
        if rows is not None and name not in needed:
            raise UserError(f"data.{name}.path", rows.path, "would never be read", f"{remedy}, or leave it out")


def _check_estimator(section: Esi) -> None:
    """Raise UserError for a value that the estimator does not read. Stored configs of earlier versions may have one."""
    estimator = section.estimator
    if section.samples > 1 and estimator != "gumbel":
        problem = f"changes nothing with esi.estimator = {estimator}, which draws no noise"
        raise UserError("esi.samples", section.samples, problem, "set esi.estimator: gumbel, or leave it out")
    if section.temperature != Esi.model_fields["temperature"].default and estimator not in ("soft", "gumbel"):
        problem = f"changes nothing with esi.estimator = {estimator}"
        raise UserError("esi.temperature", section.temperature, problem, "leave it out")


def _check_control(config: Config, user: str | None) -> None:
    """Raise UserError where a control is missing, or the judge that its prompts need. user: a criterion with one."""
    if config.control is None:
        remedy = f"criterion {user} needs a control.prompts.path or control.rows.path"
        raise UserError("control", None, "is missing", remedy)
    if config.control.prompts is not None and config.judge is None:
        raise UserError("judge", None, "is missing", "control.prompts needs a judge.path; control.rows needs none")


def _check_trace(config: Config) -> None:
    """Raise UserError where no gradient would reach what the judge reads, or none that is asked for."""
    reads = config.judge.reads if config.judge is not None else "answer"
    if reads == "trace" and not config.esi.trace_gradient:
        problem = "leaves no token with a gradient: thoughts get one only if esi.trace_gradient says so"
        raise UserError("judge.reads", reads, problem, "set esi.trace_gradient: true, or read both")
    if reads == "answer" and config.esi.trace_gradient and config.esi.estimator != "score_function":
        problem = f"changes nothing: estimator {config.esi.estimator} differentiates what the judge reads, the answer"
        raise UserError("esi.trace_gradient", True, problem, "set judge.reads: both, or leave it out")


def scores_given(config: Config) -> bool:
    """Whether the judge's scores come with the responses, so that no judge is loaded."""
    is_file = isinstance(config.data.responses, str)
    return config.judge is None and config.esi.estimator == "score_function" and is_file


def require_tune(config: Config) -> Tune:
    """The ``tune`` section, without which SET and SPA cannot run. Raises UserError."""
    if config.tune is None:
        raise UserError("tune", None, "is missing", "give tune.mask and tune.data.path")
    if config.eval is not None and config.eval.temperature > 0:
        problem = "would sample answers, and those before and after tuning are greedy"
        remedy = (
            "set eval.temperature=0 and eval.samples=1 for this stage, and sample in an evaluation of the tuned model"
        )
        raise UserError("eval.temperature", config.eval.temperature, problem, remedy)
    if config.eval is not None and config.eval.divergence:
        raise UserError(
            "eval.divergence", True, "is for launch/eval.py only", "leave it out, and evaluate the tuned model"
        )
    benign = config.tune.data.benign
    if benign is not None and benign.fraction == 1:
        problem = "leaves no room for rows of tune.data"
        raise UserError("tune.data.benign.fraction", 1.0, problem, "give a smaller share")
    return config.tune


def unread_of_eval(config: Config, stage: str) -> list[str]:
    """A line that names what ``eval`` asks for and this stage does not do, since one YAML may serve several stages;
    none if there is nothing to name."""
    section, unread = config.eval, UNREAD_OF_EVAL.get(stage, ())
    names = [f"eval.{key}" for key in unread if section and getattr(section, key) != getattr(Eval(), key)]
    return [f"{', '.join(names)}: read by launch/eval.py, not by {stage.upper()}"] if names else []


def unread_benign(tune: Tune) -> list[str]:
    """A line that benign rows are named and not read; none where they are read, or not named."""
    benign = tune.data.benign
    return ["tune.data.benign is not read: its fraction is 0"] if benign is not None and not benign.fraction else []


def check_mix(tune: Tune, num_ranks: int) -> None:
    """Raise UserError where benign rows are asked for and none would be read, as ``DataOrder`` spreads them."""
    benign, step_rows = tune.data.benign, tune.step_rows(num_ranks)
    num_rows = tune.max_steps * step_rows
    if benign is None or benign.fraction == 0 or benign_among(num_rows, benign.fraction) > 0:
        return
    steps = math.ceil(1 / (benign.fraction * step_rows))
    remedy = f"take {steps:,} steps or more"
    if num_rows > 1:
        remedy = f"give {math.ceil(1e6 / num_rows) / 1e6:g} or more, or {remedy}"
    problem = f"mixes no benign row into the {counted(num_rows, 'row')} of {counted(tune.max_steps, 'step')}"
    raise UserError("tune.data.benign.fraction", benign.fraction, problem, remedy)


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
