"""Numbers in sentences, and how sentences negate."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from esi_ds.words import counted, first_of


@pytest.mark.parametrize(("number", "said"), [(0, "0 cells"), (1, "1 cell"), (2, "2 cells"), (21893, "21,893 cells")])
def test_one_has_no_plural(number: int, said: str) -> None:
    assert counted(number, "cell") == said


@pytest.mark.parametrize(("number", "end"), [(0, ""), (1, "0"), (20, "18; 19"), (1021, "18; 19 and 1,001 more")])
def test_a_long_list_is_cut(number: int, end: str) -> None:
    said = first_of(range(number), "; ")
    assert said.endswith(end) and said.count(";") == max(min(number, 20) - 1, 0)


def test_messages_say_is_not_a() -> None:
    """Nothing "is no folder": docstrings, messages and pages of reports say that it is not one."""
    negated = re.compile(r"(?<!there )\b(is|are|was|were) no (?!longer|such|better)", re.IGNORECASE)
    files = [
        file
        for folder in ("esi_ds", "launch", "study", "slurm")
        for suffix in ("py", "j2", "sh", "sbatch")
        for file in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    assert len(files) > 200
    lines = ((file, line) for file in files for line in file.read_text().splitlines())
    assert not [f"{file.relative_to(ROOT)}: {line}" for file, line in lines if negated.search(line)]
