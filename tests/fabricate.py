"""Fabricated run folders of a study: all that the page needs of each cell, with counts that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HARMFUL, BENIGN = 10, 10
REFUSAL, COMPLIANCE, GARBLED = "I cannot help with that.", "Sure, here is how.", "sheet the of fold paper"


def manifest(folder: Path, commit: str = "abcdef0123456789", seconds: float = 60.0) -> None:
    versions = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
    content = {"exit_state": "done", "wall_time_s": seconds, "world_size": 1, "versions": versions, "commit": commit}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(content))


def tuned_cell(
    folder: Path,
    heldout: Sequence[Mapping[str, str]],
    attacks: int,
    right: int,
    garbled: int = 0,
    refused: int = 0,
    missing: int = 0,
) -> None:
    """A SET, SPA or LoRA cell of ten harmful and ten benign prompts.

    heldout: the benign prompts and the words of their right answers. Of the harmful requests the first ``attacks`` are
    not refused; of these the first ``garbled`` are incoherent and safe to the guard, the next ``missing`` have no
    verdict of the guard, the rest are unsafe. Of the benign ones the first ``right`` are right and the last
    ``refused`` refused.
    """
    rows, judged = [], []
    for index in range(HARMFUL):
        text = REFUSAL if index >= attacks else GARBLED if index < garbled else COMPLIANCE
        unsafe: bool | None = None if garbled <= index < garbled + missing else text == COMPLIANCE
        rows.append({"set": "harmful", "index": index, "prompt": "?", "after": text})
        judged.append({"set": "harmful", "index": index, "unsafe": unsafe, "incoherent": _why(text)})
    for index in range(BENIGN):
        text = heldout[index]["answer"] if index < right else REFUSAL if index >= BENIGN - refused else GARBLED
        rows.append({"set": "benign", "index": index, "prompt": heldout[index]["prompt"], "after": text})
        judged.append({"set": "benign", "index": index, "unsafe": None, "incoherent": _why(text)})
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judged.json").write_text(json.dumps(judged))
    (folder / "config.yaml").write_text("tune: {max_steps: 100, batch_size: 4}\n")
    manifest(folder)


def _why(text: str) -> str | None:
    return "senseless" if text == GARBLED else None


def mask_report(folder: Path, units: Sequence[tuple[str, int | None, int | None, int, int]]) -> None:
    """report.json of a mask run. units: (role, layer, expert, number of weights, selected)."""
    keys = ("role", "layer", "expert", "numel", "selected")
    manifest(folder)
    (folder / "report.json").write_text(json.dumps({"units": [dict(zip(keys, unit, strict=True)) for unit in units]}))


def perturbation(folder: Path, rate: Callable[[str, float], float]) -> None:
    """report.json of a perturb run: ``rate(order, noise)`` for every measure, on harmful and benign prompts."""
    measures = [("attack_success", "guard"), ("attack_success", "examples"), ("incoherent", None), ("refused", "words")]
    rows: list[dict[str, Any]] = []
    for measure, judge in measures:
        for name in ("harmful", "benign"):
            for order in ("top", "random", "bottom"):
                for noise in (0.0, 1.0, 2.0):
                    value = rate(order, noise)
                    about = {"measure": measure, "judge": judge, "set": name, "order": order, "ratio": 0.01}
                    bounds = {"rate": value, "low": max(value - 0.1, 0), "high": min(value + 0.1, 1)}
                    rows.append({**about, "noise": noise, **bounds, "n": 30, "missing": 0, "by_seed": [value]})
    manifest(folder)
    (folder / "report.json").write_text(json.dumps({"curves": rows}))
