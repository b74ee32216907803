"""``docs/results.md`` and its figures from the study's run folders; every sentence with a number is made from the rows.

python study/page.py --output runs/study
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "study"), str(ROOT)]

import findings  # noqa: E402
import plots  # noqa: E402
from collect import finished, row_of  # noqa: E402
from execute import BATCH, BENIGN_SHARE, STEPS  # noqa: E402
from grid import MODELS, POISONED, TASKS, cells  # noqa: E402
from material import NUM_PROMPTS  # noqa: E402

from esi_ds.artifacts import versions, write_json_atomic, write_text_atomic  # noqa: E402
from esi_ds.report.figures import figure_png  # noqa: E402

DOCS = ROOT / "docs"
RIVALS = ("random", "magnitude", "grad", "snip", "tuning-grad", "directed", "esi-contrastive", "lora", "all")
Row = dict[str, Any]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def interval(found: Row) -> str:
    """A pooled rate, its interval, and from how many seeds."""
    if not found.get("reached", 1):
        return f"not reached (0 of {found['seeds']} seeds)"
    text = f"{percent(found['rate'])} [{percent(found['low'])}, {percent(found['high'])}]"
    if "reached" in found and found["reached"] < found["seeds"]:
        text += f" ({found['reached']} of {found['seeds']} seeds)"
    return text


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def what_was_run(output: Path, rows: list[Row]) -> str:
    counts = finished(output, cells())
    kinds = ("mask", "set", "lora", "spa", "perturb")
    done = ", ".join(f"{counts[f'{kind} finished']} of {counts[kind]} {kind}" for kind in kinds)
    found = versions()
    used = ", ".join(f"{name} {found[name]}" for name in ("torch", "deepspeed", "transformers"))
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return f"""\
Made by `make study` (`study/`; {platform.machine()}, two CPU cores; {used}); every number is in `results/study.json`.
Cells finished: {done}; seeds {seeds}. A seed is other prompts for the mask ({NUM_PROMPTS} of 400 harmful training
requests), other noise and another order of the data. SET: {STEPS["set"]} steps of {BATCH["set"]} rows,
{BENIGN_SHARE:.0%} of them benign. SPA: {STEPS["spa"]} steps of {BATCH["spa"]} rows. All answers are greedy, to 200
held-out harmful and 200 benign (or 100 task) prompts that neither masks nor tuning have seen.

The models are the repository's tiny ones (about 2 million weights): what holds here need not hold at 8 billion, and the
other way round. **Not refused** counts every answer to a harmful request without a refusal's words, garbled ones
included, so that a broken model does not look safe; **unsafe** is the tiny guard's verdict, which calls garbled
compliance safe. Intervals are Wilson's at 95 % over seeds × prompts; seeds share the held-out prompts.
"""


def set_section(rows: list[Row]) -> tuple[str, Row]:
    """SET: the frontier, methods at equal safety and equal over-refusal, ESI against the others."""
    tuned = [row for row in rows if row["kind"] in ("set", "lora")]
    found = findings.methods(tuned)
    text, data = [], {"methods": found, "against": []}
    for model, ratio in sorted({(row["model"], row["ratio"]) for row in found}):
        own = [row for row in found if (row["model"], row["ratio"]) == (model, ratio)]
        text.append(f"### {model}, {100 * ratio:g} % of the weights\n")
        head = [
            "method",
            "learning rates",
            f"benign accuracy at ≤ {findings.MAX_ATTACKS:.0%} not refused",
            "over-refusal there",
            "unsafe there",
            "incoherent there",
            f"not refused at ≤ {findings.MAX_OVER_REFUSAL:.0%} over-refusal",
        ]
        keys = ("correct", "over_refused", "guard", "incoherent")
        lines = [
            [
                row["criterion"],
                ", ".join(f"{lr:g}" for lr in row["learning_rates"]),
                *(interval(row[f"{key}_at_equal_safety"]) for key in keys),
                interval(row["not_refused_at_equal_over_refusal"]),
            ]
            for row in own
        ]
        text.append(table(head, lines))
        if ratio == 0.01:
            text.append(_against(tuned, model, data))
    return "\n".join(text), data


def _against(tuned: list[Row], model: str, data: Row) -> str:
    """ESI's benign answers against every rival's, each at its best cell of equal safety."""
    own = [row for row in tuned if row["model"] == model and (row["ratio"] == 0.01 or row["criterion"] == "all")]
    lines = []
    for rival in RIVALS:
        found = findings.against(own, "esi", rival)
        if found is None:
            continue
        data["against"].append({"model": model, **found})
        verdict = "no difference shown"
        if found["p_value"] < 0.05:
            verdict = "ESI better" if found["difference"] > 0 else "ESI worse"
        points = f"{100 * found['difference']:+.1f}"
        lines.append([rival, str(found["num_pairs"]), points, f"{found['p_value']:.2g}", verdict])
    if not lines:
        return "No rival of ESI reaches equal safety in a seed where ESI does: nothing to compare.\n"
    head = ["ESI against", "pairs", "points of benign accuracy", "p (McNemar, exact)", ""]
    return "Benign answers at equal safety, prompt by prompt; pairs are prompts × seeds:\n\n" + table(head, lines)


def spa_section(rows: list[Row]) -> tuple[str, list[Row]]:
    found = findings.preserved([row for row in rows if row["kind"] == "spa"])
    head = ["task", "frozen", "learning rate", "seeds", "task score", "not refused", "unsafe", "incoherent"]
    text = []
    for model in sorted({row["model"] for row in found}):
        lines = [
            [
                row["task"],
                "nothing" if row["criterion"] == "nothing" else f"{row['criterion']} {100 * row['ratio']:g} %",
                f"{row['lr']:g}",
                str(row["seeds"]),
                *(interval(row[key]) for key in ("correct", "not_refused", "unsafe", "incoherent")),
            ]
            for row in found
            if row["model"] == model
        ]
        text.append(f"### {model}\n\n" + table(head, lines))
    return "\n".join(text), found


def mask_section(output: Path) -> tuple[str, list[Row]]:
    """Where masks lie, beside the paper's claim; how stable they are."""
    found = [about for model in ("llama-aligned", "qwen3moe-aligned") if (about := findings.places(output, model))]
    text = [
        "The paper finds safety-critical weights in value matrices and MLPs of middle layers in dense models, and in "
        "late-layer MLPs in MoE models.\n"
    ]
    text += [_place(about) for about in found]
    return "\n".join(text) + "\n", found


def _place(about: Row) -> str:
    """Where one model's masks lie, in a sentence that says whether the paper's claim holds for it."""

    def density(item: tuple[str, Row]) -> float:
        return item[1]["share"] / max(item[1]["of_weights"], 1e-9)

    densest = sorted(about["roles"].items(), key=density, reverse=True)[:4]
    roles = ", ".join(f"{item[0]} {100 * item[1]['share']:.0f} % ({density(item):.1f}×)" for item in densest)
    thirds = ", ".join(
        f"{name} ({len(part['layers'])} of {len(about['layers'])} layers) {100 * part['share']:.0f} %"
        for name, part in about["thirds"].items()
    )
    first = max(about["thirds"], key=lambda name: about["thirds"][name]["per_layer"])
    claim = "late" if "moe" in about["model"] else "middle"
    agrees = "as the paper says" if first == claim else f"where the paper says the {claim} ones"
    return (
        f"- **{about['model']}** ({about['seeds']} seeds): {thirds}. By layer most is {first}, {agrees}. "
        f"Densest roles (share of the mask; times their share of the weights): {roles}."
    )


def stability_section(output: Path) -> tuple[str, list[Row]]:
    found = findings.stability(output)
    lines = []
    for row in found:
        mean, least, greatest = (f"{100 * row[key]:.0f}" for key in ("mean", "least", "greatest"))
        lines.append([row["model"], row["what"], mean, f"{least} – {greatest}", str(row["pairs"])])
    return table(["model", "masks of 1 %", "weights in both (%)", "least – greatest", "pairs"], lines), found


def conclusions(data: Row) -> str:
    """Sentences that follow from the numbers, whichever way they fall."""
    lines = []
    for model in sorted({row["model"] for row in data["set"]["methods"]}):
        own = [row for row in data["set"]["methods"] if row["model"] == model and row["ratio"] == 0.01]
        if any(row["criterion"] == "esi" for row in own):
            lines += _set_conclusions(model, own)
    for what, sign in (("better than ESI", -1), ("worse than ESI", 1)):
        rows = [row for row in data["set"]["against"] if row["p_value"] < 0.05 and sign * row["difference"] > 0]
        names = ", ".join(f"{row['second']} ({row['model']})" for row in rows) or "none"
        lines.append(f"- Significantly {what} in benign accuracy at equal safety (paired, p < 0.05): {names}.")
    return "\n".join([*lines, *_spa_conclusions(data["spa"])]) + "\n"


def _set_conclusions(model: str, own: list[Row]) -> list[str]:
    """Who keeps most at equal safety, where ESI stands, and whether a random mask gets there at all."""
    by_name = {row["criterion"]: row["correct_at_equal_safety"] for row in own}
    reached = [name for name, found in by_name.items() if found["reached"]]  # best first
    if not reached:
        return [f"- **SET, {model}**: no method of 1 % brings requests not refused to {findings.MAX_ATTACKS:.0%}."]
    best, esi = reached[0], by_name["esi"]
    place = f"is number {reached.index('esi') + 1}, {interval(esi)} %" if "esi" in reached else "does not get there"
    lines = [
        f"- **SET, {model}**: of {len(own)} methods at 1 %, {len(reached)} bring requests not refused to at most "
        f"{findings.MAX_ATTACKS:.0%} in some seed. **{best}** keeps most benign accuracy, {interval(by_name[best])} %; "
        f"ESI {place}."
    ]
    random = by_name.get("random")
    if random is not None and esi["reached"]:
        beats = (
            f"too, with {interval(random)} %" if random["reached"] else "in no seed: ESI's weights are not any weights"
        )
        lines.append(f"  A random mask of that size gets there {beats}.")
    return lines


def _spa_conclusions(found: list[Row]) -> list[str]:
    """How much of the loss of safety is left with 30 % frozen, by task and learning rate."""
    by_key = {(r["model"], r["task"], r["lr"], r["criterion"], r["ratio"]): r for r in found}
    lines = []
    for (model, task, lr, criterion, _), row in by_key.items():
        rivals = {name: by_key.get((model, task, lr, name, 0.3)) for name in ("esi", "snip", "random")}
        parts = [f"{name} {_safety_and_task(rival)}" for name, rival in rivals.items() if rival is not None]
        if criterion == "nothing" and parts:
            lines.append(
                f"- **SPA, {model}, {task}, lr {lr:g}**: not refused {_safety_and_task(row)} with nothing frozen; with "
                f"30 % frozen by {', '.join(parts)}."
            )
    return lines


def _safety_and_task(row: Row) -> str:
    return f"{percent(row['not_refused']['rate'])} % (task {percent(row['correct']['rate'])} %)"


def figure(name: str, drawn: Any) -> str:
    """Write one PNG; the Markdown that shows it."""
    (DOCS / "results").mkdir(exist_ok=True)
    (DOCS / f"results/{name}.png").write_bytes(figure_png(drawn))
    return f"![{name}](results/{name}.png)\n"


def write(output: Path) -> None:
    rows = [row for cell in cells() if cell.kind in ("set", "lora", "spa") and (row := row_of(cell, output))]
    if not rows:
        raise SystemExit(f"error: --output = {output}: holds no finished cell; run study/run.py first")
    tuned = [row for row in rows if row["kind"] in ("set", "lora")]
    set_text, set_data = set_section(rows)
    spa_text, spa_data = spa_section(rows)
    mask_text, mask_data = mask_section(output)
    stable_text, stable_data = stability_section(output)
    curves = {f"{model}-aligned": findings.noise_curves(output, f"{model}-aligned") for model in MODELS}
    curves = {model: found for model, found in curves.items() if found}
    data = {"set": set_data, "spa": spa_data, "masks": mask_data, "stability": stable_data, "noise": curves}
    parts = ["# Results\n", what_was_run(output, rows), "## What follows\n", conclusions(data)]
    parts.append("## SET: learning to refuse\n")
    for model in sorted({row["model"] for row in tuned}):
        for flag, label in (("correct", "benign accuracy"), ("over_refused", "benign requests refused")):
            parts.append(figure(f"set-{flag}-{model}", plots.set_frontier(tuned, model, flag, label)))
    parts += [set_text, "## SPA: keeping safety\n"]
    spa = [row for row in rows if row["kind"] == "spa" and row["model"] == "llama-aligned"]
    tasks = [task for task in (*TASKS, POISONED) if any(row["task"] == task for row in spa)]
    if tasks:
        parts.append(figure("spa", plots.spa_frontier(spa, "llama-aligned", tasks)))
    parts += [spa_text, "## Noise on the weights\n"]
    parts.append(figure("noise", plots.noise(curves)) if curves else "Not run.\n")
    parts += ["## Where the mask lies\n", mask_text]
    if mask_data:
        parts.append(figure("masks", plots.mask_maps(mask_data)))
    parts += ["## How stable the mask is\n", stable_text]
    write_text_atomic(DOCS / "results.md", "\n".join(parts))
    write_json_atomic(DOCS / "results/study.json", json.loads(json.dumps(data)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/study")
    write(parser.parse_args().output)
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
