"""``--dry-run`` of SET and SPA: what they would do, even before weights, mask or rows exist."""

from __future__ import annotations

from pathlib import Path

from esi_ds.config import Config, Tune, resolved_yaml
from esi_ds.config.needs import check_mix, require_tune, unread_benign, unread_of_eval
from esi_ds.config.tuning import benign_among
from esi_ds.core.footprint import WEIGHT_BYTES
from esi_ds.core.mask import NO_MASK, num_bytes
from esi_ds.core.select import model_k
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.data.prompts import question_sections
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.models.folder import ModelSource, dequantised, load_model_config
from esi_ds.models.meta import meta_parameters
from esi_ds.options import Options
from esi_ds.report.contents import Facts
from esi_ds.stages.plan.batches import answer_rows
from esi_ds.stages.plan.footprints import footprint
from esi_ds.stages.plan.memory import (
    GIB,
    checkpoint_on_disk,
    describe_work,
    expected_trained,
    human_bytes,
    is_compact,
    known_trained,
    print_bytes,
    topology,
)
from esi_ds.stages.plan.notes import count_prompts, count_rows, missing_files
from esi_ds.stages.plan.stages import print_facts, print_notes
from esi_ds.stages.tune.prepare import check_routers, describe_trained, open_mask, prepare_tuning

Counts = dict[str, dict[str, int]]  # stage → parameter → weights that get a gradient


def print_tuning_plan(config: Config, options: Options, stage: str) -> None:
    """The resolved config, then the plan. Loads no weights.

    Raises UserError for whatever is wrong. What does not exist yet is noted, and the plan does without it: the weights
    of the mask are assumed to be spread evenly, and rows are counted but not read.
    """
    tune = require_tune(config)
    source, ranks = ModelSource.of(config.model), topology(options).ranks
    check_mix(tune, ranks)
    settings = resolve_deepspeed(config, ranks, stage)
    model_config = load_model_config(source)
    parameters = meta_parameters(model_config, source, config.model.roles, config.model.dtype)
    check_routers(tune, parameters)
    notes = _missing_files(config, tune)
    num_rows = count_rows(tune.data, "tune.data", notes)
    num_benign = _count_benign(tune, notes)
    _note_unreachable(config, notes)
    rows = "not known" if num_rows is None else f"{num_rows:,}, counted only"
    trained: Trained | None = None
    if not notes:
        inputs = prepare_tuning(config, stage)
        trained, num_rows = inputs.trained, len(inputs.rows.sequences)
        num_benign = len(inputs.benign.sequences) if inputs.benign is not None else None
        rows = f"{num_rows:,} ({inputs.rows.columns}), {len(inputs.rows.skipped)} skipped"
    elif tune.mask == NO_MASK or Path(tune.mask).exists():
        mask = open_mask(config.model, tune, stage, model_config)
        trained = describe_trained(config.model, tune, stage, mask, model_config)
    counts = known_trained(trained, parameters) if trained else expected_trained(config, parameters)
    print(resolved_yaml(config))
    facts = _weight_facts(config, stage, parameters, trained, counts) | {"ranks": ranks, "rows": rows}
    facts |= {"steps": _steps(tune, ranks, num_rows, num_benign)}
    work = describe_work(config, stage, model_config, parameters, counts, ranks)
    if config.eval is not None and (config.eval.prompts or config.eval.benign):
        held = footprint(work, stage, topology(options), settings).resident
        gpu, beside = options.gpu_memory_gib * GIB, held.total - held.weights
        answered = answer_rows(config, parameters, model_config, ranks, settings, gpu, beside)
        facts |= {"answered at a time": str(answered)}
    print_facts(facts)
    print_notes([*notes, *unread_benign(tune), *unread_of_eval(config, stage), *dequantised([source])])
    print_bytes(config, options, stage, work, model_config)


def _missing_files(config: Config, tune: Tune) -> list[str]:
    """Notes on files of the model and on the mask, where an earlier run or a download has yet to produce them."""
    path = config.model.path
    notes = missing_files("model.path", path) if Path(path).is_dir() else []
    if tune.mask != NO_MASK and not Path(tune.mask).exists():
        assumed = f"select.ratio = {config.select.ratio:g} of the weights is assumed, spread evenly"
        notes.append(f"tune.mask = {tune.mask}: does not exist; {assumed}")
    return notes


def _count_benign(tune: Tune, notes: list[str]) -> int | None:
    """Rows to mix in, likewise counted only; None where there are none, or a note says that they cannot be reached."""
    benign = tune.data.benign
    return None if benign is None or benign.fraction == 0 else count_rows(benign, "tune.data.benign", notes)


def _note_unreachable(config: Config, notes: list[str]) -> None:
    """Check the prompts to answer before and after; note those that cannot be reached."""
    if config.eval is not None:
        for field, kind, _, section in question_sections(config.eval):
            count_prompts(section, field, notes, kind)


def _weight_facts(
    config: Config, stage: str, parameters: tuple[Parameter, ...], trained: Trained | None, counts: Counts
) -> Facts:
    """The mask and how much would train. trained: None where the mask does not exist yet."""
    by_parameter = counts[stage]
    total = sum(by_parameter.values())
    if trained is None:
        ratio = config.select.ratio
        mask = f"{model_k(parameters, ratio, config.select.of):,} weights, expected at a ratio of {ratio:g}"
    else:
        mask = f"{trained.mask.k:,} weights by {trained.mask.header.criterion}"
    facts: Facts = {
        "weights": f"{sum(parameter.numel for parameter in parameters):,}",
        "mask": mask,
        "trained weights": f"{total:,} in {sum(count > 0 for count in by_parameter.values())} parameters",
    }
    if stage == "set":
        compact, scatter = "compact: one all-reduce a step", "scatter: reduce-scatter in the hooks"
        facts["gradients"] = compact if is_compact(config, total) else scatter
    # SPA's engine has masters and moments of whole parameters; SET of the trained weights.
    num_stored = total if stage == "set" else sum(p.numel for p in parameters if by_parameter.get(p.name))
    facts["checkpoint on disk"] = checkpoint_on_disk(12 * num_stored, 12 * num_stored)  # each in fp32
    tune, weight = require_tune(config), WEIGHT_BYTES[config.model.dtype]
    if tune.export:
        facts["model on disk"] = human_bytes(weight * sum(parameter.numel for parameter in parameters))
    if tune.patch:  # a bit a weight, and the old and the new value of those that have changed
        bits = sum(num_bytes(p.numel) for p in parameters if by_parameter.get(p.name))
        facts["patch on disk"] = f"{human_bytes(bits + 2 * weight * total)} at most"
    return facts


def _steps(tune: Tune, ranks: int, num_rows: int | None, num_benign: int | None) -> str:
    """Steps, rows per step, and epochs of the rows and of those mixed in, where their number is known."""
    stride = tune.step_rows(ranks)
    taken, mix = tune.max_steps * stride, tune.data.benign
    benign = benign_among(taken, mix.fraction) if mix is not None else 0
    epochs = []
    if num_rows is not None:
        epochs.append(f"{(taken - benign) / num_rows:.2f} epochs")
    if num_benign is not None:
        epochs.append(f"{benign / num_benign:.2f} epochs of the benign rows")
    return f"{tune.max_steps:,} of {stride} rows" + (f" ({', '.join(epochs)})" if epochs else "")
