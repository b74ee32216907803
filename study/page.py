"""The detail pages ``docs/results/tiny*.md`` and their figures from ``docs/results/study.json``.

python -m study.page                     # pages from study.json as it is
python -m study.page --runs runs/study   # study.json from the run folders first: publishes them
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from esi_ds.artifacts import write_text_atomic
from esi_ds.data.rows import Row
from esi_ds.report.figures import figure_png
from study import findings, plots, tables
from study.grid import MODELS, POISONED, TASKS
from study.material import ROOT
from study.stored import read_study, write_study
from study.summary import summarise

RESULTS = ROOT / "docs/results"
STUDY = "study.json"
SPA_MODEL = "llama-aligned"  # whose tasks are drawn
HEAD = """\
Made by `python -m study.page` from `study.json`. What was run, and how to read it: [tiny.md](tiny.md). In words:
[Results](../results.md)."""
READING = f"""\
## How to read the tables

The models are the repository's tiny ones, about two million weights. Each seed has its own prompts for the mask,
its own noise and its own order of the data; all cells answer the same held-out prompts.

**Not refused**: an answer to a harmful request without refusal words, garbled answers included. **Unsafe**: the tiny
guard's verdict. It calls garbled compliance safe, so **unsafe or incoherent** is shown beside it. A benign answer is
right only if it does not refuse.

Rates are in per cent: pooled over the seeds' prompts [Wilson's 95 % interval] (least – greatest seed). The interval
treats the prompts of several seeds as independent, which they are not quite; the seeds' range shows what it leaves
out. Learning rates are chosen on the prompts that are reported, in the same way for every method. A method with more
learning rates has more chances, so each row has their number.

In paired tests a difference counts if p after Holm's correction is below {findings.ALPHA:g}, at least two seeds show
it and none points the other way. {tables.EDGE}: one of the two is compared at the highest or the lowest learning rate
that it was run at, in the seeds in parentheses. It might do better beyond that rate, and the test may only show which
mask learns faster.
"""
ONCE = """\
A paired test counts each prompt once, by the sign of its sum over the seeds, which share their prompts.
"""
ONCE_A_SEED = """\
**p of the paired tests may be far too small**: these count each prompt once in every seed (McNemar's test, exact),
although the seeds share their prompts. Newer tests count each prompt once.
"""


def counting(study: Row) -> str:
    """How often the paired tests count a prompt."""
    return ONCE if study["facts"].get("prompts_count_once") else ONCE_A_SEED


def picture(name: str) -> str:
    return f"![{name}]({name}.png)\n"


# ---------------------------------------------------------------- pages


def what_was_run(study: Row) -> str:
    about = study["facts"]
    cells = [[kind, str(done), str(wanted)] for kind, (done, wanted) in about["finished"].items()]
    steps = [[kind, name, str(count)] for kind, entries in about["settings"].items() for name, count in entries.items()]
    harmful, benign = (" or ".join(map(str, about["asked"][key])) for key in ("not_refused", "correct"))
    outside = about["outside_the_grid"]
    facts = [
        *([["judged folders of another grid, not shown", str(outside)]] if outside else []),
        ["seeds", ", ".join(map(str, about["seeds"]))],
        ["harmful prompts of a mask", str(about["prompts_of_a_mask"])],
        ["held-out prompts asked of a cell, greedily", f"{harmful} harmful, {benign} benign or of the task"],
        ["weights that LoRA trains (rank 1 on every matrix)", ", ".join(map(str, about["lora_weights"])) or "–"],
        ["wall time of the cells, added up", f"{about['wall_time_s'] / 60:.0f} min"],
        ["ranks of a cell", ", ".join(map(str, about["world_sizes"]))],
        ["machine", about["machine"]],
        *([name, ", ".join(entries)] for name, entries in about["versions"].items()),
        ["commit", ", ".join(about["commits"])],
    ]
    return f"""\
# The study of tiny models: what was run

Made by `python -m study.page` from `study.json`, which `make study` (`{about["command"]}`) makes. In words:
[Results](../results.md). The tables: [SET](tiny-set.md), [SPA](tiny-spa.md), [where masks lie](tiny-where.md),
[noise](tiny-noise.md).

{tables.table(["cells", "finished", "of"], cells)}
{tables.table(["tuning", "length", "cells"], steps)}
{tables.table(["fact", "value"], facts)}
{READING}
{counting(study)}
## Before tuning

{tables.untuned(study["untuned"])}"""


def set_page(study: Row) -> str:
    methods = study["set"]["methods"]
    pictures = [picture(name) for name in figures(study) if name.startswith(("tiny-set-", "tiny-ratios-"))]
    sections = [
        tables.set_section(methods, study["set"]["against"], model, ratio)
        for model, ratio in findings.tables_of(methods)
    ]
    return "\n".join(
        [
            f"# SET on tiny models: learning to refuse\n\n{HEAD}\n",
            counting(study),
            *pictures,
            *(sections or ["Not run.\n"]),
        ]
    )


def spa_page(study: Row) -> str:
    spa = study["spa"]
    text = [f"# SPA on tiny models: keeping safety\n\n{HEAD}\n", counting(study)]
    text += [picture(name) for name in figures(study) if name == "tiny-spa"]
    if not spa["settings"]:
        return "\n".join([*text, "Not run.\n"])
    text.append(
        f"**At equal task score**: of the learning rates that reach {100 * findings.TASK_SHARE:g} % of the score of "
        "nothing frozen in the same seed, the one with the fewest requests not refused.\n"
    )
    for model in sorted({row["model"] for row in spa["equal_task"]}):
        rows = [row for row in spa["equal_task"] if row["model"] == model]
        text += [f"## {model}\n", tables.spa_equal_task(rows)]
    text += ["## Paired tests at equal task score\n", tables.spa_tests(spa["tests"])]
    return "\n".join([*text, "## Every setting\n", tables.spa_settings(spa["settings"])])


def where_page(study: Row) -> str:
    masks, overlaps = study["masks"], study["stability"]
    text = [f"# Where masks lie in tiny models, and how stable they are\n\n{HEAD}\n", "## Where\n"]
    text.append("ESI's mask of 1 %: share of the mask in per cent (over share of the scored weights: 1× is chance).\n")
    text += [tables.mask_thirds(masks), picture("tiny-masks")] if masks else ["Not run.\n"]
    text += ["## The matrices that the paper names\n", "Share of the mask over share of the weights.\n"]
    text += [tables.claimed_parts(masks)] if masks else ["Not run.\n"]
    text += ["## How stable\n", "Two random masks of 1 % share 1 %. With gumbel the draws change with the seed too.\n"]
    text += [picture("tiny-stability"), tables.overlaps(overlaps)] if overlaps else ["Not run.\n"]
    return "\n".join(text)


def noise_page(study: Row) -> str:
    absent = [f"{model}-aligned" for model in MODELS if f"{model}-aligned" not in study["noise"]]
    text = [f"# Noise on the weights of tiny models\n\n{HEAD}\n"]
    if study["noise"]:
        text += [picture("tiny-noise"), tables.noise(study["noise"])]
    text += [f"Not run: {', '.join(absent)}.\n"] if absent else []
    return "\n".join(text)


PAGES: dict[str, Callable[[Row], str]] = {
    "tiny.md": what_was_run,
    "tiny-set.md": set_page,
    "tiny-spa.md": spa_page,
    "tiny-where.md": where_page,
    "tiny-noise.md": noise_page,
}


# ---------------------------------------------------------------- figures


def figures(study: Row) -> dict[str, Callable[[], Figure]]:
    """What draws each picture, by its file's name without the suffix. Pictures of what was not run are left out."""
    methods, settings = study["set"]["methods"], study["spa"]["settings"]
    drawn: dict[str, Callable[[], Figure]] = {}
    for model in sorted({row["model"] for row in methods}):
        drawn[f"tiny-set-{model}"] = partial(plots.set_frontiers, methods, model)
        if plots.other_ratios(methods, model):
            drawn[f"tiny-ratios-{model}"] = partial(plots.set_ratios, methods, model)
    tasks = [task for task in (*TASKS, POISONED) if any(_is_task(row, task) for row in settings)]
    if tasks:
        drawn["tiny-spa"] = lambda: plots.spa_frontiers(settings, SPA_MODEL, tasks)
    for name, rows, draw in (
        ("tiny-masks", study["masks"], plots.mask_maps),
        ("tiny-stability", study["stability"], plots.stability),
        ("tiny-noise", study["noise"], plots.noise),
    ):
        if rows:
            drawn[name] = partial(draw, rows)
    return drawn


def _is_task(row: Row, task: str) -> bool:
    return (row["model"], row["task"]) == (SPA_MODEL, task)


def write_picture(file: Path, drawn: Figure) -> None:
    # A palette: a third of the bytes. Median cut, the default, gives a few small points another's colour.
    image = Image.open(BytesIO(figure_png(drawn))).convert("RGB")
    image = image.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(file, optimize=True)


def write_pages(results: Path) -> None:
    """Pages and figures from the folder's study.json; figures of an earlier one are removed."""
    study = read_study(results / STUDY)
    for file in results.glob("tiny-*.png"):
        file.unlink()
    for name, draw in figures(study).items():
        write_picture(results / f"{name}.png", draw())
    meaning = os.path.relpath(ROOT / "docs/results.md", results)
    for name, page in PAGES.items():
        write_text_atomic(results / name, page(study).replace("../results.md", meaning))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="the study's run folders, to make study.json from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where study.json and the pages are")
    options = parser.parse_args()
    write(options.runs, options.results)
    print(", ".join(str(options.results / name) for name in PAGES))
    return 0


def write(runs: Path | None, results: Path = RESULTS) -> None:
    """study.json from the run folders, if any are named; then pages and figures from study.json."""
    if runs is not None:
        study = summarise(runs)
        results.mkdir(parents=True, exist_ok=True)
        write_study(results / STUDY, study)
    elif not (results / STUDY).is_file():
        raise SystemExit(f"error: --results = {results}: holds no {STUDY}; name run folders by --runs")
    write_pages(results)


if __name__ == "__main__":
    sys.exit(main())
