"""Names of the guard families, for the config, which imports no torch. ``judge/families.py`` has their rows."""

from __future__ import annotations

from typing import Literal

# A family of the table; auto: recognised by path, chat template and architecture; custom: described in the config.
FamilyName = Literal[
    "auto",
    "llama-guard-1",
    "llama-guard-2",
    "llama-guard-3",
    "llama-guard-3-1b",
    "llama-guard-4",
    "qwen3guard",
    "qwen3guard-stream",
    "shieldgemma",
    "shieldgemma-harassment",
    "shieldgemma-hate",
    "shieldgemma-sexual",
    "wildguard",
    "granite-guardian-3.0",
    "granite-guardian-3.3",
    "granite-guardian-4.1",
    "nemoguard",
    "md-judge-v0.1",
    "harmbench-llama-2",
    "harmbench-mistral",
    "strongreject",
    "beaver-dam",
    "gpt-oss-safeguard",
    "custom",
]
