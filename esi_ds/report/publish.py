"""The report of an ESI run in TensorBoard and on the console."""

from __future__ import annotations

from esi_ds.report import figures, tables
from esi_ds.report.contents import EsiReport, MaskReport
from esi_ds.tracking import OVERVIEW, Tracker, literal
from esi_ds.words import counted

RESPONSE_FACTS = ("judged unsafe", "refused (by words)")  # of the report's facts, where they are there


def publish(tracker: Tracker, report: EsiReport) -> None:
    """Heatmaps as images (in the overview: where the mask is), histograms of log scores, sample answers as text, and
    each role's share of the mask in per cent."""
    masks = tables.masks_of(report)
    for mask in masks:
        prefix = f"{mask['selection']['criterion']}/" if len(masks) > 1 else ""
        _publish_mask(tracker, mask, prefix, report["facts"].get("prompts used", 0))
    for data in tables.routing_maps(report.get("routing", [])):
        figures.log_figure(tracker, f"routing/{data.title}", figures.heatmap(data))
    for sample in report["samples"]:
        quoted = literal(f"{sample['prompt']}\n\n{sample['response']}")
        tracker.text(f"answers/{sample['index']}", f"judge score {sample['judge_score']:.4g}\n\n{quoted}")


def _publish_mask(tracker: Tracker, mask: MaskReport, prefix: str, step: int) -> None:
    """One mask's curves, heatmaps and histograms. prefix: of their names; empty where there is only one mask."""
    units, k = mask["units"], mask["selection"]["k"]
    shares = {f"{prefix}mask_share/{role}": 100 * cell.selected / max(k, 1) for role, cell in tables.by_role(units)}
    tracker.points(step, shares)
    for group, maps in (("roles", tables.layer_by_role(units, k)), ("experts", tables.layer_by_expert(units, k))):
        for data in maps[:1]:  # where the mask is
            figures.log_figure(tracker, f"{OVERVIEW}/{prefix}{data.title}", figures.heatmap(data))
        for view, data in zip(("share_of_mask", "density", "mean_score"), maps, strict=False):
            figures.log_figure(tracker, f"{prefix}{group}/{view}", figures.heatmap(data))
    edges = mask["score_histogram"]["log10_edges"]
    tracker.histogram(f"{prefix}log10_score/all", edges, mask["score_histogram"]["counts"])
    for role, counts in mask["score_histograms_by_role"].items():
        tracker.histogram(f"{prefix}log10_score/{role}", edges, counts)


def closing_table(report: EsiReport) -> str:
    """What the console shows at the end; at most 100 columns wide."""
    masks = tables.masks_of(report)
    lines: list[str] = []
    for mask in masks:
        lines += ["", f"mask by {mask['selection']['criterion']}"] if len(masks) > 1 else []
        lines += _mask_lines(mask)
    for number, row in enumerate(report.get("overlaps", [])):
        shared = f"{row['first']} and {row['second']} share {row['both']:,} weights, Jaccard {row['jaccard']:.4f}"
        lines += ["", shared] if number == 0 else [shared]
    scores = report["judge_scores"]
    if scores:
        lines += [
            "",
            f"judge score: mean {sum(scores) / len(scores):.4g}, least {min(scores):.4g}, "
            f"greatest {max(scores):.4g} ({counted(len(scores), 'response')} used, {len(report['excluded'])} excluded)",
        ]
        lines += [f"{name}: {report['facts'][name]}" for name in RESPONSE_FACTS if name in report["facts"]]
    return "\n".join(lines)


def _mask_lines(mask: MaskReport) -> list[str]:
    selection, units = mask["selection"], mask["units"]
    k = selection["k"]
    threshold = "-" if selection["threshold"] is None else f"{selection['threshold']:.6g}"
    lines = ["", f"{'role':14}{'selected':>13}{'of mask':>10}{'of role':>10}{'mean score':>14}", "-" * 61]
    for role, cell in tables.by_role(units):
        lines.append(
            f"{role:14}{cell.selected:>13,}{cell.selected / max(k, 1):>10.2%}"
            f"{cell.selected / cell.numel:>10.3%}{cell.mean_score:>14.4g}"
        )
    lines += ["-" * 61, f"{'selected':14}{k:>13,} of {selection['total_numel']:,} weights, threshold {threshold}", ""]
    for unit in tables.top_matrices(units, 5):
        lines.append(f"{unit['selected']:>10,}  {unit['selected'] / unit['numel']:>7.2%} of  {unit['name']}"[:100])
    return lines
