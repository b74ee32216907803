"""Numbers in sentences."""

from __future__ import annotations

import pytest

from esi_ds.words import counted


@pytest.mark.parametrize(("number", "said"), [(0, "0 cells"), (1, "1 cell"), (2, "2 cells"), (21893, "21,893 cells")])
def test_one_has_no_plural(number: int, said: str) -> None:
    assert counted(number, "cell") == said
