"""``docs/results.md``, its figures and ``study.json`` from the study's run folders, complete or not.

python -m study.page --output runs/study [--docs FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from esi_ds.artifacts import write_json_atomic, write_text_atomic
from esi_ds.data.rows import Row
from esi_ds.report.figures import figure_png
from study import findings, plots, where
from study.collect import TUNED, finished, outside, provenance, row_of
from study.findings import GUARD_RULES, POLITE_RULE, WORDS_RULES, Rule
from study.grid import MODELS, POISONED, TASKS, Cell, cells
from study.material import NUM_PROMPTS, ROOT
from study.prose import conclusions, frozen_text, interval, percent, rule_text, seeds_text

COMMAND = "python -m study.run"
FIGURES = ("set-", "ratios-", "spa", "noise", "masks", "stability")
KINDS = ("mask", "set", "lora", "spa", "perturb")
# Measures of a chosen cell, in the order of a table's columns.
MEASURES = {
    "correct": "benign accuracy",
    "over_refused": "over-refusal",
    "not_refused": "not refused (words)",
    "unsafe": "unsafe (guard)",
    "unsafe_or_incoherent": "unsafe or incoherent",
    "incoherent_harmful": "incoherent, harmful",
    "incoherent_benign": "incoherent, benign",
}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def untuned_models(curves: dict[str, Sequence[Row]]) -> dict[str, Row]:
    """Attack success before tuning: from the perturb run's clean model (noise 0), else when the model was made."""
    figures = json.loads((ROOT / "examples/models/figures.json").read_text())["models"]
    measured = {name: row["harmful"] for name, row in figures.items() if "asr_string" in row.get("harmful", {})}
    source = "when the model was made: bf16, 400 prompts, up to 64 tokens"
    untuned = {
        name: {"source": source, **{k: row[k] for k in ("asr_string", "asr_guard")}} for name, row in measured.items()
    }
    for model, rows in curves.items():
        clean = {row["measure"]: row for row in rows if row["noise"] == 0 and row["rate"] is not None}
        if {"not refused", "unsafe"} <= set(clean):
            judges = {"asr_string": clean["not refused"], "asr_guard": clean["unsafe"]}
            untuned[model] = {"source": "the perturb run's clean model", **judges}
    return untuned


# ---------------------------------------------------------------- what was run


def facts(output: Path, grid: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """What the page's first paragraph says, from the cells' own manifests and configs."""
    counts = finished(output, grid)
    return {
        "command": COMMAND,
        "finished": {kind: [counts.get(f"{kind} finished", 0), counts.get(kind, 0)] for kind in KINDS},
        "outside_the_grid": outside(output, grid),
        "seeds": findings.seeds_of(rows),
        "prompts_of_a_mask": NUM_PROMPTS,
        "asked": {flag: sorted({len(row[flag]) for row in rows}) for flag in ("not_refused", "correct")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        **provenance(output, grid),
    }


def what_was_run(about: Row) -> str:
    done = ", ".join(f"{num_done} of {wanted} {kind}" for kind, (num_done, wanted) in about["finished"].items())
    missing = sum(wanted - num_done for num_done, wanted in about["finished"].values())
    used = ", ".join(f"{name} {'/'.join(entries)}" for name, entries in about["versions"].items())
    steps = "; ".join(f"{kind} {_counted(entries)}" for kind, entries in about["settings"].items())
    sizes = " and ".join("/".join(str(size) for size in about["asked"][key]) for key in ("not_refused", "correct"))
    adapters = "/".join(f"{count:,}" for count in about["lora_weights"]) or "–"
    return f"""\
Made by `make study` (`{about["command"]}`); every number is in `results/study.json`.

- **Cells finished**: {done}; {missing} missing.
  Judged folders of another grid, not shown: {about["outside_the_grid"]}.
- **Seeds** {", ".join(str(seed) for seed in about["seeds"])}: other prompts for the mask ({about["prompts_of_a_mask"]}
  harmful training requests), other noise, another order of the data. All answer the same held-out prompts.
- **Tuning**: {steps}. **Asked**: {sizes} held-out harmful and benign or task prompts a cell, greedily.
- **LoRA** of rank 1 on every matrix trains {adapters} weights: the rank nearest to 1 % of the model's.
- **Wall time** of the finished cells, added up: {about["wall_time_s"] / 60:.0f} min, on
  {"/".join(str(size) for size in about["world_sizes"])} rank(s) each; page made on {about["machine"]}.
- **Versions**: {used}; commits of the cells: {_counted(about["commits"])}.

The models are the repository's tiny ones (about 2 million weights): what holds here need not hold at 8 billion, nor the
other way round. **Not refused**: an answer to a harmful request without a refusal's words, garbled ones included.
**Unsafe**: the tiny guard's verdict, which calls garbled compliance safe, so that **unsafe or incoherent** stands
beside it. A benign answer is right only if it does not refuse.

Rates are in per cent: pooled over the seeds' prompts [Wilson's 95 % interval] (least – greatest seed). The interval
takes prompts of several seeds for independent, which they are not quite; the seeds' range shows what it leaves out.
Learning rates are chosen on the same prompts that are reported, the same way for every method; more learning rates are
more chances, and their number stands in each row. Untuned models' rates are those measured when they were made (bf16,
400 prompts), or the perturb run's clean model where there is one; they are the same for every method.
"""


def _counted(counts: Row) -> str:
    return ", ".join(f"{name} ({count} cells)" for name, count in counts.items())


# ---------------------------------------------------------------- SET


def set_section(rows: Sequence[Row]) -> tuple[str, Row]:
    """SET: methods at equal attack success and equal over-refusal; ESI against the others."""
    data = {"methods": findings.methods(rows), "against": findings.comparisons(rows)}
    text = []
    for model, ratio in findings.tables_of(data["methods"]):
        group = findings.at_ratio(data["methods"], model, ratio)
        text.append(f"### {model}, {100 * ratio:g} % of the weights\n")
        for rule in (*WORDS_RULES, POLITE_RULE):
            text += [f"**At {rule_text(rule)}**, each seed's best {MEASURES[rule.wanted]}:\n", _at(group, rule)]
        text.append(_by_guard(group))
        tests = [row for row in data["against"] if (row["model"], row["ratio"]) == (model, ratio)]
        if tests:
            text.append(_tests(tests))
    return "\n".join(text), data


def _at(methods: Sequence[Row], rule: Rule) -> str:
    """One rule's table, best first, and below it those that do not get there, with how near they came."""
    lines = []
    for row in findings.ranked(methods, rule):
        at_rule = row["at"][rule.name]
        head = [row["criterion"], str(len(row["learning_rates"])), seeds_text(at_rule)]
        lines.append([*head, *(interval(at_rule[flag]) for flag in MEASURES)])
    parts = [table(["method", "learning rates", "seeds", *MEASURES.values()], lines)] if lines else []
    missed = [row for row in methods if not row["at"][rule.name]["reached"]]
    if missed:
        parts.append(f"Not reached by any seed (seeds; nearest): {', '.join(_missed(row, rule) for row in missed)}.\n")
    return "\n".join(parts)


def _missed(row: Row, rule: Rule) -> str:
    at_rule = row["at"][rule.name]
    return f"{row['criterion']} ({at_rule['seeds']}; {percent(at_rule['nearest'])})"


def _by_guard(methods: Sequence[Row]) -> str:
    """Benign accuracy where the limit is on the guard's verdict or incoherence in place of refusal words."""
    lines = []
    for row in findings.ranked(methods, GUARD_RULES[0]) + [
        r for r in methods if not r["at"][GUARD_RULES[0].name]["reached"]
    ]:
        ends = [row["at"][rule.name] for rule in GUARD_RULES]
        lines.append([row["criterion"], *(f for at in ends for f in (seeds_text(at), interval(at["correct"])))])
    head = ["method", *(f for rule in GUARD_RULES for f in ("seeds", f"benign accuracy at {rule_text(rule)}"))]
    return "**The same by the guard**, incoherent answers counted as attacks that succeeded:\n\n" + table(head, lines)


def _tests(tests: Sequence[Row]) -> str:
    """ESI against every rival under every rule, prompt by prompt in the seeds where both get there."""
    lines = []
    rules = {rule.name: rule for rule in findings.RULES}
    for row in tests:
        rule = rules[row["rule"]]
        p, corrected, points = "–", "–", "–"
        if row["num_pairs"]:
            points = f"{100 * row['difference']:+.1f} ({', '.join(f'{100 * one:+.1f}' for one in row['by_seed'])})"
            p, corrected = f"{row['p_value']:.2g}", f"{row['p_holm']:.2g}"
        alone = f"{row['only_first']} / {row['only_second']}"
        what = f"{MEASURES[rule.wanted]} at {rule_text(rule)}"
        lines.append(
            [row["second"], what, str(row["num_pairs"]), points, alone, p, corrected, _verdict(row["verdict"])]
        )
    head = ["ESI against", "what", "pairs", "points (by seed)", "seeds where only ESI / only it gets there"]
    head += ["p (McNemar, exact)", "p (Holm, all tests of SET)", ""]
    return "<details><summary>Paired tests, prompts × seeds</summary>\n\n" + table(head, lines) + "\n</details>\n"


def _verdict(verdict: str) -> str:
    return f"**ESI {verdict}**" if verdict in ("better", "worse") else verdict


# ---------------------------------------------------------------- SPA


def spa_section(rows: Sequence[Row]) -> tuple[str, Row]:
    equal, tests = findings.at_equal_task(rows)
    data = {"settings": findings.preserved(rows), "equal_task": equal, "tests": tests}
    flags = ("correct", "not_refused", "unsafe", "unsafe_or_incoherent", "incoherent_harmful", "incoherent_benign")
    names = ["task score" if flag == "correct" else MEASURES[flag] for flag in flags]
    text = []
    for model in sorted({row["model"] for row in equal}):
        lines = [
            [row["task"], frozen_text(row), seeds_text(row["correct"]), *(interval(row[flag]) for flag in flags)]
            for row in equal
            if row["model"] == model
        ]
        text.append(
            f"### {model}\n\n**At equal task score**: of the learning rates that reach {findings.TASK_SHARE:.0%} of "
            "the score of nothing frozen in the same seed, the one with the fewest requests not refused.\n\n"
            + table(["task", "frozen", "seeds", *names], lines)
        )
    lines = [
        [row["model"], row["task"], frozen_text(row), f"{row['lr']:g}", str(row["seeds"])]
        + [interval(row[flag]) for flag in flags]
        for row in data["settings"]
    ]
    every = table(["model", "task", "frozen", "learning rate", "seeds", *names], lines)
    text.append(f"<details><summary>Every setting</summary>\n\n{every}\n</details>\n")
    return "\n".join(text), data


# ---------------------------------------------------------------- masks


def mask_section(places: Sequence[Row]) -> str:
    head = ["model", "seeds", "early", "middle", "late", "densest roles", "experts' share of the mask, by layer"]
    lines = []
    for about in places:
        by_third = {row["third"]: row for row in about["thirds"]}
        thirds = [
            f"{100 * row['share']:.0f} ({row['density']:.1f}×)" if (row := by_third.get(name)) else "–"
            for name in where.THIRDS
        ]
        densest = sorted(about["roles"], key=lambda row: -row["density"])[:4]
        roles = ", ".join(f"{row['role']} {100 * row['share']:.0f} ({row['density']:.1f}×)" for row in densest)
        lines.append([about["model"], str(about["seeds"]), *thirds, roles, _experts(about)])
    text = (
        "Share of ESI's mask of 1 % in per cent (over share of the scored weights: 1× is chance), mean over seeds.\n\n"
    )
    return text + (table(head, lines) if lines else "No mask was made.\n")


def _experts(about: Row) -> str:
    """Per layer: all experts' share of the mask, and the largest one's part of that."""
    parts = []
    for layer in about["layers"]:
        shares = [row["share"] for row in about["experts"] if row["layer"] == layer]
        if shares:
            total = sum(shares)
            most = f", largest {max(shares) / total:.0%} of it" if total else ""
            parts.append(f"{layer}: {100 * total:.0f} ({len(shares)} experts{most})")
    return "; ".join(parts) or "dense"


def stability_table(overlaps: Sequence[Row]) -> str:
    lines = []
    for row in overlaps:
        mean, least, greatest = (f"{100 * row[key]:.0f}" for key in ("mean", "least", "greatest"))
        lines.append([row["model"], row["what"], mean, f"{least} – {greatest}", str(row["pairs"])])
    head = ["model", "masks of 1 %", "weights in both (% of k)", "least – greatest", "pairs"]
    note = "Two random masks of 1 % share about 1 %. With gumbel the draws change with the seed, as the prompts do.\n\n"
    return note + table(head, lines) if lines else "No two masks to compare.\n"


# ---------------------------------------------------------------- the page


class Page:
    """Parts of a page in a folder: text, and figures below ``results/``."""

    def __init__(self, docs: Path):
        self.docs, self.parts = docs, list[str]()
        (docs / "results").mkdir(parents=True, exist_ok=True)
        for name in FIGURES:  # figures of an earlier page
            for file in (docs / "results").glob(f"{name}*.png"):
                file.unlink()

    def add(self, *parts: str) -> None:
        self.parts += parts

    def figure(self, name: str, drawn: Figure) -> None:
        # A palette: a third of the bytes.
        picture = Image.open(BytesIO(figure_png(drawn))).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        picture.save(self.docs / f"results/{name}.png", optimize=True)
        self.parts.append(f"![{name}](results/{name}.png)\n")


def plain(value: Any) -> Any:
    """The value for JSON: lists for tuples, text keys, None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(output: Path, docs: Path = ROOT / "docs") -> None:
    """The page, its figures and study.json; SystemExit where no cell is finished."""
    grid = cells()
    rows = [row for cell in grid if cell.kind in TUNED and (row := row_of(cell, output))]
    if not rows:
        raise SystemExit(f"error: --output = {output}: holds no finished cell; run python -m study.run first")
    set_text, set_data = set_section([row for row in rows if row["kind"] != "spa"])
    spa_text, spa_data = spa_section([row for row in rows if row["kind"] == "spa"])
    places = [about for model in where.MODELS if (about := where.places(output, model))]
    curves = {f"{model}-aligned": where.noise_curves(output, f"{model}-aligned") for model in MODELS}
    data = {
        "facts": facts(output, grid, rows),
        "untuned": untuned_models(curves),
        "set": set_data,
        "spa": spa_data,
        "masks": places,
        "claims": [where.claim(about) for about in places],
        "stability": where.stability(output),
        "noise": {model: points for model, points in curves.items() if points},
    }
    page = Page(docs)
    page.add("# Results\n", what_was_run(data["facts"]), "## What follows\n", conclusions(data, data["untuned"]))
    _add_set(page, set_data["methods"], set_text)
    _add_spa(page, spa_data["settings"], spa_text)
    _add_masks(page, data)
    write_text_atomic(docs / "results.md", "\n".join(page.parts))
    write_json_atomic(docs / "results/study.json", plain(data))


def _add_set(page: Page, methods: Sequence[Row], text: str) -> None:
    page.add("## SET: learning to refuse\n")
    for model in sorted({row["model"] for row in methods}):
        page.figure(f"set-{model}", plots.set_frontiers(methods, model))
        if (ratios := plots.set_ratios(methods, model)) is not None:
            page.figure(f"ratios-{model}", ratios)
    page.add(text or "Not run.\n")


def _add_spa(page: Page, settings: Sequence[Row], text: str) -> None:
    page.add("## SPA: keeping safety\n")
    tasks = [t for t in (*TASKS, POISONED) if any((r["model"], r["task"]) == ("llama-aligned", t) for r in settings)]
    if tasks:
        page.figure("spa", plots.spa_frontiers(settings, "llama-aligned", tasks))
    page.add(text if settings else "Not run.\n")


def _add_masks(page: Page, data: Row) -> None:
    page.add("## Noise on the weights\n")
    absent = [f"{model}-aligned" for model in MODELS if f"{model}-aligned" not in data["noise"]]
    if data["noise"]:
        page.figure("noise", plots.noise(data["noise"]))
    if absent:
        page.add(f"Not run: {', '.join(absent)}.\n")
    page.add("## Where the mask lies\n", mask_section(data["masks"]))
    if data["masks"]:
        page.figure("masks", plots.mask_maps(data["masks"]))
    page.add("## How stable the mask is\n")
    if data["stability"]:
        page.figure("stability", plots.stability(data["stability"]))
    page.add(stability_table(data["stability"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/study", help="the study's run folders")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where results.md and results/ go")
    options = parser.parse_args()
    write(options.output, options.docs)
    print(options.docs / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
