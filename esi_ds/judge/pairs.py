"""(prompt, response) → the token ids a judge reads. Scoring and evaluation both encode their pairs here.

The judge's prompt is built as one text and tokenized in one call, so that tokens may straddle the response's borders;
character offsets say which of them overlap it (docs/method.md §1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from transformers import PreTrainedTokenizerBase

from esi_ds.data.chat import TemplateRejection, encode_with_spans, render, turn_mark
from esi_ds.data.template_values import CLOCK, default_template, fixed_clock
from esi_ds.data.turns import Prompt, prompt_text
from esi_ds.errors import UserError
from esi_ds.judge.families import FAMILIES, Family

SLOT = re.compile(r"\{prompt\}|\{attack\}")
PROMPT_MARK, RESPONSE_MARK = "⟦prompt⟧", "⟦response⟧"
# Chat templates of Granite and Llama 3 write today's date into the system turn; a score must not change with it.
FIXED_DATE = fixed_clock(date(2025, 1, 1), "+%}")  # + keeps the line break behind it
Context = Literal["prompt_and_response", "response_only"]
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class JudgePrompt:
    """The judge's whole prompt as one text; the response stands at characters [start, end).

    response_offset: where that part begins in the original response, which a template may trim.
    """

    text: str
    start: int
    end: int
    response_offset: int


class TextBuilder:
    """Builds the judge's text for a (prompt, response) pair of one family.

    context: what the judge reads; ``response_only`` leaves the prompt out. Raises UserError naming ``field`` where the
    tokenizer's chat template rejects a user and an assistant turn.
    """

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerBase, context: Context, field: str = "judge"):
        self.family, self.tokenizer, self.context = family, tokenizer, context
        self._content_is_list = False
        self._read: dict[tuple[str, ...], bool] = {}
        self._options = dict(family.options)
        if family.uses_chat_template:
            if CLOCK in (template := default_template(tokenizer.chat_template) or ""):
                self._options["chat_template"] = FIXED_DATE + template
            self._choose_content(field)
            if context == "prompt_and_response" and PROMPT_MARK not in self._apply_chat_template(PROMPT_MARK, "x"):
                without = f", or set {field}.context: response_only" if field == "judge" else ""  # a key of ESI's alone
                raise UserError(
                    f"{field}.path",
                    tokenizer.name_or_path,
                    "has a chat template that leaves out the prompt",
                    f"give a guard whose template shows both turns{without}",
                )

    def _choose_content(self, field: str) -> None:
        """Give turns to the chat template as texts or, where it rejects these or does not show them, as lists of parts:
        templates of multimodal guards (Llama-Guard-3-1B) read them so."""
        rejection: TemplateRejection | None = None
        for self._content_is_list in (False, True):
            try:
                if RESPONSE_MARK in self._apply_chat_template("x", RESPONSE_MARK):
                    return
            except TemplateRejection as error:
                rejection = rejection or error
        if rejection is not None:
            raise UserError(
                f"{field}.path",
                self.tokenizer.name_or_path,
                f"cannot be asked: {rejection}",
                "give a guard whose template takes user and assistant turns",
            ) from rejection

    def _apply_chat_template(self, prompt: Prompt, response: str, attack: Prompt | None = None) -> str:
        return self._show(self._turns(prompt, response, attack))

    def _turns(self, prompt: Prompt, response: str, attack: Prompt | None) -> list[tuple[str, str]]:
        """(role, text) of what the chat template is given."""
        if self.family.is_turn:
            return [("user", self._fill_template(prompt, response, attack))]
        if self.context == "response_only":  # the response becomes the user's turn, as in the paper's code
            return [("user", response)]
        return [*self._asked(prompt), ("assistant", response)]

    def _show(self, turns: Sequence[tuple[str, str]]) -> str:
        """(role, text) of each turn in the tokenizer's chat template. Raises TemplateRejection."""
        closing = [("user", self.family.closing)] if self.family.closing is not None else []
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._content_is_list else text}
            for role, text in (*turns, *closing)
        ]
        return render(
            self.tokenizer, messages, add_generation_prompt=self.family.generation_prompt, options=self._options
        )

    def _asked(self, prompt: Prompt) -> list[tuple[str, str]]:
        """The turns that ask: a chat's own, if the judge's template shows them all, else one turn of the user with the
        chat's text."""
        if not isinstance(prompt, str) and self._reads(tuple(turn["role"] for turn in prompt)):
            return [(turn["role"], turn["content"]) for turn in prompt]
        return [("user", prompt_text(prompt))]

    def _reads(self, roles: tuple[str, ...]) -> bool:
        """Whether the judge's template shows all turns of a chat of these roles, and the answer; asked once of each."""
        if roles not in self._read:
            turns = [(role, turn_mark(number, role)) for number, role in enumerate((*roles, "assistant"))]
            try:
                text = self._show(turns)
            except TemplateRejection:
                text = ""
            self._read[roles] = all(mark in text for _, mark in turns)
        return self._read[roles]

    def _fill_template(self, prompt: Prompt, response: str, attack: Prompt | None = None) -> str:
        assert self.family.template is not None
        parts = self.family.template.split("{response}")
        texts = {"{prompt}": prompt_text(prompt), "{attack}": prompt_text(prompt if attack is None else attack)}
        if self.context == "response_only":
            texts = dict.fromkeys(texts, "")
        return response.join(SLOT.sub(lambda slot: texts[slot.group()], part) for part in parts)

    def _render(self, prompt: Prompt, response: str, attack: Prompt | None) -> str:
        build = self._apply_chat_template if self.family.uses_chat_template else self._fill_template
        return build(prompt, response, attack)

    def build(self, prompt: Prompt, response: str, attack: Prompt | None = None) -> JudgePrompt | None:
        """The text with the forced prefix behind it; None where the template alters or cuts prompt or response beyond
        trimming.

        attack: what was asked, where ``prompt`` is its goal; a template shows it where it has {attack}.
        """
        marked = self._render(prompt, RESPONSE_MARK, attack)
        start = marked.find(RESPONSE_MARK)
        text = self._render(prompt, response, attack)
        num_after = len(marked) - start - len(RESPONSE_MARK)
        end = len(text) - num_after
        shown = text[start:end]
        offset = response.find(shown) if start >= 0 and shown else -1
        if offset < 0 or shown.strip() != response.strip():
            return None
        if self.family.uses_chat_template:
            turns = self._turns(prompt, response, attack)
            if not all(content.strip() in text for _, content in turns):
                return None
        return JudgePrompt(text + self.family.prefix, start, end, offset)


@dataclass(frozen=True)
class EncodedText:
    """What the judge reads: ``ids`` end just before the verdict, or with the text where the family has no words.

    safe, unsafe: ids of the verdict tokens, empty without words. token_types: the tokenizer's ``token_type_ids``, None
    where it gives none. between: ids of verdict tokens that are partly unsafe, with the share of it.
    """

    ids: list[int]
    safe: list[int]
    unsafe: list[int]
    token_types: list[int] | None = None
    between: list[tuple[int, float]] = field(default_factory=list)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, family: Family) -> tuple[EncodedText, list[Span]]:
    """Encode the text with each verdict word behind it and cut it at the first position where the words differ.

    Returns also the spans of its ids in the text. A word may have several spellings, of which those count whose tokens
    there are of one verdict alone. Raises ValueError where no spelling of a verdict is left, or two verdicts share a
    token. A family without words (a classifier) reads the text to its end.
    """
    encodings = [
        encode_with_spans(tokenizer, text + word, add_special_tokens=family.adds_special_tokens)
        for word in family.words or ("",)
    ]
    first = encodings[0]
    if not family.words:
        return EncodedText(first["input_ids"], [], [], first.get("token_type_ids")), first["offset_mapping"]
    columns = zip(*(encoding["input_ids"] for encoding in encodings), strict=False)  # up to the shortest
    for position, column in enumerate(columns):
        if len(set(column)) == 1:
            continue
        num_safe, num_words = len(family.safe), len(family.safe) + len(family.unsafe)
        safe, unsafe, between = column[:num_safe], column[num_safe:num_words], column[num_words:]
        only_safe = list(dict.fromkeys(token for token in safe if token not in (*unsafe, *between)))
        only_unsafe = list(dict.fromkeys(token for token in unsafe if token not in (*safe, *between)))
        if not only_safe or not only_unsafe or len({*between}) < len(between) or {*between} & {*safe, *unsafe}:
            break
        shares = [share for _, share in family.between]
        between_shares = list(zip(between, shares, strict=True))
        encoded = EncodedText(first["input_ids"][:position], only_safe, only_unsafe, None, between_shares)
        return encoded, first["offset_mapping"][:position]
    raise ValueError(f"the guard's tokenizer cannot tell {family.safe} from {family.unsafe}")


@dataclass(frozen=True)
class EncodedPair:
    """One (prompt, response) pair as the judge reads it.

    response_tokens: positions in ``text.ids`` of the tokens that overlap the response, possibly none; spans: their
    character ranges in the original response, which may stick out of it; shown: the range of it that the text holds.
    """

    text: EncodedText
    response_tokens: list[int]
    spans: list[Span]
    shown: Span


def plain_pair(ids: Sequence[int]) -> EncodedPair:
    """Ids as a judge reads them, without a response or a verdict."""
    return EncodedPair(EncodedText(list(ids), [], []), [], [], (0, 0))


class PairEncoder:
    """Encodes pairs for one judge.

    max_length: tokens the judge takes; None: any number. A longer text is refused and never cut: half a response is
    another response. field: the judge's section of the config, for errors. Raises UserError as ``TextBuilder`` does.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: Context = "prompt_and_response",
        max_length: int | None = None,
        field: str = "judge",
    ):
        limits = [limit for limit in (max_length, family.max_length) if limit is not None]
        self.family, self.tokenizer, self.max_length, self._field = family, tokenizer, min(limits, default=None), field
        self._texts = TextBuilder(family, tokenizer, context, field)

    def encode(self, prompt: Prompt, response: str, attack: Prompt | None = None) -> EncodedPair | str:
        """The pair, or the reason why it cannot be judged; ``attack`` as of ``TextBuilder.build``. Special tokens in it
        must be broken up already."""
        try:
            judged = self._texts.build(prompt, response, attack)
        except TemplateRejection as error:
            return f"the judge: {error}"
        if judged is None:
            return "the judge's template does not show the whole prompt and response"
        try:
            text, offsets = encode_text(self.tokenizer, judged.text, self.family)
        except ValueError as error:
            return str(error)
        if self.max_length is not None and len(text.ids) > self.max_length:
            return f"too long for the judge ({len(text.ids)} tokens, it takes {self.max_length})"
        tokens = [j for j, (start, end) in enumerate(offsets) if start < judged.end and end > max(judged.start, start)]
        shift = judged.response_offset - judged.start
        spans = [(offsets[j][0] + shift, offsets[j][1] + shift) for j in tokens]
        return EncodedPair(text, tokens, spans, (judged.response_offset, judged.end + shift))

    def check_verdict(self) -> None:
        """Raise UserError, before any weight is loaded, if the verdict's words cannot be distinguished."""
        family, path = self.family, self.tokenizer.name_or_path
        is_published = family.name in FAMILIES  # its text and words are not keys of the config
        judged = self._texts.build("Hello", "Hello")
        if judged is None:
            key = "path" if is_published else "template"
            remedy = "give a guard whose template shows it" if is_published else "put {response} into the template"
            raise UserError(f"{self._field}.{key}", path, "does not show the response in the guard's text", remedy)
        try:
            encode_text(self.tokenizer, judged.text, family)
        except ValueError as error:
            if is_published:
                remedy = f"give a {family.name} guard with its own tokenizer"
                raise UserError(f"{self._field}.path", path, str(error), remedy) from error
            key, words = ("unsafe", family.unsafe) if family.name == "yes_no" else ("verdict", family.words)
            remedy = "choose words that begin with different tokens of the guard"
            raise UserError(f"{self._field}.{key}", words, str(error), remedy) from error
