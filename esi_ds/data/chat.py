"""From text to token ids: chat templates, responses with offsets, and special-token strings that must stay text."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import processors
from transformers import AutoTokenizer, BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.config import Model
from esi_ds.data.template_values import check_read, default_template, set_values
from esi_ds.data.thoughts import MARKS, has_marks, mark_strings, prompt_end
from esi_ds.data.tokenizer_files import NEEDED, as_in_file, check_pattern_known
from esi_ds.data.turns import Prompt, Turn, with_system
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource, reading_model
from esi_ds.reading import first_line, read_text, reading
from esi_ds.words import counted

Key = TypeVar("Key", bound=Hashable)
TURN_MARK = "⟦turn⟧"
NO_ROOM = "no room for an answer"
# What templates read in a text and take out of it: SmolLM3's, Nemotron's.
SWITCHES = re.compile("/no_?think|/think|/system_override")
MAX_NAMED = 5  # special tokens that a line of the log names


@dataclass(frozen=True)
class EncodedResponse:
    """A response tokenized behind its prompt (``encode_response``); ``offsets`` are disjoint character spans in its
    text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def load_tokenizer(source: ModelSource, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, with a padding token. It splits texts as the folder's tokenizer.json says.

    chat_template replaces the tokenizer's: Jinja text, or a file that holds it. Raises UserError if there is no
    fast tokenizer, or if how it splits a text would be a guess (``tokenizer_files``).
    """
    field, path = source.field, source.path
    remedy = "give a Hugging Face folder or a hub id that can be reached"
    if os.path.exists(path) and not os.path.isdir(path):  # transformers would open it, and wait at a pipe
        raise UserError(field, path, "is not a folder", remedy)
    with reading_model(source, remedy, "holds no tokenizer that can be loaded"):
        folder = source.folder()
        check_pattern_known(source, folder)
        loaded = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=source.trust_remote_code,
            code_revision=source.code_revision(),
            mistral_format=False,  # with mistral-common installed, tekken.json would be preferred to tokenizer.json
        )
        tokenizer = as_in_file(loaded, folder)
    tokenizer.name_or_path = path
    if not getattr(tokenizer, "is_fast", False):  # mistral-common's class does not say
        raise UserError(field, path, "has no tokenizer.json, and its own class is not a fast tokenizer", NEEDED)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_is_ours = True
    return tokenizer


def without_our_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of an exported model: without the padding token that ``load_tokenizer`` has chosen."""
    if not getattr(tokenizer, "padding_is_ours", False):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    return plain


def read_template(chat_template: str, field: str = "model.chat_template") -> str:
    """The Jinja text that a key of the config gives or names. Raises UserError naming the key where it is not Jinja."""
    if is_jinja(chat_template):
        return chat_template
    remedy = "give a Jinja chat template, as text or as a file"
    with reading(field, chat_template, remedy, "is not Jinja text, and not a file that can be read"):
        text = read_text(Path(chat_template).expanduser())
    if not is_jinja(text):
        raise UserError(field, chat_template, "is a file without Jinja text", remedy)
    return text


def is_jinja(text: str) -> bool:
    """Whether a text writes a value or has a statement: a template without either could not write a prompt."""
    return "{{" in text or "{%" in text


def load_chat_tokenizer(source: ModelSource, section: Model, *, is_base: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that answers prompts, with the chat template that ``model`` of the config asks for.

    is_base: whether it is the model of ``section``; a model beside it may have a template without its values. Raises
    UserError if the tokenizer cannot be loaded, or its template cannot format a chat or does not read a value.
    """
    tokenizer = load_tokenizer(source, chat_template=section.chat_template)
    if is_base:
        check_read(tokenizer, section.template_kwargs)
    set_values(tokenizer, section.template_kwargs, day_of(section))
    check_chat_template(tokenizer, section.system_prompt)
    return tokenizer


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, source: ModelSource, *, asks: bool = True
) -> None:
    """Raise UserError where padding, a word added to the tokenizer, or what a chat template writes, has no row in the
    model's embedding.

    Special tokens may have none, as Gemma 3's of images: texts never hold them (``break_up``). asks: whether the model
    is given the template's text; a judge may have a text of its own.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    ids = [number for number, token in tokenizer.added_tokens_decoder.items() if not token.special]
    ids += [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    if asks and tokenizer.chat_template is not None:
        with suppress(TemplateRejection):  # its own check says so
            ids += encode_prompt(tokenizer, "Hello", None)
    if size is not None and max(ids, default=0) >= size:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise UserError(
            source.field,
            source.path,
            f"has a tokenizer whose {token!r} has the id {max(ids)}, and an embedding of {size} rows",
            "resize the model's embedding, or mend the tokenizer's added tokens, pad_token or chat template",
        )


def day_of(section: Model) -> date | None:
    """The day that the model's chat template is given; None: the machine's clock, where no run has named the day."""
    return None if section.date == "auto" else date.fromisoformat(section.date)


def special_strings(*tokenizers: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that any of the tokenizers parses as a special token, or as one that frames turns, longest first."""
    strings: set[str] = set()
    for tokenizer in tokenizers:
        strings |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        strings |= _turn_strings(tokenizer)
    return tuple(sorted(strings, key=lambda text: (-len(text), text)))


def _turn_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Added tokens that the chat template writes around turns.

    Some models add <|im_end|> as an ordinary token; in a prompt it would end the turn all the same. White space, words
    and punctuation that are tokens of their own frame no turn, nor do the marks of a thought, which rows and earlier
    turns hold.
    """
    if tokenizer.chat_template is None:
        return set()
    user, assistant, system = ({"role": role, "content": TURN_MARK} for role in ("user", "assistant", "system"))
    frame = ""
    for turns in ([user], [user, assistant], [system, user], [user, assistant, user]):
        for add_generation_prompt in (False, True):
            with suppress(TemplateRejection):  # of a template that takes other turns; its own check says so
                frame += render(tokenizer, turns, add_generation_prompt=add_generation_prompt)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    framing = {text for text in added if text in frame and len(text.strip()) > 2 and not text.strip().isalnum()}
    return framing - mark_strings(framing)


def break_up(text: str, specials: Iterable[str]) -> tuple[str, int]:
    """The text with a space inside every special-token string, and the number of such strings.

    Prompts and responses are data: "<|eot_id|>" typed by a user must not end a turn (docs/method.md §1, the judge).
    """
    count = 0
    for special in specials:
        occurrences = text.count(special)
        if occurrences:
            count += occurrences
            text = text.replace(special, f"{special[0]} {special[1:]}" if len(special) > 1 else " ")
    return text, count


def break_up_prompt(prompt: Prompt, specials: Sequence[str]) -> tuple[Prompt, int]:
    """``break_up`` of a prompt, in every turn of a chat."""
    if isinstance(prompt, str):
        return break_up(prompt, specials)
    pairs = [(turn["role"], *break_up(turn["content"], specials)) for turn in prompt]
    return [{"role": role, "content": text} for role, text, _ in pairs], sum(count for *_, count in pairs)


def specials_in(prompt: Prompt, specials: Iterable[str]) -> set[str]:
    """The special-token strings that a prompt holds, or any turn of a chat in its text or its thought."""
    turns: Sequence[Turn] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [text for turn in turns for text in (turn["content"], turn.get("trace", ""))]
    return {special for special in specials if any(special in text for text in texts)}


def broken_up_words(held: Iterable[Collection[str]], unit: str) -> str:
    """Which special-token strings are broken up, and in how many rows or prompts (``unit``), the most frequent first:
    "<|sql|> in 12 rows"; "" if none is.

    held: of each row or prompt, what ``specials_in`` returns.
    """
    numbers = Counter(special for of_one in held for special in sorted(of_one))
    named = [f"{special} in {counted(number, unit)}" for special, number in numbers.most_common(MAX_NAMED)]
    more = len(numbers) - len(named)
    return ", ".join([*named, *([f"{more} others"] if more else [])])


def broken_up_in(prompts: Iterable[Prompt], specials: Sequence[str]) -> str:
    """``broken_up_words`` of prompts."""
    return broken_up_words((specials_in(prompt, specials) for prompt in prompts), "prompt")


class TemplateRejection(ValueError):
    """A chat template does not format a conversation; the text says why."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation in the tokenizer's chat template, which is given roles, contents, thoughts and
    ``options`` only.

    Raises TemplateRejection.
    """
    messages = [{"role": turn["role"], "content": turn["content"], **_trace(turn)} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **(options or {})
        )
    except Exception as error:  # Jinja's errors, or whatever the template raises
        raise TemplateRejection(f"the chat template rejects it ({first_line(error)})") from error
    return str(text)


def _trace(turn: Mapping[str, Any]) -> dict[str, str]:
    """A turn's thought, under the names that templates read: Qwen3's and most others' one, and gpt-oss's."""
    trace = turn.get("trace")
    return {"reasoning_content": trace, "thinking": trace} if trace else {}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, system_prompt: str | None) -> list[int]:
    """Ids of a prompt in the model's chat template, up to where the assistant's response begins.

    A chat's own system turn takes the place of ``system_prompt``. Raises TemplateRejection; TurnLeftOut where the
    template leaves out a turn or a part of its text.
    """
    turns = with_system(prompt, system_prompt)
    if not isinstance(prompt, str):
        TemplateCheck(tokenizer).check([turn["role"] for turn in turns], add_generation_prompt=True)
    text = render(tokenizer, turns, add_generation_prompt=True)
    check_shown(turns, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise TemplateRejection("the chat template turns it into no token")
    return ids


def encode_data_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, specials: Sequence[str], system_prompt: str | None
) -> list[int] | str:
    """``encode_prompt`` of a prompt that is data, or why it has no ids. Special-token strings in it are broken up."""
    try:
        return encode_prompt(tokenizer, break_up_prompt(prompt, specials)[0], system_prompt)
    except TemplateRejection as error:
        return str(error)


def answerable(
    encoded: Mapping[Key, list[int] | str], max_new_tokens: int, limit: int | None
) -> tuple[dict[Key, list[int]], dict[Key, str]]:
    """(ids of the prompts that a model can answer, why it cannot answer the others), both in the order of ``encoded``.

    encoded: what ``encode_data_prompt`` returns. limit: tokens the model takes; None: any number.
    """
    prompt_ids: dict[Key, list[int]] = {}
    reasons: dict[Key, str] = {}
    for key, ids in encoded.items():
        if isinstance(ids, str):
            reasons[key] = ids
        elif limit is not None and len(ids) + max_new_tokens > limit:
            reasons[key] = f"{NO_ROOM} ({len(ids)} + {max_new_tokens} tokens, the model takes {limit})"
        else:
            prompt_ids[key] = ids
    return prompt_ids, reasons


def check_some_answerable(
    prompt_ids: Mapping[Key, list[int]], reasons: Mapping[Key, str], field: str, name: str | None, model: str
) -> None:
    """Raises UserError if the model can answer no prompt of ``field``: of its set ``name``, or of all.

    prompt_ids, reasons: what ``answerable`` returns.
    """
    if reasons and not prompt_ids:
        reason = next(iter(reasons.values()))
        raise UserError(
            field,
            name,
            f"{model} can answer none of the prompts: {reason}",
            "lower eval.max_new_tokens" if reason.startswith(NO_ROOM) else "give prompts that its chat template takes",
        )


def encode_with_spans(
    tokenizer: PreTrainedTokenizerBase, text: str | list[str], *, add_special_tokens: bool = False
) -> BatchEncoding:
    """Ids of a text, or of several, and their spans (``offset_mapping``), which hold the white space of their tokens.

    Byte-level tokenizers may report spans without it: RoBERTa's, and those whose tokenizer.json has a post-processor
    with ``trim_offsets: true``. By these, ``judge.alignment`` would lose the blank before every word.
    """
    trimming = list(_trimming_parts(tokenizer.backend_tokenizer.post_processor))
    try:
        for part in trimming:
            part.trim_offsets = False
        return tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    finally:  # an exported tokenizer is as it was
        for part in trimming:
            part.trim_offsets = True


def _trimming_parts(processor: Any) -> Iterator[Any]:
    """The live parts of a tokenizer's post-processor that trim spans."""
    if isinstance(processor, processors.Sequence):
        parts: Any = processor  # its stubs do not say that it can be iterated
        for part in parts:
            yield from _trimming_parts(part)
    elif getattr(processor, "trim_offsets", False):
        yield processor


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], response: str) -> EncodedResponse:
    """Ids and disjoint spans of a response as it follows a prompt.

    SentencePiece marks the beginning of a text as a space would be. Behind a line feed or a special token there is no
    such mark; behind a word there is, as a space is what a model writes there and decoding takes off a response, and
    where the chat template writes a space before an answer. A response that would change the tokens before it is
    tokenized alone. It may have no token: the empty one, or one that the tokenizer's normalisation leaves nothing of.
    """
    alone = _encode_behind(tokenizer, "", response)
    assert alone is not None  # nothing stands before it
    before = prompt_end(tokenizer, prompt_ids)
    behind = _encode_behind(tokenizer, before, response)
    if behind is None or behind.ids == alone.ids:
        return alone
    is_behind_word = not before[-1:].isspace() and prompt_ids[-1] not in tokenizer.added_tokens_decoder
    return alone if is_behind_word or _writes_space(tokenizer, default_template(tokenizer.chat_template)) else behind


def _encode_behind(tokenizer: PreTrainedTokenizerBase, before: str, response: str) -> EncodedResponse | None:
    """The response behind a text; None if it would change the tokens of that text.

    SentencePiece gives the mark it puts before a text the span of the first letter, which would count it twice.
    """
    before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    encoded = encode_with_spans(tokenizer, before + response)
    ids, spans, border = encoded["input_ids"], encoded["offset_mapping"], len(before)
    if ids[: len(before_ids)] != before_ids or (before_ids and spans[len(before_ids) - 1][1] > border):
        return None
    response_spans = [(max(start - border, 0), end - border) for start, end in spans[len(before_ids) :]]
    starts = [start for start, _ in response_spans]
    following = [*starts[1:], len(response)]  # one more than the spans if there are none
    with_next = zip(response_spans, following, strict=False)
    disjoint = [(start, min(end, next_start)) for (start, end), next_start in with_next]
    return EncodedResponse(ids[len(before_ids) :], disjoint)


@lru_cache(maxsize=8)
def _writes_space(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> bool:
    """Whether the chat template, the tokenizer's default, writes a space between a prompt and its answer, as Llama 2's
    and Mistral's do."""
    if chat_template is None:
        return False
    asked, answered = ({"role": role, "content": TURN_MARK} for role in ("user", "assistant"))
    with suppress(TemplateRejection):
        prompt = render(tokenizer, [asked], add_generation_prompt=True)
        return render(tokenizer, [asked, answered], add_generation_prompt=False).startswith(f"{prompt} ")
    return False


class TurnLeftOut(TemplateRejection):
    """A chat template leaves out a turn without raising: the model would not read it."""


class TemplateCheck:
    """Looks for marks in what a chat template makes, once per sequence of roles.

    A template may pass over a role it has no branch for, over all but the last turn, or over text that is not a list
    of parts, and nothing in its output says so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._left_out: dict[tuple[tuple[str, ...], bool], list[int]] = {}

    def check(self, roles: Sequence[str], *, add_generation_prompt: bool) -> None:
        """Raises TemplateRejection where the template rejects a conversation of these roles; TurnLeftOut where it
        leaves out a turn, or a part of its text."""
        for number in self._turns_left_out(roles, add_generation_prompt):
            raise self._error(roles, number)

    def check_answered(self, roles: Sequence[str]) -> None:
        """As ``check``, for a conversation that ends with an answer: its prompt, and the answer behind it. With the
        answer, a template may write the earlier turns differently: Mistral's templates write the system prompt into a
        turn of the user only if that is the last.
        """
        self.check(roles[:-1], add_generation_prompt=True)
        if len(roles) - 1 in self._turns_left_out(roles, False):
            raise self._error(roles, len(roles) - 1)

    def _turns_left_out(self, roles: Sequence[str], add_generation_prompt: bool) -> list[int]:
        key = (tuple(roles), add_generation_prompt)
        if key not in self._left_out:
            turns = [{"role": role, "content": turn_mark(number, role)} for number, role in enumerate(roles)]
            text = render(self._tokenizer, turns, add_generation_prompt=add_generation_prompt)
            self._left_out[key] = [number for number, turn in enumerate(turns) if turn["content"] not in text]
        return self._left_out[key]

    def _error(self, roles: Sequence[str], number: int) -> TurnLeftOut:
        return TurnLeftOut(f"the chat template leaves out {_named(roles, number)}, or changes its text")


def _named(roles: Sequence[str], number: int) -> str:
    return f"turn {number + 1} ({roles[number]}) of the {len(roles)} turns {', '.join(roles)}"


def turn_mark(number: int, role: str) -> str:
    """A text that no template holds, long enough to show one that cuts its turns. Characters that an escape would
    change show one that rewrites them, but in the result of a tool, which Llama 3's templates write as JSON."""
    escaped = "" if role == "tool" else """<b>"quotes" & 'é'</b>\\,  {{two}} spaces,\ta tab\nand a line, """
    return f"Turn {number} begins here, {escaped}{'and so on ' * 200}and turn {number} ends here."


def check_shown(turns: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises TurnLeftOut where what a template has made of the turns lacks a part of their own text.

    White space may differ (Falcon's template drops empty lines), ``SWITCHES`` may be gone, and so may thoughts in
    answers. The result of a tool may be written as JSON.
    """
    for number, turn in enumerate(turns):
        content = turn["content"]
        if turn["role"] == "tool" or (turn["role"] == "assistant" and has_marks(content, MARKS)):
            continue
        if content.strip() in text:
            continue
        shown = _words(text)
        if not all(_words(part) in shown for part in SWITCHES.split(content)):
            named = _named([turn["role"] for turn in turns], number)
            raise TurnLeftOut(f"the chat template leaves out a part of {named}, or changes its text")


def _words(text: str) -> str:
    """The text with a single space for white space of any length, and none at its ends."""
    return " ".join(text.split())


def with_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, section: Model, field: str
) -> PreTrainedTokenizerBase:
    """The tokenizer with another chat template; the tokenizer itself for None.

    chat_template: Jinja text, or a file that holds it. section: ``model`` of the config, whose date and system prompt
    it is given. field: the key that gives it. Raises UserError naming the key for a template that cannot format a chat.
    """
    if chat_template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = read_template(chat_template, field)
    set_values(other, {}, day_of(section))
    check_chat_template(other, section.system_prompt, field, chat_template)
    return other


def check_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    field: str = "model.chat_template",
    named: str = "(the tokenizer's)",
) -> None:
    """Raises UserError, before any weight is loaded, if the tokenizer cannot format a chat, or leaves out a turn.

    A template may reject more than one prompt: only what formats such chats has to know. field: the key that the error
    names. named: what it calls the template.
    """
    remedy = "fix the template, or leave out model.system_prompt if the template does not allow one"
    if tokenizer.chat_template is None:
        raise UserError(
            "model.chat_template",
            None,
            "is not set and the tokenizer has none",
            "give a Jinja chat template, as text or as a file",
        )
    check = TemplateCheck(tokenizer)
    asked = ["user"] if system_prompt is None else ["system", "user"]
    try:
        check.check(asked, add_generation_prompt=True)
    except TemplateRejection as error:
        problem = str(error) if isinstance(error, TurnLeftOut) else f"fails on a one-turn chat: {error}"
        raise UserError(field, named, problem, remedy) from error
    try:
        check.check_answered([*asked, "assistant"])
        check.check_answered([*asked, "assistant", "user", "assistant"])
    except TurnLeftOut as error:
        raise UserError(field, named, str(error), remedy) from error
    except TemplateRejection:  # of more than one prompt, which is not an error here
        return
