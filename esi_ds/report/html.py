"""``report.html``: one self-contained page from ``report.json``. Prompts and responses in it are data: escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from esi_ds.artifacts import write_json_atomic, write_text_atomic
from esi_ds.report import evaluation, figures, overview, perturbation, tables
from esi_ds.report.experts import expert_tables
from esi_ds.report.overview import Run

MAX_ROWS = 200
MAX_TENSORS = 20


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """``report.json`` and ``report.html``."""
    write_json_atomic(folder / "report.json", report)
    write_text_atomic(folder / "report.html", render(report))


def render(
    report: dict[str, Any],
    tuned: Sequence[tuple[str, dict[str, Any]]] = (),
    evaluated: Sequence[tuple[str, dict[str, Any]]] = (),
) -> str:
    """The page as text. An ESI page also shows other runs: ``tuned`` and ``evaluated`` are (link, report) of those."""
    environment = _environment()
    pages = {"tuning": _tuning_page, "evaluation": _evaluation_page, "perturbation": _perturbation_page}
    if report.get("kind") in pages:
        return pages[report["kind"]](environment, report)
    units, k = report["units"], report["selection"]["k"]
    return environment.get_template("esi.html.j2").render(
        report=report,
        tuned=tuned,
        evaluated=[(link, other, _evaluation_pieces(other)) for link, other in evaluated],
        role_maps=[_picture(figures.heatmap(found)) for found in tables.layer_by_role(units, k)],
        expert_maps=[_picture(figures.heatmap(found)) for found in tables.layer_by_expert(units, k)],
        experts=expert_tables(units, k),
        routing_maps=[_picture(figures.heatmap(found)) for found in tables.routing_maps(report.get("routing", []))],
        scores=_picture(
            figures.score_histogram(
                report["score_histogram"], report["score_histograms_by_role"], report["selection"]["threshold"]
            )
        ),
        judge=_picture(figures.judge_histogram(report["judge_scores"])) if report["judge_scores"] else None,
        progress=_picture(figures.progress_curves(report["progress"])) if report["progress"] else None,
        roles=tables.by_role(units),
        top=tables.top_matrices(units),
        excluded=report["excluded"][:MAX_ROWS],
    )


def render_overview(runs: Sequence[Run], overlaps: Sequence[dict[str, Any]]) -> str:
    """One page of several runs. overlaps: {first, second, both, of_first, of_second, chance, jaccard, same_weights} of
    every two masks of one model."""
    esi, tuning, evaluations, perturbations = (
        overview.of_kind(runs, kind) for kind in (None, "tuning", "evaluation", "perturbation")
    )
    joined = overview.joined(evaluations) if evaluations else None
    losses = [(run.name, run.report["progress"]) for run in tuning if run.report["progress"]]
    maps = ((run, tables.layer_by_role(run.report["units"], run.report["selection"]["k"])) for run in esi)
    return (
        _environment()
        .get_template("overview.html.j2")
        .render(
            report={"title": f"{len(runs)} runs"},
            runs=runs,
            esi=esi,
            tuning=tuning,
            evaluations=evaluations,
            key_fact=overview.key_fact,
            facts_table=overview.facts_table,
            role_shares=overview.role_shares(esi),
            maps=[(run.name, _picture(figures.heatmap(found[0]))) for run, found in maps if found],
            overlaps=overlaps,
            losses=_picture(figures.loss_curves(losses)) if losses else None,
            joined=joined,
            pieces=_evaluation_pieces(joined) if joined else None,
            perturbations=[(run, _noise_charts(run.report)) for run in perturbations],
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("esi_ds.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "interval": evaluation.interval,
        "change": evaluation.change,
        "percent": evaluation.percent,
    }
    return environment


def _tuning_page(environment: Environment, report: dict[str, Any]) -> str:
    changed = sorted(report["changed_tensors"].items(), key=lambda item: -item[1]["changed"])
    return environment.get_template("tuning.html.j2").render(
        report=report,
        curves=_picture(figures.training_curves(report["progress"])) if report["progress"] else None,
        changed_rows=[{"name": name, **row} for name, row in changed[:MAX_TENSORS] if row["changed"]],
    )


def _evaluation_page(environment: Environment, report: dict[str, Any]) -> str:
    template = environment.get_template("evaluation.html.j2")
    return template.render(report=report, words=evaluation.WORDS, page=_evaluation_pieces(report))


def _perturbation_page(environment: Environment, report: dict[str, Any]) -> str:
    template = environment.get_template("perturbation.html.j2")
    return template.render(report=report, words=evaluation.WORDS, charts=_noise_charts(report))


def _noise_charts(report: dict[str, Any]) -> list[str]:
    return [_picture(figures.noise_curves(title, points)) for title, points in perturbation.panels(report)]


def _evaluation_pieces(report: dict[str, Any]) -> dict[str, Any]:
    """What the templates draw of an evaluation besides its report."""
    names = [model["name"] for model in report["models"]]
    return {
        "rows": evaluation.pivot(report),
        "charts": [_picture(figures.rate_bars(title, rows, names)) for title, rows in evaluation.charts(report)],
        "missing": [row for row in report["measures"] if row["reasons"]],
    }


def _picture(figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.figure_png(figure)).decode()


def _number(value: Any) -> str:
    """Integers with separators, floats with four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
