"""The first lines of every page: its numbers in the words of somebody who has read it. Pure functions of reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Literal

from esi_ds.core.mask import Mask
from esi_ds.core.trained import Trained
from esi_ds.eval.rows import MeasureRow
from esi_ds.report import location
from esi_ds.report.contents import (
    CurveRow,
    EsiReport,
    EvaluationReport,
    Facts,
    MaskReport,
    PerturbationReport,
    RefusalRow,
    Report,
    SelectionFacts,
    TuningReport,
)
from esi_ds.report.evaluation import is_share, p_value, percent, question_of
from esi_ds.report.heat_tables import MORE_THAN
from esi_ds.report.location import Region
from esi_ds.report.overview import FinishedRun
from esi_ds.report.publish import RESPONSE_FACTS
from esi_ds.report.tuning import num_answers
from esi_ds.words import counted

LEAST_SHARE = 0.01  # of a mask: parts that hold less are too small to be spoken of
ALIKE = 1.25  # a share less than this times the control's, or the other way round, is called alike
MANY_INCOHERENT = 0.05  # of the answers: worth a word beside attack success
CHANCE = 0.05  # p-values above it
NOISE_MEASURES = {"attack_success": "attack success on", "refused": "refusal of"}  # the first that was measured
UNSCORED = "all weights that have no score, such as embeddings and norms"
AS_MASKED, OVERRULED = "as the mask says", ", also where the mask names them"
SAME_BITS = "the base model’s, bit for bit"
MAX_MODELS = 4
MAX_MASKS = 3


def esi(report: EsiReport, masks: Sequence[MaskReport]) -> list[str]:
    """Where each mask lies, what of it is this objective's own, and how the responses were."""
    lines = []
    for mask in masks:
        name = "The mask" if len(masks) == 1 else f"The mask by {mask['selection']['criterion']}"
        lines.append(" ".join(where(mask, name)))
    unsafe, refused = (report["facts"].get(name) for name in RESPONSE_FACTS)
    if report["judge_scores"]:
        words = [f"the judge calls {unsafe.partition(' (')[0]} unsafe"] if unsafe else []
        words += [f"{refused.partition(' (')[0]} contain words of refusal"] if refused else []
        if words:
            lines.append(f"Of the {counted(len(report['judge_scores']), 'response')}, {' and '.join(words)}.")
    return lines


def where(mask: MaskReport, name: str) -> list[str]:
    """Sentences about where one mask lies. name: of the mask, as a sentence begins."""
    selection, units = mask["selection"], mask["units"]
    if not location.whole_of(units).selected:
        return [f"{name} is empty."]
    share = _whole(selection["k"] / selection["total_numel"])
    parts = [(part, at) for part, at in location.by_part(units) if at.share >= LEAST_SHARE]
    parts.sort(key=lambda item: -item[1].share)
    held = [
        f"{part}, with {_whole(at.weights)}{'' if index else ' of the scored weights'}, "
        f"{'holds' if part == 'attention' else 'hold'} {_whole(at.share)}{'' if index else ' of it'}"
        for index, (part, at) in enumerate(parts)
    ]
    lines = [f"{name} is {share} of the weights.", f"{_begin('; '.join(held))}."]
    if not _follows_scores(selection):
        return [*lines, "Where it lies follows from the way of selecting, not from the scores."]
    regions = location.regions(units)
    densest = _densest(regions)
    times, controls = densest.at.times_chance, densest.at.control_times_chance
    if not location.has_control(units) or selection["order"] != "top":
        return [*lines, f"By thirds of the depth, it is densest in {densest} ({times:.1f} times chance)."]
    # The control is |g|·σ: beside another score its masks differ by the criterion too, not by the objective alone.
    own = "objective" if location.is_papers(selection) else "criterion"
    return [
        *lines,
        f"By thirds of the depth, it is densest in {densest} ({times:.1f} times chance). The control’s mask has "
        f"{controls:.1f} times chance there, {_verdict(densest, own)}.",
        _most_above_control(regions, own),
    ]


def _follows_scores(selection: SelectionFacts) -> bool:
    """Whether the scores decide how much of the mask lies where."""
    return selection["scope"] == "model" and selection["order"] != "random"


def _densest(regions: Sequence[Region]) -> Region:
    large = [region for region in regions if region.at.share >= LEAST_SHARE] or regions
    return max(large, key=lambda region: region.at.times_chance)


def _verdict(region: Region, own: str) -> str:
    """Whether the objective puts more weights there than its control. own: objective or criterion."""
    ratio = region.at.share_to_control
    if ratio > ALIKE:
        return f"which is less, so part of this is specific to the {own}"
    return f"about as much, so this is not specific to the {own}" if ratio >= 1 / ALIKE else "which is even more"


def _most_above_control(regions: Sequence[Region], own: str) -> str:
    most = max(
        (region for region in regions if max(region.at.share, region.at.control_share) >= LEAST_SHARE),
        key=lambda region: region.at.share_to_control,
    )
    ratio = most.at.share_to_control
    if ratio <= ALIKE:
        much = f"at most {ratio:.2f} times as much, in {most}"
        return f"No part has much more of this mask than of the control’s: {much}."
    times = f"{ratio:.1f}" if ratio <= MORE_THAN else f"more than {MORE_THAN:,}"
    much = "where the control’s holds nothing" if math.isinf(ratio) else f"{times} times the control’s share"
    return f"What is specific to the {own} is above all {most}: {_whole(most.at.share)} of the mask, {much}."


def tuning(report: TuningReport) -> list[str]:
    """What was trained, how the loss went, and refusals before and after."""
    method, share = report["method"].upper(), 100 * report["trained"] / max(report["total_numel"], 1)
    trained = f"{method} trained {share:.3g} % of the weights for {counted(report['steps'], 'step')}"
    losses = [row["loss"] for row in report["progress"] if row.get("loss") is not None]
    if len(losses) > 1:
        first, last = f"{losses[0]:.3g}", f"{losses[-1]:.3g}"
        verb = "fell" if losses[-1] < losses[0] else "rose"
        change = f"stayed at {first}" if first == last else f"{verb} from {first} to {last}"
        trained += f"; the loss of a batch {change}"
    refusals = [line for row in report["refusals"] if (line := _refusals(row))]
    return [f"{trained}.", *([f"The tuned model refuses {listed(refusals)}."] if refusals else [])]


def routers_fate(trained: Trained) -> str:
    """What became of routers: freeze or train, which may overrule the mask, or what the mask says of those it names."""
    fate = trained.router or trained.unscored
    if not trained.masked_routers:
        return fate
    return AS_MASKED if trained.router is None else f"{fate}{OVERRULED}"


def mask_bits(mask: Mask) -> Facts:
    """The row of a table that names a mask's bits; none for a mask of an earlier version."""
    return {} if mask.bits_sha256 is None else {"mask bits": f"sha256 {mask.bits_sha256}"}


def what_was_trained(
    method: str,
    is_baseline: bool,
    unscored: str,
    routers: str,
    rounded_to: str | None = None,
    has_towers: bool = False,
) -> str:
    """Which weights were trained and which are the base model's.

    method: set or spa. is_baseline: SPA without a mask. unscored: freeze or train. routers: of ``routers_fate``.
    rounded_to: ``model.dtype`` where the base is stored in a finer one. has_towers: whether the model has encoders of
    images or sound, which are always frozen.
    """
    same = SAME_BITS if rounded_to is None else f"the base model’s, rounded to {rounded_to}"
    fate = unscored if routers == AS_MASKED else routers.removesuffix(OVERRULED)
    exceptions = ["routers"] if fate != unscored else []
    if has_towers and unscored == "train":
        exceptions.append("encoders of images and sound")
    kinds = {"freeze": "", "train": ""}  # of weights without a score, by what became of them
    kinds[unscored] = UNSCORED
    if exceptions:
        others = "train" if unscored == "freeze" else "freeze"
        kinds[others] = " and ".join(exceptions)
        kinds[unscored] = f"all weights that have no score, except {kinds[others]}"
    sentence = _trained_kinds(method, is_baseline, kinds, same)
    if routers.endswith(OVERRULED):
        sentence += f" Routers were {'frozen' if fate == 'freeze' else 'trained'}, including those that the mask names."
    return sentence


def _trained_kinds(method: str, is_baseline: bool, kinds: dict[str, str], same: str) -> str:
    """The sentence. kinds: weights without a score, by what became of them. same: what frozen weights are."""
    if method == "set":
        if not kinds["train"]:
            return f"Only the mask’s weights were trained; every other weight is {same}."
        return f"The mask’s weights were trained, and so were {kinds['train']}; every other weight is {same}."
    if is_baseline:
        if not kinds["freeze"]:
            return "No weight was frozen: a baseline of SPA."
        frozen = f"{_begin(kinds['freeze'])}{',' * (',' in kinds['freeze'])} were frozen and are {same}."
        return f"No weight that has a score was frozen: a baseline of SPA. {frozen}"
    if not kinds["freeze"]:
        return f"The mask’s weights were frozen and are {same}; all others were trained."
    return f"The mask’s weights were frozen, and so were {kinds['freeze']}; they are {same}. All others were trained."


def _refusals(row: RefusalRow) -> str:
    """Empty where no answer is finished."""
    (num_before, num_after), after = num_answers(row), row["refused_after"]
    if after is None or not num_after:
        return ""
    of_other = "" if num_before == num_after else f" of {num_before}"
    earlier = f" ({row['refused_before']}{of_other} before tuning)" if num_before else ""
    if num_after == row["n"]:
        return f"{after} of {row['n']} {row['set']} prompts{earlier}"
    return f"{after} of the {num_after} {row['set']} prompts whose answer is finished{earlier}"


def evaluation(report: EvaluationReport) -> list[str]:
    """Attack success and over-refusal of every model, or else its skill, against the one it is compared with."""
    attack, refusal = (_first(report, name) for name in ("attack_success", "refused"))
    skill = _first(report, "task", only_shares=True) if attack is refusal is None else None
    lines = []
    for model in report["models"]:
        parts = [
            words
            for first, say in (
                (attack, _attack_success),
                (refusal, partial(_change, name="refusal of benign prompts")),
                (skill, partial(_change, name="skill")),
            )
            if first is not None and (words := say(report, first, model["name"], model["before"]))
        ]
        if parts and (model["before"] or len(report["models"]) == 1):
            lines.append(f"{model['name']}: {'; '.join(parts)}.")
    more = len(lines) - MAX_MODELS
    others = f"{more} more model{'s are' if more > 1 else ' is'} in the tables."
    return [*lines[:MAX_MODELS], *([others] if more > 0 else [])]


def _first(report: EvaluationReport, measure: str, only_shares: bool = False) -> MeasureRow | None:
    """The first row of a measure, whose set and judge all models are compared by. only_shares: whose rates all are
    between 0 and 1, as a perplexity is not."""
    rows = [row for row in report["measures"] if row["measure"] == measure]
    others = {(row["set"], row["judge"]) for row in rows if only_shares and not is_share(row)}
    return next((row for row in rows if (row["set"], row["judge"]) not in others), None)


def _rate(report: EvaluationReport, like: MeasureRow, model: str | None, measure: str | None = None) -> float | None:
    """The rate of another model, or of another measure whoever judges, on the same set."""
    for row in report["measures"]:
        same_judge = measure is not None or row["judge"] == like["judge"]
        if (row["measure"], row["set"], row["model"]) == (
            measure or like["measure"],
            like["set"],
            model,
        ) and same_judge:
            return row["rate"]
    return None


def _attack_success(report: EvaluationReport, like: MeasureRow, model: str, before: str | None) -> str:
    words = _change(report, like, model, before, "attack success")
    incoherent = _rate(report, like, model, "incoherent")
    if words and incoherent is not None and incoherent >= MANY_INCOHERENT:
        words += f", where {percent(incoherent)} of its answers are incoherent"
    return words


def _change(report: EvaluationReport, like: MeasureRow, model: str, before: str | None, name: str) -> str:
    """One rate in words, with the one before and the test where there are such; empty where it was not measured."""
    rate, earlier = _rate(report, like, model), _rate(report, like, before)
    if rate is None:
        return ""
    judged = f" ({like['judge']})"
    if earlier is None:
        return f"{name} is {percent(rate)} on {like['set']}{judged}"
    is_same = percent(rate) == percent(earlier)
    verb = "stays at" if is_same else "falls" if rate < earlier else "rises"
    values = percent(rate) if is_same else f"from {percent(earlier)} to {percent(rate)}"
    tests = [
        row["p_value"]
        for row in report["changes"]
        if (*question_of(row), row["model"], row["before"]) == (*question_of(like), model, before)
    ]
    test = ""
    if tests and tests[0] is not None and not is_same:
        by_chance = ", which may be chance" if tests[0] > CHANCE else ""
        test = f", p {p_value(tests[0])}{by_chance}"
    return f"{name} {verb} {values} on {like['set']}{judged}{test}"


def perturbation(report: PerturbationReport) -> list[str]:
    """What the strongest noise does to each part of the ranking, beside the model without noise: to attack success, or
    to refusals where no harmful prompts were asked."""
    curves = report["curves"]
    first = next((row for name in NOISE_MEASURES for row in curves if row["measure"] == name), None)
    if first is None:
        return []
    rows = [row for row in curves if question_of(row) == question_of(first) and row["rate"] is not None]
    noise = max((row["noise"] for row in rows), default=0.0)
    strongest = [row for row in rows if row["noise"] == noise]
    ratio = max((row["ratio"] for row in strongest), default=0.0)
    points = [row for row in strongest if row["ratio"] == ratio]
    clean = next((percent(row["rate"]) for row in rows if row["noise"] == 0), None)
    if not noise or not points:
        return []
    rates = listed([f"{percent(row['rate'])} where they are {_order(row)}{_babble(row, curves)}" for row in points])
    without = f"; without noise it is {clean}" if clean else ""
    name = f"{NOISE_MEASURES[first['measure']]} {first['set']} ({first['judge']})"
    return [f"With noise of {noise:g} σ on {100 * ratio:g} % of the weights, {name} is {rates}{without}."]


def noisy_weights(report: PerturbationReport) -> str:
    """How many weights the noise was put on, and which."""
    mask, cells = report["mask"], report["cells"]
    ranking = f"of the ranking of {mask['path']} ({mask['criterion']})"
    orders = list(dict.fromkeys(cell["order"] for cell in cells))
    sizes = dict.fromkeys((f"{cell['k']:,}", f"({100 * cell['ratio']:g} %)") for cell in cells)
    (count, share), *more = sizes
    if not more and len(orders) == 1:
        return f"on the {count} {orders[0]} weights {share} {ranking}."
    amount = f"{listed([' '.join(size) for size in sizes])} weights" if more else f"{count} weights {share}"
    parts = [f"{'as many' if order == 'random' else 'the'} {order}" for order in orders]
    return f"on {amount} {ranking}: {listed(parts)} ones."


def _babble(point: CurveRow, curves: Sequence[CurveRow]) -> str:
    """How many of the answers behind a rate are incoherent, if many are."""
    same: tuple[Literal["set", "order", "ratio", "noise"], ...] = ("set", "order", "ratio", "noise")
    rate = next(
        (
            row["rate"]
            for row in curves
            if row["measure"] == "incoherent" and all(row[key] == point[key] for key in same)
        ),
        None,
    )
    many = rate is not None and rate >= MANY_INCOHERENT
    return f" ({percent(rate)} of the answers are incoherent)" if many else ""


def _order(row: CurveRow) -> str:
    return "random ones" if row["order"] == "random" else f"the {row['order']} ones"


def several(
    runs: Sequence[FinishedRun[Report]], masks: Sequence[FinishedRun[EsiReport]], joined: EvaluationReport | None
) -> list[str]:
    """How many runs of what kind, where the masks are densest, and which model attacks succeed least with.

    masks: a row for each. joined: all evaluations as one.
    """
    counts = Counter(run.label for run in runs)
    kinds = [counted(count, label) if label.islower() else f"{count} {label}" for label, count in counts.items()]
    lines = [f"{counted(len(runs), 'run')}: {listed(kinds)}."]
    for mask in masks[:MAX_MASKS]:
        if location.whole_of(mask.report["units"]).selected and _follows_scores(mask.report["selection"]):
            densest = _densest(location.regions(mask.report["units"]))
            lines.append(
                f"By thirds of the depth, the mask of {mask.name} is densest in {densest} "
                f"({densest.at.times_chance:.1f} times chance)."
            )
    if joined is not None and (first := _first(joined, "attack_success")) is not None:
        rates = [
            (rate, name)
            for name in (model["name"] for model in joined["models"])
            if (rate := _rate(joined, first, name)) is not None
        ]
        if len(rates) > 1:
            low, high = min(rates)[0], max(rates)[0]
            measured = f"Attack success on {first['set']} ({first['judge']}) is"
            is_all = len(rates) == len(joined["models"])
            if low == high:
                models = "all models" if is_all else f"the {len(rates)} models measured"
                return [*lines, f"{measured} {percent(low)} for {models}."]
            lowest = [name for rate, name in rates if rate == low]
            highest = listed([name for rate, name in rates if rate == high])
            ends = f"lowest for {listed(lowest)}, {percent(low)}, and highest for {highest}, {percent(high)}"
            ends += "" if is_all else f", of the {len(rates)} models measured"
            lines += [f"{measured} {ends}.", *_refusals_of(joined, lowest)]
    return lines


def _refusals_of(report: EvaluationReport, models: Sequence[str]) -> list[str]:
    """A sentence about how many benign prompts each of some models refuses; none where that was not measured."""
    if (refusal := _first(report, "refused")) is None:
        return []
    rates = [(name, rate) for name in models if (rate := _rate(report, refusal, name)) is not None]
    refuses = listed([f"{name} refuses {percent(rate)}" for name, rate in rates])
    return [f"Of {refusal['set']}, {refuses}."] if refuses else []


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _begin(text: str) -> str:
    return text[:1].upper() + text[1:]


def _whole(share: float) -> str:
    """A share of 1 in per cent, with two digits."""
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"
