"""``docs/results/study.json``: the study's figures as tables {columns, rows}, one row a line.

What follows from other columns is left out. A rate is stored as [count, n, missing]; where seeds are pooled, the least
and the greatest rate of a seed come behind; where no seed keeps a limit, it is null. The rate and Wilson's interval
follow from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from esi_ds.artifacts import write_text_atomic
from esi_ds.data.rows import Row
from study.findings import MEASURES, counted

SHARES = ("cells", "roles", "thirds", "parts", "experts")  # tables of a mask's shares, as ``where.places`` names them
METHOD = ("model", "ratio", "criterion")
SETTING = ("model", "task", "criterion", "ratio")
COUNTS = ("count", "n", "missing", "least", "greatest")
OF_TEST = (
    "second", "seeds", "only_first", "only_second", "by_seed", "num_pairs", "only_before", "only_after",
    "p_value", "p_holm", "difference", "sign", "verdict",
)  # fmt: skip
DIGITS = 6  # significant; pages show at most four


def write_study(file: Path, study: Row) -> None:
    """Replace the file by these figures, in the form that ``read_study`` returns."""
    tables = _tables(study)
    parts = [f'"facts": {_line(study["facts"])}']
    parts += [f'"{name}": {_table_text(rows)}' for name, rows in tables.items()]
    write_text_atomic(file, "{\n" + ",\n".join(parts) + "\n}\n")


def read_study(file: Path) -> Row:
    """The figures: facts, untuned, set {methods, against}, spa {settings, equal_task, tests}, masks, stability, noise.

    ``summary.summarise`` says what each holds.
    """
    content = json.loads(file.read_text())
    tables = {
        name: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for name, table in content.items()
        if name != "facts"
    }
    methods = []
    for key, chosen in groupby(tables["set_chosen"], lambda row: tuple(row[name] for name in METHOD)):
        curve = [row for row in tables["set_curves"] if tuple(row[name] for name in METHOD) == key]
        about = dict(zip(METHOD, key, strict=True))
        at = {row["rule"]: _with_seeds(row, METHOD) for row in chosen}
        methods.append({**about, "at": at, "curve": [_with_rates(row, METHOD) for row in curve]})
    spa = {"settings": [], "equal_task": [], "tests": tables["spa_tests"]}
    for name in ("settings", "equal_task"):
        spa[name] = [_with_seeds(row) for row in tables[f"spa_{name}"]]
    noise: dict[str, list[Row]] = {}
    for row in tables["noise"]:
        noise.setdefault(row["model"], []).append(_without(row, ("model",)))
    return {
        "facts": content["facts"],
        "untuned": {row["model"]: _with_rates(row, ("model",)) for row in tables["untuned"]},
        "set": {"methods": methods, "against": tables["set_tests"]},
        "spa": spa,
        "masks": [_mask(about, tables) for about in tables["masks"]],
        "stability": tables["stability"],
        "noise": noise,
    }


# ---------------------------------------------------------------- writing


def _tables(study: Row) -> dict[str, list[Row]]:
    """Flat rows of every table."""
    methods, spa = study["set"]["methods"], study["spa"]
    chosen = [{**_only(row, METHOD), "rule": rule, **_counted(at)} for row in methods for rule, at in row["at"].items()]
    curves = [{**_only(row, METHOD), **_counted(point)} for row in methods for point in row["curve"]]
    shares = {
        f"mask_{name}": [
            {"model": about["model"], **_without(row, ("density",))} for about in study["masks"] for row in about[name]
        ]
        for name in SHARES
    }
    return {
        "untuned": [{"model": model, **_counted(row)} for model, row in study["untuned"].items()],
        "set_chosen": chosen,
        "set_curves": curves,
        "set_tests": [_only(row, ("model", "ratio", "rule", "first", *OF_TEST)) for row in study["set"]["against"]],
        "spa_settings": [_counted(row) for row in spa["settings"]],
        "spa_equal_task": [_counted(row) for row in spa["equal_task"]],
        "spa_tests": [_only(row, (*SETTING, *OF_TEST)) for row in spa["tests"]],
        "masks": [_only(about, ("model", "seeds", "layers")) for about in study["masks"]],
        **shares,
        "stability": study["stability"],
        "noise": [{"model": model, **row} for model, rows in study["noise"].items() for row in rows],
    }


def _counted(row: Row) -> Row:
    """The row with counts in place of its measures; measures that no page shows are left out."""
    return {
        key: _counts(value) if key in MEASURES else value
        for key, value in row.items()
        if key in MEASURES or not isinstance(value, dict) or key == "learning_rates"
    }


def _counts(pooled: Row) -> list[Any] | None:
    return [pooled[key] for key in COUNTS if key in pooled] if "n" in pooled else None


def _table_text(rows: Sequence[Row]) -> str:
    columns = list(rows[0]) if rows else []
    if any(list(row) != columns for row in rows):
        raise ValueError(f"a table has rows of other columns than {columns}")
    lines = ",\n".join(_line(list(row.values())) for row in rows)
    return f'{{"columns": {_line(columns)},\n"rows": [\n{lines}\n]}}'


def _line(row: Any) -> str:
    return json.dumps(_short(row), ensure_ascii=False, separators=(",", ":"))


def _short(value: Any) -> Any:
    """The value for JSON: six significant digits, None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


# ---------------------------------------------------------------- reading


def _with_seeds(row: Row, without: Sequence[str] = ()) -> Row:
    """The row with rates for counts; each has the row's numbers of seeds, of all and of those that keep the limit."""
    seeds = {"seeds": row["seeds"], "reached": row.get("reached", row["seeds"])}
    rates = _with_rates(row, without)
    return {key: {**seeds, **value} if key in MEASURES else value for key, value in rates.items()}


def _with_rates(row: Row, without: Sequence[str]) -> Row:
    return {key: _rate(value) if key in MEASURES else value for key, value in _without(row, without).items()}


def _rate(counts: Sequence[Any] | None) -> Row:
    if counts is None:
        return {}
    about = dict(zip(COUNTS, counts, strict=False))
    return {**about, **counted(about["count"], about["n"], about["missing"])}


def _mask(about: Row, tables: Mapping[str, Sequence[Row]]) -> Row:
    """One model's tables of shares, each with the density: share of the mask over share of the weights."""

    def shares(name: str) -> list[Row]:
        rows = (row for row in tables[f"mask_{name}"] if row["model"] == about["model"])
        return [{**_without(row, ("model",)), "density": row["share"] / row["of_weights"]} for row in rows]

    return {**about, **{name: shares(name) for name in SHARES}}


def _only(row: Row, keys: Sequence[str]) -> Row:
    return {key: row[key] for key in keys}


def _without(row: Row, keys: Sequence[str]) -> Row:
    return {key: value for key, value in row.items() if key not in keys}
