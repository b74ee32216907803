"""docs/results.md and docs/guide.md are written by hand: their figures of the tiny models stand in the generated pages
of docs/results, which tests/unit/test_study.py compares with study.json."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

RESULTS = ROOT / "docs/results"
INTERVAL = re.compile(r"\d+\.\d \[\d+\.\d, \d+\.\d\](?: \(\d+\.\d – \d+\.\d\))?")
TINY = "### Tiny models"


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


def sections(text: str) -> Iterator[str]:
    """The text of each section about the tiny models."""
    for part in text.split(TINY)[1:]:
        yield re.split(r"^#", part, maxsplit=1, flags=re.MULTILINE)[0]


def unknown_rows(text: str, detail: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of the page's tables of tiny models that no generated row contains, column by column."""
    rows = [row for section in sections(text) for row in rows_of(section)]
    return [row for row in rows if not any(row.items() <= known.items() for known in detail)]


def detail_rows() -> list[dict[str, str]]:
    return [row for file in sorted(RESULTS.glob("tiny*.md")) for row in rows_of(file.read_text())]


def test_tables_are_parts_of_the_generated_ones() -> None:
    text = (ROOT / "docs/results.md").read_text()
    detail = detail_rows()
    assert len(list(sections(text))) == 4 and sum(1 for part in sections(text) for _ in rows_of(part)) > 30
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


@pytest.mark.parametrize(("page", "number"), [("results.md", 100), ("guide.md", 10)])
def test_intervals_in_sentences_stand_in_the_generated_pages(page: str, number: int) -> None:
    generated = "".join(file.read_text() for file in sorted(RESULTS.rglob("*.md")))
    quoted = INTERVAL.findall((ROOT / "docs" / page).read_text())
    assert len(quoted) > number
    assert not [one for one in quoted if one not in generated]
    assert "13.3 [10.7, 16.1]" not in generated
