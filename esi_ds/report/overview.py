"""One page of several runs side by side, of any kinds: pure functions of their ``report.json`` and manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esi_ds.report import tables
from esi_ds.report.evaluation import percent

Row = dict[str, Any]
KINDS = {"tuning": "", "evaluation": "evaluation", "perturbation": "perturbation", None: "ESI"}


@dataclass(frozen=True)
class Run:
    """A finished run. name: as the page calls it; link: to its own page; manifest: {} where it is lost."""

    name: str
    link: str
    report: Row
    manifest: Row

    @property
    def kind(self) -> str | None:
        return self.report.get("kind")

    @property
    def label(self) -> str:
        """The stage, for people."""
        return self.report["method"].upper() if self.kind == "tuning" else KINDS[self.kind]

    @property
    def model(self) -> str:
        if self.kind == "evaluation":
            return ", ".join(model["path"] for model in self.report["models"])
        return self.report["facts"].get("model") or self.report["title"].removeprefix("Noise on the weights of ")


def of_kind(runs: Sequence[Run], kind: str | None) -> list[Run]:
    return [run for run in runs if run.kind == kind]


def key_fact(run: Run) -> str:
    """What came of it, in a line."""
    report = run.report
    if run.kind is None:
        chosen = report["selection"]
        judged = report["judge_scores"]
        mean = f", mean judge score {sum(judged) / len(judged):.3g} of {len(judged)} answers" if judged else ""
        return f"{chosen['k']:,} of {chosen['total_numel']:,} weights by {chosen['criterion']}{mean}"
    if run.kind == "tuning":
        parts = [f"{report['trained']:,} weights trained in {report['steps']:,} steps"]
        for row in report["refusals"]:
            shares = [row[f"refused_{when}"] for when in ("before", "after")]
            shown = " → ".join(percent(None if count is None else count / row["n"]) for count in shares)
            parts.append(f"{row['set']} refused {shown}")
        return "; ".join(parts)
    if run.kind == "evaluation":
        return "; ".join(
            f"{row['model']} {percent(row['rate'])} attack success ({row['set']}, {row['judge']})"
            for row in report["measures"]
            if row["measure"] == "attack_success" and row["judge"] == report["judges"][0]["name"]
        )
    return f"{len(report['cells'])} cells of noise, all weights restored"


def facts_table(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """Facts that differ between runs first, one column a run."""
    found: dict[str, list[Any]] = {}
    for index, run in enumerate(runs):
        selection = run.report.get("selection") or {}
        for key, value in {**run.report["facts"], **selection}.items():
            found.setdefault(key, [None] * len(runs))[index] = value
    rows = sorted(found.items(), key=lambda row: len({str(value) for value in row[1]}) == 1)
    return [run.name for run in runs], rows


def role_shares(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """role → share of each ESI run's mask."""
    cells = [dict(tables.by_role(run.report["units"])) for run in runs]
    roles = list(dict.fromkeys(role for found in cells for role in found))
    return [
        (role, [found[role].selected / max(run.report["selection"]["k"], 1) if role in found else None
                for found, run in zip(cells, runs, strict=True)])
        for role in roles
    ]  # fmt: skip


def joined(runs: Sequence[Run]) -> Row:
    """Several evaluations as one: every model under its run's name."""
    if len(runs) == 1:
        return runs[0].report
    return {
        "models": [{**m, "name": f"{run.name}: {m['name']}"} for run in runs for m in run.report["models"]],
        "measures": [{**m, "model": f"{run.name}: {m['model']}"} for run in runs for m in run.report["measures"]],
        "changes": [],
    }
