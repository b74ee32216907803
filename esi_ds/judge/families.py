"""Guard families as rows of one table: how the prompt is built, what is forced, which words are the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from esi_ds.errors import UserError

PROMPT_MARK, RESPONSE_MARK = "⟦prompt⟧", "⟦response⟧"


@dataclass(frozen=True)
class Family:
    """One row. ``template`` None: the guard tokenizer's own chat template builds the text.

    prefix: forced after the text, where the family writes something before its verdict.
    safe, unsafe: the verdict's words as they follow the prefix. Polarity is theirs: safe may be "No".
    recognises: whether an ``auto`` judge with this path and chat template is of this family.
    adds_special_tokens: a chat template writes its own BOS, a plain template leaves it to the tokenizer.
    """

    name: str
    prefix: str
    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    template: str | None = None
    recognises: Callable[[str, str], bool] = lambda path, chat_template: False

    @property
    def adds_special_tokens(self) -> bool:
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


def choose_family(judge, tokenizer: PreTrainedTokenizerBase, field: str = "judge") -> Family:
    """The row of a guard's config section at ``field``; ``custom`` makes its own from the config."""
    if judge.family == "custom":
        return Family("custom", judge.verdict_prefix, (judge.verdict.safe,), (judge.verdict.unsafe,), judge.template)
    chat_template = tokenizer.chat_template or ""
    if judge.family in FAMILIES:
        if not chat_template:
            raise UserError(
                f"{field}.path",
                judge.path,
                f"has no chat template, which {judge.family} guards need",
                "give the guard's own folder, or family: custom with a template",
            )
        return FAMILIES[judge.family]
    for family in sorted(FAMILIES.values(), key=lambda row: row.name, reverse=True):
        if chat_template and family.recognises(judge.path.lower(), chat_template):
            return family
    raise UserError(
        f"{field}.family",
        judge.family,
        f"does not recognise the guard at {judge.path}",
        f"name one of {', '.join(FAMILIES)}, or custom with template and verdict",
    )


@dataclass(frozen=True)
class JudgedText:
    """The guard's whole prompt as one text; the response stands at characters [start, end).

    ``response_offset`` is where that part begins in the response as given: a template may trim it.
    """

    text: str
    start: int
    end: int
    response_offset: int


class TextBuilder:
    """Builds the guard's text of a (prompt, response) pair for one family."""

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerBase, context: str, field: str = "judge"):
        self.family, self.tokenizer, self.context = family, tokenizer, context
        self._as_list = False
        if family.template is None:
            try:
                shown = self._chat("x", RESPONSE_MARK)
            except Exception as error:  # whatever the guard's Jinja raises by itself
                raise UserError(
                    f"{field}.path",
                    tokenizer.name_or_path,
                    f"chat template fails: {error}",
                    "give a guard whose template takes user and assistant turns",
                ) from error
            # Templates of multimodal guards read content as a list of parts (Llama-Guard-3-1B).
            self._as_list = RESPONSE_MARK not in shown

    def _chat(self, prompt: str, response: str) -> str:
        # Response only: as in the paper's code, what the user said and no prompt.
        response_only = self.context == "response_only"
        turns = [("user", response)] if response_only else [("user", prompt), ("assistant", response)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._as_list else text}
            for role, text in turns
        ]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def _fill(self, prompt: str, response: str) -> str:
        parts = self.family.template.split("{response}")
        prompt = "" if self.context == "response_only" else prompt
        return response.join(part.replace("{prompt}", prompt) for part in parts)

    def build(self, prompt: str, response: str) -> JudgedText | None:
        """The text, the forced prefix included; None where the template does not show the response as it is."""
        render = self._chat if self.family.template is None else self._fill
        start = render(prompt, RESPONSE_MARK).find(RESPONSE_MARK)
        text = render(prompt, response)
        num_after = len(render(prompt, RESPONSE_MARK)) - start - len(RESPONSE_MARK)
        end = len(text) - num_after
        shown = text[start:end]
        offset = response.find(shown) if start >= 0 and shown else -1
        if offset < 0:
            return None
        return JudgedText(text + self.family.prefix, start, end, offset)


@dataclass(frozen=True)
class EncodedJudgement:
    """What the guard reads and where to look: ``ids`` end just before the verdict.

    offsets: character spans of the ids in the text. safe, unsafe: the verdict tokens' ids.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    safe: list[int]
    unsafe: list[int]


def encode_judgement(tokenizer: PreTrainedTokenizerBase, text: str, family: Family) -> EncodedJudgement:
    """The text in one call with each verdict word behind it, cut at the first position where the words differ.

    Raises ValueError where that position does not tell every safe word from every unsafe one. A family without words
    (a classifier) reads the text to its end.
    """
    words = (*family.safe, *family.unsafe)
    if not words:
        whole = tokenizer(text, add_special_tokens=family.adds_special_tokens, return_offsets_mapping=True)
        return EncodedJudgement(whole["input_ids"], whole["offset_mapping"], [], [])
    encoded = [
        tokenizer(text + word, add_special_tokens=family.adds_special_tokens, return_offsets_mapping=True)
        for word in words
    ]
    columns = zip(*(encoding["input_ids"] for encoding in encoded), strict=False)  # up to the shortest
    for position, column in enumerate(columns):
        if len(set(column)) == 1:
            continue
        safe, unsafe = list(column[: len(family.safe)]), list(column[len(family.safe) :])
        if set(safe) & set(unsafe):
            break
        first = encoded[0]
        return EncodedJudgement(first["input_ids"][:position], first["offset_mapping"][:position], safe, unsafe)
    raise ValueError(f"the guard's tokenizer cannot tell {family.safe} from {family.unsafe}")
