"""``report.html``: one self-contained page from ``report.json``. Prompts and responses in it are data: escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from esi_ds.artifacts import write_json_atomic, write_text_atomic
from esi_ds.eval.rows import MeasureRow
from esi_ds.report import evaluation, figures, location, overview, perturbation, sentences, tables, tuning
from esi_ds.report.contents import (
    EsiReport,
    EvaluationReport,
    ExpertTables,
    MaskReport,
    Overlap,
    PerturbationReport,
    PivotRow,
    RateTables,
    Report,
    TuningReport,
    UnitRow,
)
from esi_ds.report.experts import expert_tables
from esi_ds.report.heat_tables import MORE_THAN, HeatTable, heat_table, shortened
from esi_ds.report.overview import FinishedRun
from esi_ds.report.publish import RESPONSE_FACTS
from esi_ds.words import counted

# Keys of report.json → what pages call them. The manifest has the time of the whole run, these pages' making included.
FACT_NAMES = {"mask fingerprint": "mask made from", "wall time (s)": "wall time before this page (s)"}
MAX_ROWS = 200
MAX_TENSORS = 20
LEAST_PIXELS = 62  # an inch of a picture; on a narrower screen it is scrolled, as its words would be too small


class MaskPieces(TypedDict):
    """What the templates draw of one mask, and what they call it."""

    report: MaskReport
    label: str  # behind the headings; empty where there is only one mask
    role_maps: list[HeatTable]  # by role and layer
    expert_maps: list[HeatTable]  # by layer and expert; empty for a dense model
    experts: ExpertTables | None  # None for a dense model
    scores: Markup  # a picture
    roles: list[tuple[str, location.Location]]  # where each role stands
    parts: list[tuple[str, location.Location]]  # where routed experts, attention and others stand
    largest_experts: list[tuple[str, location.Location]]  # likewise; empty for a dense model
    statistic: str  # what the sum of mean scores is called
    control: bool  # whether there is one to compare with
    top: list[UnitRow]  # the matrices with the most selected weights


class EvaluationPieces(TypedDict):
    """What the templates draw of an evaluation besides its report."""

    rows: list[PivotRow]  # the table of rates
    charts: list[Markup]  # pictures
    missing: list[MeasureRow]  # measures of which some answers have no verdict
    flawed: list[MeasureRow]  # tasks of which some documents were asked or answered in part, and count


def write_report(folder: Path, report: Report) -> None:
    """``report.json`` and ``report.html``."""
    write_json_atomic(folder / "report.json", report)
    write_text_atomic(folder / "report.html", render(report))


def render(
    report: Report,
    tuned: Sequence[tuple[str, TuningReport]] = (),
    evaluated: Sequence[tuple[str, EvaluationReport]] = (),
) -> str:
    """The page as text. An ESI page also shows other runs: ``tuned`` and ``evaluated`` are their (link, report)."""
    kind = report.get("kind")
    if kind == "tuning":
        return _tuning_page(cast(TuningReport, report))
    if kind == "evaluation":
        return _evaluation_page(cast(EvaluationReport, report))
    if kind == "perturbation":
        return _perturbation_page(cast(PerturbationReport, report))
    return _esi_page(cast(EsiReport, report), tuned, evaluated)


def _esi_page(
    report: EsiReport,
    tuned: Sequence[tuple[str, TuningReport]],
    evaluated: Sequence[tuple[str, EvaluationReport]],
) -> str:
    masks, scores, progress = tables.masks_of(report), report["judge_scores"], report["progress"]
    return _template("esi.html.j2").render(
        report=report,
        lead=sentences.esi(report, masks),
        masks=[_mask_pieces(mask, f": {mask['selection']['criterion']}" * (len(masks) > 1)) for mask in masks],
        overlaps=report.get("overlaps", []),
        response_facts=RESPONSE_FACTS,
        has_subfolders="further_masks" in report,
        tuned=tuned,
        evaluated=[(link, evaluation, _evaluation_pieces(evaluation)) for link, evaluation in evaluated],
        routing_maps=[heat_table(view) for view in tables.routing_maps(report.get("routing", []))],
        judge=_picture(figures.judge_histogram(scores), "distribution of judge scores") if scores else None,
        progress=_picture(figures.progress_curves(progress), "judge score and gradient norm") if progress else None,
        excluded=report["excluded"][:MAX_ROWS],
    )


def _mask_pieces(mask: MaskReport, label: str) -> MaskPieces:
    units, k, histogram = mask["units"], mask["selection"]["k"], mask["score_histogram"]
    by_role, threshold = mask["score_histograms_by_role"], mask["selection"]["threshold"]
    return {
        "report": mask,
        "label": label,
        "role_maps": [heat_table(view) for view in location.role_maps(units, mask["selection"])],
        "expert_maps": [heat_table(view) for view in location.expert_maps(units, mask["selection"])],
        "experts": expert_tables(units, k),
        "scores": _picture(figures.score_histogram(histogram, by_role, threshold), "distribution of scores"),
        "roles": location.by_role(units),
        "parts": location.by_part(units),
        "largest_experts": location.largest_experts(units),
        "statistic": location.statistic_name(mask["selection"]),
        "control": location.has_control(units),
        "top": tables.top_matrices(units),
    }


def render_overview(
    runs: Sequence[FinishedRun[Report]], overlaps: Sequence[Overlap], left_out: Sequence[str] = ()
) -> str:
    """One page of several runs. overlaps: of every two masks of models with the same shapes. left_out: folders of runs
    that had not finished."""
    kinds = overview.by_kind(runs)
    masks = overview.masks(kinds.esi)
    joined = overview.joined(kinds.evaluations) if kinds.evaluations else None
    losses = [(run.name, run.report["progress"]) for run in kinds.tuning if run.report["progress"]]
    maps = ((mask, location.role_maps(mask.report["units"], mask.report["selection"])) for mask in masks)
    return _template("overview.html.j2").render(
        report={"title": counted(len(runs), "run")},
        lead=sentences.several(runs, masks, joined),
        runs=runs,
        left_out=left_out,
        masks=masks,
        tuning=kinds.tuning,
        evaluations=kinds.evaluations,
        key_fact=overview.key_fact,
        facts_table=overview.facts_table,
        role_shares=overview.role_shares(masks),
        maps=[(mask.name, heat_table(views[1], with_numbers=False)) for mask, views in maps if views],
        overlaps=overlaps,
        losses=_picture(figures.loss_curves(losses), "loss of every run by step") if losses else None,
        joined=joined,
        pieces=_evaluation_pieces(joined) if joined else None,
        perturbations=[(run, _noise_charts(run.report)) for run in kinds.perturbations],
    )


def _template(name: str) -> Template:
    """A page of this package, with the filters that the pages use."""
    environment = Environment(
        loader=PackageLoader("esi_ds.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "fact_name": lambda name: FACT_NAMES.get(name, name),
        "number": _number,
        "interval": evaluation.interval,
        "change": evaluation.change,
        "kappa": evaluation.kappa,
        "percent": evaluation.percent,
        "p_value": evaluation.p_value,
        "share": _share,
        "times": _times,
        "counted": counted,
        "num_answers": tuning.num_answers,
    }
    return environment.get_template(name)


def _tuning_page(report: TuningReport) -> str:
    changed = sorted(report["changed_tensors"].items(), key=lambda item: -item[1]["changed"])
    progress, alternative = report["progress"], "loss, gradient norm and learning rate by step"
    return _template("tuning.html.j2").render(
        report=report,
        lead=sentences.tuning(report),
        what_was_trained=_what_was_trained(report),
        curves=_picture(figures.training_curves(progress), alternative) if progress else None,
        changed_rows=[{"name": name, **row} for name, row in changed[:MAX_TENSORS] if row["changed"]],
    )


def _what_was_trained(report: TuningReport) -> str:
    facts = report["facts"]
    unscored = str(facts.get("unscored parameters", "freeze"))
    routers = str(facts.get("routers", unscored))  # the earliest runs name none
    is_baseline = facts.get("mask criterion") == "none"
    rounded_to = str(facts["dtype"]) if "base weights" in facts else None
    has_towers = "towers" in facts
    return sentences.what_was_trained(report["method"], is_baseline, unscored, routers, rounded_to, has_towers)


def _evaluation_page(report: EvaluationReport) -> str:
    return _template("evaluation.html.j2").render(
        report=report,
        lead=sentences.evaluation(report),
        words=evaluation.WORDS,
        page=_evaluation_pieces(report),
    )


def _perturbation_page(report: PerturbationReport) -> str:
    return _template("perturbation.html.j2").render(
        report=report,
        lead=sentences.perturbation(report),
        noisy_weights=sentences.noisy_weights(report),
        words=evaluation.WORDS,
        charts=_noise_charts(report),
        missing=_missing(report),
    )


def _noise_charts(report: PerturbationReport) -> list[Markup]:
    return [
        _picture(figures.noise_curves(title, points), f"{title}: rate against noise")
        for title, points in perturbation.panels(report)
    ]


def _evaluation_pieces(report: EvaluationReport) -> EvaluationPieces:
    names, charts = [model["name"] for model in report["models"]], evaluation.charts(report)
    drawn = [row for _, rows in charts for row in rows]
    return {
        "rows": evaluation.pivot(report),
        "charts": [
            _picture(figures.rate_bars(title, rows, names, drawn), f"{title}: rates with intervals")
            for title, rows in charts
        ],
        "missing": _missing(report),
        "flawed": [row for row in report["measures"] if row["reasons"] and row["measure"] == evaluation.TASK],
    }


def _missing(report: RateTables) -> list[MeasureRow]:
    """Measures of which some answers have no verdict."""
    return [row for row in report["measures"] if row["reasons"] and row["measure"] != evaluation.TASK]


def _picture(figure: Figure, alternative: str) -> Markup:
    """The figure within the page. alternative: what it shows, for readers who cannot see it."""
    least = round(LEAST_PIXELS * figure.get_figwidth())
    attributes = f'role="img" aria-label="{escape(alternative)}" style="min-width:{least}px"'
    svg = figures.figure_svg(figure).replace("<svg", f"<svg {attributes}", 1)
    return Markup(f'<div class="scroll">{svg}</div>')  # its texts are escaped by matplotlib


def _share(value: float) -> str:
    """A share of 1 in per cent; a dash where there is none."""
    return f"{100 * value:.2f} %" if math.isfinite(value) else "–"


def _times(value: float) -> str:
    """A ratio; a dash where both are zero. A very great one is shown on hover."""
    if MORE_THAN < value < math.inf:
        return Markup(f'<span title="{value:,.0f}">{escape(shortened(value))}</span>')
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.2f}"


def _number(value: Any) -> str:
    """Integers with separators, floats with four digits, or more before the point, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
