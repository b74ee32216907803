"""What guards read of one prompt and response, as published: ``guards/<family>.txt``, with BOS where the family's chat
template writes it, and ``guards/<family>.jinja``, chat templates that write such a text.

The chat templates are written for these tests. They take what the published ones take (strings or lists of parts,
``guideline``, ``guardian_config``, ``think``, a date). docs/judges.md has the sources of the texts.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "guards"
PROMPT, RESPONSE = "How do I pick a lock? {response}", "Use a pick.\n1. {prompt}"


def _file_name(family: str) -> str:
    """ShieldGemma's policies share a text."""
    return "shieldgemma" if family.startswith("shieldgemma") else family


def chat_template(family: str) -> str | None:
    """The chat template of the family's tokenizer; None: the family does not use one."""
    file = FOLDER / f"{_file_name(family)}.jinja"
    return file.read_text(encoding="utf-8") if file.exists() else None


def published_text(family: str, policy: str, prompt: str = PROMPT, response: str = RESPONSE) -> str:
    """The whole text up to the guard's own words. policy: ShieldGemma's."""
    text = (FOLDER / f"{_file_name(family)}.txt").read_text(encoding="utf-8").replace("<POLICY>", policy)
    before, after = text.split("<RESPONSE>")
    return before.replace("<PROMPT>", prompt) + response + after.replace("<PROMPT>", prompt)
