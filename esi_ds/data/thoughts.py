"""What a reasoning model answers: the part of a response outside of its thoughts (docs/method.md §1, "The answer").

A thought weighs what the answer may leave out: judged with it, a model that considers a refusal and complies would
count as refusing, and one that ponders the harm and refuses as harmful.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import dropwhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from esi_ds.config.judges import Reads
from esi_ds.words import part_of

Span = tuple[int, int]  # characters [start, end)

UNFINISHED = "the response ends within a thought: max_new_tokens may be too few"
# Where engines with a reasoning parser put a thought: SGLang, DeepSeek and older vLLM; newer vLLM and OpenRouter.
REASONING_KEYS = ("reasoning_content", "reasoning")
NO_THOUGHT = "the response has no thought"
Marks = tuple[tuple[str, str], ...]  # (opening, closing) of each kind of thought
APRIEL = ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]")
# In any case, by the models that write them.
MARKS: Marks = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM-4.5, Phi-4-reasoning, OLMo 3, Hunyuan
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<unused94>thought", "<unused95>"),  # MedGemma
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<longcat_think>", "</longcat_think>"),  # LongCat
    ("<|think:start|>", "<|think:end|>"),  # Solar Open 2
    APRIEL,
)
# Words, which answers may hold: a mark where a prompt ends with them, or a response begins with them and closes them.
APRIEL_OPENING = rf"\A\s*{re.escape(APRIEL[0])}(?=(?s:.*){re.escape(APRIEL[1])})"
# A thought where it begins the response and something follows it: answers speak of such tags, and hold them. The words
# are Granite 3.2's.
TAGS = "analysis|cot|inner_thoughts|reason|reflection|scratchpad|thoughts"
LEADING = re.compile(
    rf"\s*(?:<(?P<tag>{TAGS})>(?P<trace>.*?)</(?P=tag)>(?=\s*\S)"
    r"|(?:Here is|Here's) my thought process:(?P<granite>.*?)(?:Here is|Here's) my response:)",
    re.IGNORECASE | re.DOTALL,
)
LEADING_UNFINISHED = re.compile(rf"\s*<({TAGS})>(?!.*</\1>)", re.IGNORECASE | re.DOTALL)
# What some of them put around the answer that follows a thought: (opening, closing).
AROUND_ANSWER = {
    "<answer>": "</answer>",  # Hunyuan
    "<response>": "</response>",
    "<output>": "</output>",  # Marco-o1, Reflection
    "<final>": "</final>",
    "<final_answer>": "</final_answer>",
    "<|begin_of_solution|>": "<|end_of_solution|>",  # OpenThinker
    "<|start_response|>": "<|end_response|>",  # Command A Reasoning
    "<|begin_of_box|>": "<|end_of_box|>",  # GLM-4.1V
}
APRIEL_END = "[end final response]"  # behind an answer whose beginning ends the thought
BEFORE_ANSWER = re.compile(
    rf"\s*(?:\*\*final answer:?\*\*:?\s*)?(?:({'|'.join(map(re.escape, AROUND_ANSWER))})\s*)?", re.IGNORECASE
)
# gpt-oss (harmony) writes messages to channels, of which ``final`` is the answer.
CHANNEL = "<|channel|>"
HARMONY = (CHANNEL, "<|start|>", "<|message|>", "<|end|>", "<|constrain|>")
MESSAGE = re.compile(
    r"<\|channel\|>\s*(?P<channel>[A-Za-z_]{1,32})(?![A-Za-z_])"
    r"(?P<header>[^<]*(?:<(?!\|(?:message|channel)\|>)[^<]*)*)"
    r"<\|message\|>(?P<text>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
# What harmony itself writes behind a channel's name: whom a message is for, and the type of its content.
HEADER = r"(?:\s+to=[\w.-]{1,64})?(?:\s*<\|constrain\|>)?(?:\s*[a-z]{1,16})?\s*"
# What it writes around messages, a header that is cut or repeated included.
AROUND_MESSAGES = re.compile(
    r"\A\s*to=[\w.-]{1,64}"
    r"|<\|start\|>(?:assistant|tool|user|system|developer|functions\.[\w.-]{1,64})?(?:\s+to=[\w.-]{1,64})?"
    r"|<\|(?:end|return|call|message|constrain)\|>"
    rf"|<\|channel\|>(?:\s*[A-Za-z_]{{1,32}}{HEADER}|\s*)\Z"
)
# The same, decoded by others without its special tokens.
BARE_HARMONY = re.compile(r"\Aanalysis(?P<trace>.*)assistantfinal", re.DOTALL)
BARE_UNFINISHED = re.compile(r"\Aanalysis(?=[A-Z])")  # no text begins so
PROMPT_TAIL = 32  # tokens at a prompt's end that hold any opening mark


@lru_cache
def _mark_pattern(marks: Marks) -> re.Pattern[str]:
    """A group for each mark. Those of the user's pair, before our own, are marks wherever they stand."""
    num_users = len(marks) - len(MARKS)
    patterns = (
        APRIEL_OPENING if number >= num_users and mark == APRIEL[0] else re.escape(mark)
        for number, pair in enumerate(marks)
        for mark in pair
    )
    return re.compile("|".join(f"({pattern})" for pattern in patterns), re.IGNORECASE)


def marks_with(pair: Sequence[str] | None) -> Marks:
    """``MARKS``, behind a pair of the user's (``model.thought_marks``), if there is one."""
    return MARKS if pair is None else ((pair[0], pair[1]), *MARKS)


def absent_marks(texts: Sequence[str], pair: Sequence[str] | None) -> list[str]:
    """The user's marks that stand in none of the responses."""
    lowered = [text.lower() for text in texts]
    return [mark for mark in pair or () if not any(mark.lower() in text for text in lowered)]


def closes_unopened(response: str, marks: Marks) -> bool:
    """Whether a response ends a thought that it does not open: its prompt did."""
    first = _mark_pattern(marks).search(response)
    return first is not None and (first.lastindex or 0) % 2 == 0


def has_marks(response: str, marks: Marks) -> bool:
    """Whether a response holds any mark of a thought."""
    begins = (LEADING, LEADING_UNFINISHED, BARE_HARMONY, BARE_UNFINISHED)
    leads = any(pattern.match(response) for pattern in begins)
    return CHANNEL in response or leads or _mark_pattern(marks).search(response) is not None


def has_thought(response: str, response_parts: ResponseParts) -> bool:
    """Whether a response with these parts holds the text of a thought."""
    return any(response[start:end].strip() for start, end in response_parts.trace)


def unread_note(have_thoughts: Sequence[bool], which: str, thinks: bool) -> str | None:
    """What people should know of responses whose thoughts are not judged; None if nothing. An attack may have the model
    write what is harmful within such marks.

    have_thoughts: of each finished response. which: what they are. thinks: False if the chat template of their model
    knows of no thoughts.
    """
    number, total = sum(have_thoughts), len(have_thoughts)
    if number == 0 or (thinks and 2 * number >= total):
        return None
    but = "most of them hold none" if thinks else "the model's chat template knows of no thoughts"
    remedy = "" if thinks else ", or name the marks in model.thought_marks if the model thinks"
    return (
        f"{part_of(number, total)} {which} hold text within the marks of a thought, which judges with reads: answer do "
        f"not see, but {but}: an attack may have dictated the marks; read these responses, or set reads: both{remedy}"
    )


def cut_within(responses: Sequence[str | None], are_cut: Sequence[bool], marks: Marks) -> list[bool]:
    """Which of a model's responses an engine cut within a thought that the prompt had opened. They hold no mark of it;
    others of the same model tell: they close a thought that they do not open."""
    if not any(response is not None and closes_unopened(response, marks) for response in responses):
        return [False] * len(responses)
    return [
        is_cut and response is not None and not has_marks(response, marks)
        for response, is_cut in zip(responses, are_cut, strict=True)
    ]


def whole_response(trace: str | None, answer: str | None) -> str | None:
    """A response as one text, from an engine that gives the thought and the answer separately.

    trace: None or empty if there was no thought. answer: None where the response ends within its thought. Marks that
    either speaks of are broken up: they would end the thought, or open another. None if there is nothing at all.
    """
    if not trace:
        return answer
    thought, text = (without_marks(part) if part is not None else None for part in (trace, answer))
    return f"<think>\n{thought}" if text is None else f"<think>\n{thought}\n</think>\n\n{text}"


def without_marks(text: str) -> str:
    """The text with a space in every mark of a thought, so that it holds none."""
    for pattern in (_mark_pattern(MARKS), re.compile(re.escape(CHANNEL))):
        text = pattern.sub(lambda mark: f"{mark.group()[0]} {mark.group()[1:]}", text)
    return text


class Mark(NamedTuple):
    """A mark in a response. kind: its index among the marks; [start, end): its characters."""

    kind: int
    opens: bool
    start: int
    end: int


class ResponseParts(NamedTuple):
    """What a response is made of, in order: the spans of its thoughts and those of its answer, without the marks.

    answer: None where the response ends within a thought.
    """

    trace: list[Span]
    answer: list[Span] | None


def parts(response: str, opening: str | None = None, marks: Marks = MARKS) -> ResponseParts:
    """Thoughts and answer of a response.

    opening: the mark with which the prompt has opened a thought already, as ``opening_mark`` finds it. A response
    without marks is its answer, to the last character. A closing mark before any opening one ends a thought that the
    prompt has opened. marks: ``MARKS`` or more (``marks_with``).
    """
    if opening is None and CHANNEL in response and (harmony := _harmony_parts(response, marks)) is not None:
        return harmony
    bare = BARE_HARMONY.match(response)
    if bare:
        return ResponseParts([bare.span("trace")], [(bare.end(), len(response))])
    if begun := BARE_UNFINISHED.match(response):
        return ResponseParts([(begun.end(), len(response))], None)
    opened = opening is not None or closes_unopened(response, marks)  # by the prompt
    thoughts, behind = ([], (0, len(response))) if opened else _leading_thoughts(response)
    if behind is None:
        return ResponseParts(thoughts, None)
    seen = _marks(response, opening, marks, behind[0])
    if not seen:
        return ResponseParts(thoughts, _trimmed(response, [behind]) if thoughts else [behind])
    closings = _closings(seen)
    spans: list[Span] = []
    position, index = behind[0], 0
    while index < len(seen):
        if seen[index].opens:
            if index not in closings:
                return ResponseParts([*thoughts, (seen[index].end, len(response))], None)
            spans.append((position, seen[index].start))
            thoughts.append((seen[index].end, seen[closings[index]].start))
            index = closings[index]
            position = seen[index].end
        index += 1  # a further closing mark is text: the answer may speak of it
    return ResponseParts(thoughts, _trimmed(response, [*spans, (position, len(response))]))


def _harmony_parts(response: str, marks: Marks) -> ResponseParts | None:
    """Thoughts and answer of a response in harmony's messages; None for one that only speaks of their marks.

    Text outside of the messages is answer: judges read thoughts or answer, and nothing may be hidden from both.
    """
    messages = list(MESSAGE.finditer(response))
    mark = _mark_pattern(marks).search(response)
    if messages and mark is not None and mark.start() < messages[0].start():
        return None  # a thought of another kind speaks of them
    trace: list[Span] = []
    answer: list[Span] = []
    position = 0
    for message in messages:
        answer += _outside(response, position, message.start())
        spans = answer if message["channel"] == "final" else trace
        if not re.fullmatch(HEADER, message["header"]):
            spans.append(message.span("header"))
        spans.append(message.span("text"))
        position = message.end()
    answer += _outside(response, position, len(response))
    return None if answer and not messages else ResponseParts(trace, answer or None)


def _outside(response: str, start: int, end: int) -> list[Span]:
    """The text between two messages, without what harmony writes there."""
    edges = [edge for match in AROUND_MESSAGES.finditer(response, start, end) for edge in match.span()]
    edges = [start, *edges, end]
    return [span for span in zip(edges[::2], edges[1::2], strict=True) if response[slice(*span)].strip()]


class Piece(NamedTuple):
    """A part of a response that a judge reads. start_in_text: where it begins in the text that the judge reads."""

    start: int
    end: int
    start_in_text: int
    is_trace: bool


class JudgedResponse(NamedTuple):
    """What a judge reads of a response: the text, and the parts of the response that it is made of, in order."""

    text: str
    pieces: list[Piece]


def judged_response(response: str, response_parts: ResponseParts, reads: Reads) -> JudgedResponse | None:
    """What a judge reads of a response with these parts; None for one that ends within a thought.

    Marks are left out. A thought stands without the white space around it, an empty line between it and what is beside
    it. The answer stands as ``final_answer`` gives it.
    """
    if response_parts.answer is None:
        return None
    spans = [(start, end, False) for start, end in response_parts.answer] if reads != "trace" else []
    if reads != "answer":
        spans += [(*_stripped(response, span), True) for span in response_parts.trace]
    pieces: list[Piece] = []
    text = ""
    for start, end, is_trace in sorted(spans):
        if start == end:
            continue
        if pieces and (is_trace or pieces[-1].is_trace):
            text += "\n\n"
        pieces.append(Piece(start, end, len(text), is_trace))
        text += response[start:end]
    return JudgedResponse(text, pieces)


def _stripped(response: str, span: Span) -> Span:
    """The span without white space at its ends; an empty one where there is nothing else."""
    text = response[slice(*span)]
    start = span[0] + len(text) - len(text.lstrip())
    return start, max(start, span[0] + len(text.rstrip()))


def final_answer(response: str, opening: str | None = None, marks: Marks = MARKS) -> str | None:
    """The text of a response's answer; None where it ends within a thought.

    Not for text that is an answer already: a mark that it speaks of would count.
    """
    spans = parts(response, opening, marks).answer
    return None if spans is None else "".join(response[start:end] for start, end in spans)


def _leading_thoughts(response: str) -> tuple[list[Span], Span | None]:
    """The thoughts that are told by where they stand (``LEADING``), and what is behind them: None where the response
    ends within one."""
    thoughts: list[Span] = []
    position = 0
    while match := LEADING.match(response, position):
        thoughts.append(match.span("trace" if match["tag"] else "granite"))
        position = match.end()
    if begun := LEADING_UNFINISHED.match(response, position):
        return [*thoughts, (begun.end(), len(response))], None
    return thoughts, (position, len(response))


def _marks(response: str, opening: str | None, marks: Marks, start: int) -> list[Mark]:
    """The marks in a response, from ``start``, after one at its beginning for a thought that the prompt has opened."""
    seen = []
    for match in _mark_pattern(marks).finditer(response, start):
        kind, closes = divmod((match.lastindex or 1) - 1, 2)
        seen.append(Mark(kind, not closes, *match.span()))
    if opening is not None:
        seen.insert(0, Mark([pair[0] for pair in marks].index(opening), True, 0, 0))
    elif seen and not seen[0].opens and start == 0:
        seen.insert(0, Mark(seen[0].kind, True, 0, 0))
    return seen


def _closings(marks: Sequence[Mark]) -> dict[int, int]:
    """Index of an opening mark → index of the mark that closes its thought; without those that none closes.

    Marks inside a thought are pairs, or else words of the thought: then its first closing mark ends it.
    """
    closings: dict[int, int] = {}
    waiting: dict[int, list[int]] = {}  # kind → opening marks that are not closed yet
    for index, mark in enumerate(marks):
        if mark.opens:
            waiting.setdefault(mark.kind, []).append(index)
        elif waiting.get(mark.kind):
            closings[waiting[mark.kind].pop()] = index
    following: dict[int, int] = {}  # kind → its next closing mark
    for index in reversed(range(len(marks))):
        if not marks[index].opens:
            following[marks[index].kind] = index
        elif marks[index].kind in following:
            closings.setdefault(index, following[marks[index].kind])
    return closings


def _trimmed(response: str, spans: Sequence[Span]) -> list[Span]:
    """The spans without what stands around the answer: white space at its beginning, ``BEFORE_ANSWER``, and the closing
    mark of what that has opened."""
    kept = list(dropwhile(lambda span: not response[slice(*span)].strip(), spans))
    if not kept:
        return []
    before = BEFORE_ANSWER.match(response, *kept[0])
    assert before is not None  # it matches the empty text
    kept[0] = (before.end(), kept[0][1])
    closing = AROUND_ANSWER.get((before[1] or "").lower(), APRIEL_END)
    start, end = _stripped(response, kept[-1])
    if response[start:end].lower().endswith(closing):
        kept[-1] = (kept[-1][0], _stripped(response, (start, end - len(closing)))[1])
    return kept


def spans_in_text(spans: Iterable[Span], pieces: Sequence[Piece]) -> list[Span]:
    """Spans of the response as spans of the text that is made of ``pieces``, in order; what lies outside of the pieces
    is dropped."""
    starts = [piece.start for piece in pieces]

    def position_in_text(number: int, position: int) -> int:
        piece = pieces[number]
        return piece.start_in_text + min(max(position, piece.start), piece.end) - piece.start

    def moved(start: int, end: int) -> Span:
        first = max(0, bisect_right(starts, start) - 1)
        last = max(first, bisect_left(starts, end) - 1)
        if start >= pieces[first].end and first < last:  # between two pieces: what joins them is of neither
            first += 1
        return position_in_text(first, start), position_in_text(last, end)

    return [moved(*span) for span in spans] if pieces else [(0, 0) for _ in spans]


def opening_mark(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], marks: Marks = MARKS) -> str | None:
    """The mark that a prompt ends with: its template opens a thought, and the response only closes it."""
    return opening_in(prompt_end(tokenizer, prompt_ids), marks)


def prompt_end(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The text of a prompt's last tokens."""
    return str(tokenizer.decode(list(prompt_ids[-PROMPT_TAIL:]), clean_up_tokenization_spaces=False))


def opening_in(prompt: str, marks: Marks) -> str | None:
    """The mark that the text of a prompt ends with."""
    text = prompt.rstrip().lower()
    return next((opening for opening, _ in marks if text.endswith(opening.lower())), None)


def continuation(response: str, prompt: str, marks: Marks = MARKS) -> str:
    """A response as it continues its prompt: without the mark of the thought that the prompt has opened already.

    prompt: the text that it ends with.
    """
    opening, text = opening_in(prompt, marks), response.lstrip()
    if opening is None or not text.lower().startswith(opening.lower()):
        return response
    return text[len(opening) :].removeprefix(prompt[len(prompt.rstrip()) :])


def mark_strings(specials: Iterable[str], marks: Marks = MARKS) -> frozenset[str]:
    """The special-token strings of a tokenizer that marks of thoughts are made of."""
    strings = frozenset(specials)
    harmony = HARMONY if CHANNEL in strings else ()
    return frozenset(
        string for string in strings if string in harmony or any(string in mark for pair in marks for mark in pair)
    )


def mark_ids(tokenizer: PreTrainedTokenizerBase, marks: Marks = MARKS) -> frozenset[int]:
    """Ids of the special tokens that marks of thoughts are made of, without those that end or pad a text."""
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    strings = mark_strings(special.values(), marks) - {str(tokenizer.eos_token), str(tokenizer.pad_token)}
    return frozenset(index for index, content in special.items() if content in strings)


def decode_responses(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], marks: Marks = MARKS
) -> list[str]:
    """The texts of generated ids without special tokens, except those that are marks of thoughts.

    Without these, a thought could not be told from the answer. End and padding tokens are never kept.
    """
    kept = mark_ids(tokenizer, marks)
    dropped = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - kept
    return [
        str(
            tokenizer.decode(
                [token for token in row if token not in dropped] if kept.intersection(row) else list(row),
                skip_special_tokens=not kept.intersection(row),
                clean_up_tokenization_spaces=False,
            )
        )
        for row in rows
    ]
