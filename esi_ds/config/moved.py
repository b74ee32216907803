"""Paths that may change between two starts, as after a move of folders: those whose content the run has recorded.

Whoever lets a path differ relies on the comparisons of ``data_hashes`` (stages/folder.py), and of files and weights
(stages/run.py), which every start makes before it goes on: other content is refused there, under any path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esi_ds.config.loading import Config

# What ``data_hashes`` names besides hashes and columns: where data lay.
PLACES = frozenset(("prompts", "responses", "control_prompts", "control", "tuning", "benign", "rows"))
# Key of a path → the entries of ``data_hashes`` that are there if the run has read it, its hash among them.
DATA = {
    "data.prompts.path": {"prompts", "sha256"},
    "data.prompts.behaviors": {"prompts", "sha256"},
    "data.tuning.path": {"tuning", "tuning_sha256"},
    "data.benign.path": {"benign", "benign_sha256"},
    "control.prompts.path": {"control_prompts", "control_sha256"},
    "control.prompts.behaviors": {"control_prompts", "control_sha256"},
    "control.rows.path": {"control", "control_sha256"},
    "tune.mask": {"mask_bits_sha256"},
    "tune.data.path": {"rows", "sha256"},
    "tune.data.benign.path": {"benign", "benign_sha256"},
    "perturb.mask": {"mask_bits_sha256"},
    "perturb.scores": {"scores_sha256"},
}
OF_EVAL = re.compile(r"eval\.(models|judges|tasks|prompts|benign)\.(\d+)\.(?:path|answers|fewshot_path|behaviors)")
KINDS = {"prompts": "harmful", "benign": "benign"}  # section of ``eval`` → kind of its sets


def without_moved(keys: Iterable[str], before: Config, now: Config, inputs: Mapping[str, Any]) -> list[str]:
    """The ``keys``, whose values differ, without the paths whose content the run has recorded.

    inputs: what the run has recorded of its inputs (``artifacts.read_inputs``).
    """
    return [key for key in keys if not _is_recorded(key, before, now, inputs)]


def _is_recorded(key: str, before: Config, now: Config, inputs: Mapping[str, Any]) -> bool:
    hashes, sources = _names(inputs, "data_hashes"), _names(inputs, "source_digests")
    if key in DATA:
        return DATA[key] <= hashes
    if key == "data.responses":
        are_files = isinstance(before.data.responses, str) and isinstance(now.data.responses, str)
        return are_files and {"responses", "sha256"} <= hashes and "prompts" not in hashes
    if match := OF_EVAL.fullmatch(key):
        return _is_recorded_of_eval(match[1], int(match[2]), key, before, now, inputs)
    if key == "model.path":
        return key in sources and "model_fingerprint" in inputs
    return key in sources  # the judge, and files of chat templates


def _is_recorded_of_eval(
    section: str, number: int, key: str, before: Config, now: Config, inputs: Mapping[str, Any]
) -> bool:
    """The same for a path in an entry of ``eval``. Answers and verdicts are filed under names, so an entry that is
    named by its path must keep it."""
    hashes, sources = _names(inputs, "data_hashes"), _names(inputs, "source_digests")
    if before.eval is None or now.eval is None:
        return False
    if section == "models":
        of_weights = key in sources or not key.endswith(".path")
        return now.eval.models[number].name in _names(inputs, "model_fingerprints") and of_weights
    if section == "judges":
        return key in sources and now.eval.judges[number].name is not None
    if section == "tasks":
        return f"eval.tasks.{number}" in hashes
    if section == "benign" and "benign_prompts_sha256" in hashes:  # of ESI
        return True
    stems = {Path(getattr(config, section)[number].path).stem for config in (before.eval, now.eval)}
    return len(stems) == 1 and f"{KINDS[section]}:{stems.pop()}" in hashes


def _names(inputs: Mapping[str, Any], key: str) -> set[str]:
    content = inputs.get(key)
    return set(content) if isinstance(content, dict) else set()
