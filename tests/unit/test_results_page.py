"""docs/results.md, the pages of its four questions and docs/guide.md are written by hand: their figures stand in the
generated pages of docs/results, which tests/unit/test_study.py compares with study.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from esi_ds.eval.statistics import mcnemar_exact, paired_rates, wilson
from esi_ds.report.evaluation import change

RESULTS = ROOT / "docs/results"
BY_HAND = [RESULTS / f"{question}.md" for question in ("where", "set", "spa", "noise")]
INTERVAL = re.compile(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\](?: \(\d+\.\d – \d+\.\d\))?")
TINY = "## Tiny models"
TINY_MODELS = ("llama-", "qwen3moe-")


def rows_of(text: str) -> Iterator[dict[str, str]]:
    """Rows of all tables by their columns' names; model and share of the weights from the heading above, too."""
    heading: dict[str, str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        if line.startswith("## "):
            model, _, weights = line.removeprefix("## ").partition(", ")
            heading = {"model": model, "weights": weights.removesuffix(" of the weights")}
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip().strip("*`").rstrip("†") for cell in line.strip("|").split("|")]
        if not columns:
            columns = cells
        elif set(cells) != {"---"}:
            yield {**heading, **dict(zip(columns, cells, strict=True))}


def tiny_section(page: Path) -> str:
    """The text about the tiny models."""
    (part,) = page.read_text().split(TINY)[1:]
    return re.split(r"^#", part, maxsplit=1, flags=re.MULTILINE)[0]


def unknown_rows(text: str, detail: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a text's tables that no generated row contains, column by column."""
    return [row for row in rows_of(text) if not any(row.items() <= known.items() for known in detail)]


def is_part(cell: str, known: str) -> bool:
    """Whether a cell is the generated one, or that without the range of its seeds, or the part in parentheses."""
    return cell == known or known.startswith(f"{cell} (") or known.endswith(f"({cell})")


def unknown_parts(text: str, detail: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows about tiny models of results.md's tables that are no part of any generated row."""
    rows = [row for row in rows_of(text) if row.get("model", "").startswith(TINY_MODELS)]
    rows = [{column: cell for column, cell in row.items() if column not in ("figure", "weights")} for row in rows]
    return [
        row
        for row in rows
        if not any(all(is_part(cell, known.get(column, "")) for column, cell in row.items()) for known in detail)
    ]


def detail_rows() -> list[dict[str, str]]:
    return [row for file in sorted(RESULTS.glob("tiny*.md")) for row in rows_of(file.read_text())]


def test_tables_of_tiny_models_are_parts_of_the_generated_ones() -> None:
    text, detail = "\n\n".join(map(tiny_section, BY_HAND)), detail_rows()
    assert sum(1 for _ in rows_of(text)) > 30
    assert not unknown_rows(text, detail)
    for old, new in (
        ("| llama-complying | esi | 13.2 [", "| llama-complying | esi | 13.3 ["),  # another number
        ("| llama-complying | esi | 13.2 [", "| qwen3moe-complying | esi | 13.2 ["),  # another model's
        ("| not refused (words) | unsafe (guard) |", "| unsafe (guard) | not refused (words) |"),  # another measure
        ("| 55 (1.6×) |", "| 56 (1.6×) |"),
        ("| categories | esi 30 % |", "| categories | snip 30 % |"),  # another setting's
    ):
        assert old in text
        assert unknown_rows(text.replace(old, new), detail), new


def test_the_summarys_tables_are_parts_of_the_generated_ones() -> None:
    text, detail = (ROOT / "docs/results.md").read_text(), detail_rows()
    assert sum(row.get("model", "").startswith(TINY_MODELS) for row in rows_of(text)) > 15
    assert not unknown_parts(text, detail)
    for old, new in (
        ("| llama-complying | esi | 13.2 [", "| llama-complying | esi | 13.3 ["),
        ("| llama-complying | esi | 13.2 [", "| qwen3moe-complying | esi | 13.2 ["),
        ("| categories | esi 30 % |", "| categories | random 30 % |"),
        ("| 1.6× |", "| 1.7× |"),
    ):
        assert old in text
        assert unknown_parts(text.replace(old, new), detail), new


@pytest.mark.parametrize(
    "page", [ROOT / "docs/results.md", ROOT / "docs/guide.md", *BY_HAND], ids=lambda page: page.name
)
def test_intervals_stand_in_the_generated_pages(page: Path) -> None:
    generated = "".join(file.read_text() for file in sorted(RESULTS.rglob("*.md")) if file not in BY_HAND)
    quoted = INTERVAL.findall(page.read_text())
    assert len(quoted) > 10
    assert not [one for one in quoted if one not in generated]
    assert "13.3 [10.7, 16.1]" not in generated


def test_figures_that_are_the_tutorials_are_in_it() -> None:
    """Its commands are run again now and then, and then have other figures."""
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    compared = 0
    for page in (ROOT / "docs/results.md", *(ROOT / "docs/results").glob("*.md")):
        for sentence in re.split(r"(?<=\.)\s", page.read_text()):
            if "tutorial.md" in sentence:
                for share in (part for pair in re.findall(r"from ([\d.]+) to ([\d.]+) %", sentence) for part in pair):
                    assert re.search(rf"\b{float(share):g}(\.0)? %", tutorial), f"{page.name}: {share} %"
                    compared += 1
    assert compared


def test_claims_about_several_rows_follow_from_the_stored_figures() -> None:
    """No table has a row for them."""
    names = ("real", "remade/real", "epyc/real")
    first, remade, latest = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    pages = (ROOT / "docs/results.md", RESULTS / "set.md")
    text, details = (" ".join(page.read_text().split()) for page in pages)  # whatever their lines
    rows = first["set"] + remade["set"]
    judged = ("unsafe", "unsafe (guard)", "over-refused")
    assert {row["method"].split("-")[0] for row in latest["set"]} == {"random"}
    meet = [row["method"] for row in rows if all(row["report"][column][0] <= 0.1 for column in judged)]
    assert len(meet) == 2 and all(method.endswith("three-quarters-benign") for method in meet)
    assert "by the judges' verdicts two recipes do, both with three quarters benign rows" in text
    least = min(row["report"]["over-refused"][0] for row in rows + latest["set"])
    assert f"to {100 * least:.0f} % at least in every recipe" in text
    others = ("all-weights", "lora-1", "esi-three-quarters-benign")
    masks = [row for row in first["set"] if row["method"] not in others and row["report"]["over-refused"][0] < 0.18]
    least_loss = min(row["loss"]["gsm8k"] for row in masks)
    assert f"a loss of {least_loss:.2f} or more" in details
    for method in ("random-quadruple-batch-three-fifths-benign", "random-quadruple-batch-more-lookalikes"):
        seeds = [row["report"] for row in latest["set"] if row["method"] == method]
        counts = [[round(80 * row[column][0]) for row in seeds] for column in ("not refused", "over-refused")]
        (a, b, c), (d, e, f) = counts
        assert f"{a}, {b} and {c} of 80 requests are not refused" in details
        assert f"{d}, {e} and {f} over-refused" in details
        if "three-fifths" in method:
            totals = f"leaves {a + b + c} of 240 requests unrefused and over-refuses {d + e + f} of 240"
            assert totals in text
    pair = ("judge-classifier", "judge-guard")
    kappas = [row["kappa"] for row in remade["agreements"] if (row["first"], row["second"]) == pair]
    assert f"a κ of {min(kappas):.2f} to {max(kappas):.2f}" in text


PASTED_RATE = re.compile(r"^  \S.*?  (\d+\.\d) % \[(\d+\.\d), (\d+\.\d)\] \(n (\d+)\)(?:   (.*) \(against base\))?$")


def changes(before: int, after: int, n: int) -> set[str]:
    """What the command prints for two counts of the same prompts, by how many have changed the other way."""
    printed = set()
    for back in range(min(before, n - after) + 1) if after >= before else range(min(after, n - before) + 1):
        lost, gained = (back, after - before + back) if after >= before else (before - after + back, back)
        first = [True] * before + [False] * (n - before)
        second = [False] * lost + [True] * (before - lost + gained) + [False] * (n - before - gained)
        scores, test = paired_rates(first, second), mcnemar_exact(first, second)
        row = {"difference": scores.difference, "low": scores.low, "high": scores.high, "p_value": test.p_value}
        printed.add(change(row))
    return printed


def test_pasted_intervals_are_those_that_the_command_prints() -> None:
    compared, before = 0, 0
    for line in (ROOT / "docs/tutorial.md").read_text().splitlines():
        if found := PASTED_RATE.match(line):
            rate, low, high, n = float(found[1]), found[2], found[3], int(found[4])
            count = round(rate * n / 100)
            interval = wilson(count, n)
            assert (f"{100 * interval.low:.1f}", f"{100 * interval.high:.1f}") == (low, high), line
            if found[5] is None:
                before = count
            else:
                assert found[5] in changes(before, count, n), line
                compared += 1
    assert compared == 9
