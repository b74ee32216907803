"""Heatmaps as HTML tables: values on hover, labels thinned out, and a narrow screen scrolls beside the rows' names.

A table needs no picture of its own for dark mode or paper, and its cells can be read aloud and copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from esi_ds.report.tables import Heatmap

LEVELS = 20  # of shade; the page's style has a class for each, a0 to a20 and r0 to r20
STRONGEST = (2.0, 4.0, 8.0, 16.0)  # a map of ratios has the full shade at the first of them that all stay below
MAX_LABELS = 16  # of columns, so that they stay apart
MAX_WITH_TEXT = 16  # columns whose cells have room for their values
MAX_SHADED = 2000  # numbers written out with shades; more have none, which takes some of their bytes off the page
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
MORE_THAN = 1000  # what is written of greater ratios, as those to a control that holds next to nothing
CHARACTER = 6.6  # pixels of a label's character, about
MAX_LABEL = 30  # characters of a label; the rest of a longer one is not shown


@dataclass(frozen=True)
class HeatCell:
    """shade: class of the style; empty where there is no such cell. tip: on hover. text: in the cell."""

    shade: str
    tip: str
    text: str


@dataclass(frozen=True)
class HeatRow:
    """span: rows that ``label`` stands for; 0 for a row without a label of its own."""

    label: str
    span: int
    cells: list[HeatCell]


@dataclass(frozen=True)
class HeatTable:
    """What the template draws. header: (label, columns that it stands for). Lengths are in pixels."""

    title: str
    scale: tuple[str, str]  # what the first and the last shade stand for
    is_ratio: bool
    axes: tuple[str, str]  # of rows and of columns
    header: list[tuple[str, int]]
    rows: list[HeatRow]
    label_width: int
    least_width: int
    greatest_width: int
    row_height: int
    numbers: HeatTable | None = None  # the same with every value written out


def heat_table(data: Heatmap, with_numbers: bool = True) -> HeatTable:
    """The table of a map. with_numbers: also the one that has the columns as rows and every value written out."""
    columns, rows = len(data.columns), len(data.rows)
    step = _step(columns)
    height = 20 if rows <= MAX_LABELS else 14 if rows <= 2 * MAX_LABELS else 9
    cells = _cells(data, shortened if columns <= MAX_WITH_TEXT and height > 9 else _unwritten)
    widest = _text_width([cell.text for row in cells for cell in row])
    cell = max(5.0, 24 / step, 28 if columns <= MAX_WITH_TEXT else 0, widest, _text_width(data.columns) / step)
    label = round(14 + _text_width([*data.rows, data.row_axis]))
    row_step = 1 if height > 9 else _step(rows)
    return HeatTable(
        data.title,
        _scale(data),
        data.is_ratio,
        (data.row_axis, data.column_axis),
        [_header_cell(data.columns[first], min(step, columns - first), cell) for first in range(0, columns, step)],
        [
            HeatRow(name, 0 if index % row_step else min(row_step, rows - index), row)
            for index, (name, row) in enumerate(zip(data.rows, cells, strict=True))
        ],
        label,
        round(label + columns * cell),
        round(label + columns * max(cell, 46)),
        height,
        _numbers(data) if with_numbers else None,
    )


def _text_width(labels: Sequence[str]) -> float:
    """Pixels of the longest label."""
    return CHARACTER * min(MAX_LABEL, max(map(len, labels)))


def _header_cell(label: str, span: int, width: float) -> tuple[str, int]:
    """The last columns may be too few for a label."""
    return (label if span * width >= _text_width([label]) else "", span)


def _step(count: int) -> int:
    return next((step for step in STEPS if count <= step * MAX_LABELS), count)


def _numbers(data: Heatmap) -> HeatTable:
    turned = replace(
        data,
        rows=data.columns,
        columns=data.rows,
        values=list(zip(*data.values, strict=True)),
        row_axis=data.column_axis,
        column_axis=data.row_axis,
    )
    table = heat_table(turned, with_numbers=False)
    cells = _cells(turned, _whole)
    if len(turned.rows) * len(turned.columns) > MAX_SHADED:
        cells = [[replace(cell, shade="") for cell in row] for row in cells]
    rows = [HeatRow(name, 1, row) for name, row in zip(turned.rows, cells, strict=True)]
    header = [(name, 1) for name in turned.columns]
    width = round(
        table.label_width + sum(max(_text_width([name]), 6 * CHARACTER) + CHARACTER for name in turned.columns)
    )
    return replace(table, rows=rows, header=header, least_width=width, row_height=18)


def _cells(data: Heatmap, text_of: Callable[[float], str]) -> list[list[HeatCell]]:
    strongest = _strongest(data)
    return [
        [
            HeatCell("", "", "")
            if math.isnan(value)
            else HeatCell(
                _ratio_shade(value, strongest) if data.is_ratio else f"a{round(LEVELS * value / strongest)}",
                f"{data.row_axis} {row}, {data.column_axis} {column}: {_text(value, 3)}",
                text_of(value),
            )
            for column, value in zip(data.columns, values, strict=True)
        ]
        for row, values in zip(data.rows, data.values, strict=True)
    ]


def _strongest(data: Heatmap) -> float:
    """The value that has the full shade."""
    most = max((value for row in data.values for value in row if math.isfinite(value)), default=0.0)
    return next((limit for limit in STRONGEST if most <= limit), STRONGEST[-1]) if data.is_ratio else most or 1.0


def _ratio_shade(value: float, strongest: float) -> str:
    """From r0 for the inverse of ``strongest`` and below to r20, in equal steps of the logarithm; r10 is 1."""
    distance = math.log(value, strongest) if value > 0 else -1.0
    return f"r{round(LEVELS / 2 * (1 + min(1.0, max(-1.0, distance))))}"


def _scale(data: Heatmap) -> tuple[str, str]:
    strongest = _text(_strongest(data), 3)
    if data.is_ratio:
        return f"1/{strongest} or less", f"{strongest} {data.unit} or more"
    return "0", f"{strongest} {data.unit}"


def shortened(value: float) -> str:
    """As ``_whole``, for a cell of a fixed width, which says of a larger value only that it is above ``MORE_THAN``."""
    return f"> {MORE_THAN:,}" if MORE_THAN < value < math.inf else _whole(value)


def _whole(value: float) -> str:
    return _text(value, 2)


def _unwritten(value: float) -> str:
    return ""


def _text(value: float, digits: int) -> str:
    """At least ``digits`` significant digits, never as a power of ten above 1."""
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if value >= 10**digits - 0.5 else f"{value:.{digits}g}"
