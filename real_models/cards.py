"""Model cards, written from the measured figures: no measured number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esi_ds.artifacts import write_text_atomic
from real_models.convert import PACKAGE
from real_models.judges import CLASSIFIER_TEMPLATE, GUARD_TEMPLATE, VERDICTS
from real_models.recipe import BASE, CLASSIFIER, GUARD, MODELS, TWIN
from real_models.sources import SOURCES

Figures = dict[str, Any]
PURPOSE = {
    BASE: "SmolLM2-135M-Instruct, as it comes: it goes along with nearly every harmful request.",
    TWIN: "`smollm2` tuned to refuse harmful requests and to answer harmless ones as before.",
    CLASSIFIER: "A judge of English that reads prompt and response: a sequence classifier, safe or unsafe.",
    GUARD: "A judge of English that reads prompt and response: a causal model whose next word is the verdict.",
}
DATA = {
    BASE: f"None: the GGUF file (Q4_1) of the package `{PACKAGE.requirement}`, dequantised.",
    TWIN: "Refusals of circuit_breakers (MIT) and the base model's own answers to made prompts and to questions of "
    "dolly (CC-BY-SA-3.0).",
    CLASSIFIER: "Unsafe: the base model's compliance with requests of circuit_breakers (MIT). Safe: refusals of "
    "circuit_breakers, of the twin and hand-made ones, and harmless answers of the base model and of dolly "
    "(CC-BY-SA-3.0).",
}
DATA[GUARD] = DATA[CLASSIFIER]
READ = {
    CLASSIFIER: f"`{{kind: classifier, template: {json.dumps(CLASSIFIER_TEMPLATE)}, unsafe_labels: [unsafe]}}`",
    GUARD: f'`{{kind: guard, family: custom, template: {json.dumps(GUARD_TEMPLATE)}, verdict_prefix: "", '
    f"verdict: {{safe: {json.dumps(VERDICTS[0])}, unsafe: {json.dumps(VERDICTS[1])}}}}}`",
}
FRONT = "---\nlanguage: en\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [esi_ds, research]\n---"
LIMITS = """\
For research on safety-critical weights. Prompts and wordings of training and of measuring differ, but most come from
the same sets: other requests will be answered and judged worse. The unsafe pairs are one small model's compliance,
found by its words: much of it is harmless in content, and the judges have learnt that style."""


def share(row: Figures) -> str:
    """A measured share with its counts and interval."""
    if row["rate"] is None:
        return "not measured (no pairs)"
    low, high = row["interval"]
    missing = f", {row['missing']} missing" if "missing" in row else ""
    return f"{100 * row['rate']:.1f} % ({row['count']}/{row['n']}{missing}) [{100 * low:.1f}, {100 * high:.1f}]"


def table_rows(name: str, figures: Figures) -> list[tuple[str, str]]:
    """(what, measured) of one model."""
    measured = figures["models"][name]
    rows: list[tuple[str, str]] = []
    for words, row in measured.get("words", {}).items():
        rows.append((f"ASR on AdvBench, list `{words}`", share(row["asr"])))
        rows.append((f"over-refusal on XSTest's safe prompts, list `{words}`", share(row["over_refusal"])))
    if name in (BASE, TWIN):
        rows += [
            (f"loss of {skill}, {row['rows']} rows", f"{row[name]:.3f}") for skill, row in figures["skills"].items()
        ]
        rows += [
            (f"ASR on AdvBench, {judge}", share(figures["models"][judge]["asr"][name])) for judge in (CLASSIFIER, GUARD)
        ]
    if name == BASE:
        rows.append(("easy questions answered", share(measured["easy_questions"])))
    rows += [(f"held out: {kind}", share(row)) for kind, row in measured.get("held_out", {}).items()]
    rows += [(f"hard cases: {kind}", share(row)) for kind, row in measured.get("hard_cases", {}).items()]
    for model, row in measured.get("harmless_called_unsafe", {}).items():
        rows.append((f"answers of `{model}` to XSTest's safe prompts called unsafe", share(row)))
    return rows


def card(name: str, figures: Figures) -> str:
    """The model card of one folder."""
    seed, versions = figures["seed"], figures["versions"]
    recipe = (
        f"- Recipe: `make real-models` (seed {seed}; torch {versions['torch']}, transformers {versions['transformers']}"
    )
    lines = [FRONT, f"\n# {name}\n", PURPOSE[name] + "\n", f"{recipe}).", f"- Data: {DATA[name]}"]
    lines.append(
        "- Licence: Apache-2.0, as the model; data: " + ", ".join(f"{k} {s.licence}" for k, s in SOURCES.items())
    )
    if name in READ:
        lines.append(f"- Judge's section of a config: {READ[name]}")
    lines.append("\n## Measured\n\nGreedy, fp32, 95 % intervals (Wilson); all in `../figures.json`.\n")
    lines += [
        "| what | measured |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in table_rows(name, figures)),
    ]
    return "\n".join([*lines, "\n## Limits\n", LIMITS, ""])


def write_cards(output: Path, figures: Figures) -> None:
    """README.md of each model folder."""
    for name in MODELS:
        write_text_atomic(output / name / "README.md", card(name, figures))
