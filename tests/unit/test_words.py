"""Numbers in sentences."""

from __future__ import annotations

import pytest

from esi_ds.words import counted, first_of


@pytest.mark.parametrize(("number", "said"), [(0, "0 cells"), (1, "1 cell"), (2, "2 cells"), (21893, "21,893 cells")])
def test_one_has_no_plural(number: int, said: str) -> None:
    assert counted(number, "cell") == said


@pytest.mark.parametrize(("number", "end"), [(0, ""), (1, "0"), (20, "18; 19"), (1021, "18; 19 and 1,001 more")])
def test_a_long_list_is_cut(number: int, end: str) -> None:
    said = first_of(range(number), "; ")
    assert said.endswith(end) and said.count(";") == max(min(number, 20) - 1, 0)
