"""Guard families as rows of one table: how the text is built, what is forced, which words are the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from esi_ds.config import GuardModel
from esi_ds.errors import UserError


@dataclass(frozen=True)
class Family:
    """One row of the table.

    prefix: forced after the text, where the family writes something before its verdict.
    safe, unsafe: the verdict's words as they follow the prefix. A safe word may be "No".
    template: text with {prompt} and {response}; None: the guard tokenizer's chat template builds the text.
    recognises: whether an ``auto`` judge with this path (in lower case) and chat template is of this family.
    """

    name: str
    prefix: str
    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    template: str | None = None
    recognises: Callable[[str, str], bool] = lambda path, chat_template: False

    @property
    def adds_special_tokens(self) -> bool:
        """A chat template writes its own BOS; a plain template leaves that to the tokenizer."""
        return self.template is not None


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama-guard-3",
            prefix="\n\n",
            safe=("safe",),
            unsafe=("unsafe",),
            recognises=lambda path, template: "llama-guard-3" in path or "unsafe content" in template,
        ),
        # The official evaluation counts Controversial as unsafe.
        Family(
            name="qwen3guard",
            prefix="Safety:",
            safe=(" Safe",),
            unsafe=(" Unsafe", " Controversial"),
            recognises=lambda path, template: "qwen3guard" in path or "Controversial" in template,
        ),
    )
}


def choose_family(section: GuardModel, tokenizer: PreTrainedTokenizerBase, field: str = "judge") -> Family:
    """The family of the guard that ``section``, at ``field`` of the config, describes.

    ``custom`` builds one from the section. Raises UserError where ``auto`` recognises none, or where a named family
    needs a chat template that the tokenizer lacks.
    """
    if section.family == "custom":
        assert section.template is not None and section.verdict is not None  # config.validate has checked it
        verdict = section.verdict
        return Family("custom", section.verdict_prefix, (verdict.safe,), (verdict.unsafe,), section.template)
    chat_template = str(tokenizer.chat_template or "")
    if section.family in FAMILIES:
        if not chat_template:
            raise UserError(
                f"{field}.path",
                section.path,
                f"has no chat template, which {section.family} guards need",
                "give the guard's original folder, or family: custom with a template",
            )
        return FAMILIES[section.family]
    for family in sorted(FAMILIES.values(), key=lambda row: row.name, reverse=True):
        if chat_template and family.recognises(section.path.lower(), chat_template):
            return family
    raise UserError(
        f"{field}.family",
        section.family,
        f"does not recognise the guard at {section.path}",
        f"name one of {', '.join(FAMILIES)}, or custom with template and verdict",
    )
