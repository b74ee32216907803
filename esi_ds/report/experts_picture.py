"""One picture from the report of a mixture: layer × expert maps of every mask, of its scores, and of the routing.

    python -m esi_ds.report.experts_picture RUN picture.png

reads the ``report.json`` of an ESI run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from esi_ds.artifacts import check_result
from esi_ds.errors import UserError, ends_with_message
from esi_ds.reading import read_json, reading
from esi_ds.report.figures import STYLE, draw_heatmap, figure_png
from esi_ds.report.tables import Heatmap, layer_by_expert, routing_maps
from esi_ds.terminal import clean_output


def experts_png(run: Path) -> bytes:
    """PNG bytes: share of each mask, its mean score, and how often routers choose each expert for each set of prompts.

    Raises UserError where ``run`` does not hold the report of a mixture.
    """
    file = run / "report.json"
    if not file.is_file():
        raise UserError("RUN", str(run), "holds no report.json", "give the folder of a finished ESI run")
    check_result(run, file.name, "RUN", "give the folder of a finished ESI run")
    report = read_json(file, dict[str, Any], "RUN", "give the folder of a finished ESI run")
    with reading("RUN", run, "give the folder of a finished ESI run", "holds a report.json that is damaged"):
        heatmaps = list(_mask_maps(report))
        heatmaps += routing_maps(report["routing"]) if heatmaps else []
    if not heatmaps:
        raise UserError("RUN", str(run), "is the report of a model without experts", "give one of a mixture's ESI run")
    with plt.rc_context(STYLE):
        num_rows = -(-len(heatmaps) // 2)
        figure, panels = plt.subplots(num_rows, 2, figsize=(13, 2.9 * num_rows), squeeze=False)
        for axes, data in zip(panels.flat, heatmaps, strict=False):
            draw_heatmap(axes, data)
        for axes in panels.flat[len(heatmaps) :]:
            axes.remove()
        figure.tight_layout()
    return figure_png(figure)


def _mask_maps(report: dict[str, Any]) -> Iterator[Heatmap]:
    """Share and mean score of every mask, by criterion where there are several; none of a dense model."""
    masks = [report, *report.get("further_masks", [])]
    for mask in masks:
        selection = mask.get("selection", {})
        maps = layer_by_expert(mask.get("units", []), selection.get("k", 1))
        for data in maps[::2]:  # the density says little of experts, which are of one size
            yield data if len(masks) == 1 else replace(data, title=f"{selection['criterion']}: {data.title}")


@clean_output()
@ends_with_message
def main() -> int:
    """The command line. Returns the exit code."""
    if len(sys.argv) != 3:
        print("error: give the folder of an ESI run and the picture to write", file=sys.stderr)
        return 2
    Path(sys.argv[2]).write_bytes(experts_png(Path(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
