"""Rows to learn, of models that think: the text that generation would have to give behind the prompt.

Chat templates treat thoughts in several ways. Some show the last turn's thought and drop earlier ones (Qwen3, gpt-oss),
some drop every one of them, and open the thought in the prompt (DeepSeek-R1). What is learnt is what the model would
generate: thought and answer behind the prompt as it is at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from esi_ds.data.chat import TemplateRejection, render
from esi_ds.data.columns import UnreadableRow
from esi_ds.data.thoughts import MARKS, Marks, opening_in, parts
from esi_ds.data.turns import Turn
from esi_ds.words import counted

ANSWER, TRACE = "⟦answer⟧", "⟦thought⟧"
UNFINISHED_ROW = "an answer ends within a thought"


@dataclass
class ThoughtCounts:
    """What became of the thoughts of the answers that are learnt."""

    learnt: int = 0  # answers whose thought is learnt
    dropped: int = 0  # answers whose thought has no place in the template
    empty: int = 0  # answers without a thought that are learnt with an empty one, as the template shows it

    @property
    def note(self) -> str:
        """For the end of a line of the log; "" if there is nothing to say."""
        learnt, dropped, empty = (counted(number, "answer") for number in (self.learnt, self.dropped, self.empty))
        says = [f"{learnt} learnt with a thought"] if self.learnt else []
        if self.dropped:
            says.append(f"{dropped} learnt without theirs, for which the chat template has no place")
        if self.empty:
            says.append(f"{empty} without a thought learnt with an empty one, as the chat template shows it")
        return "".join(f"; {text}" for text in says)


@dataclass
class ThoughtTemplate:
    """How a tokenizer's chat template treats thoughts. marks: of thoughts.

    thinks: whether it knows of thoughts at all; for one that does not, marks are text like any other.
    """

    tokenizer: PreTrainedTokenizerBase
    marks: Marks = MARKS
    thinks: bool = field(init=False)
    counts: ThoughtCounts = field(default_factory=ThoughtCounts, init=False)

    def __post_init__(self) -> None:
        asked: list[Turn] = [{"role": "user", "content": "Why?"}]
        opening, closing = self.marks[0]
        inline = f"{opening}\n{TRACE}\n{closing}\n\n{ANSWER}"
        try:
            prompt = render(self.tokenizer, asked, add_generation_prompt=True)
            with_trace_field, with_inline_trace = (
                render(self.tokenizer, [*asked, turn], add_generation_prompt=False)
                for turn in (
                    {"role": "assistant", "content": ANSWER, "trace": TRACE},
                    {"role": "assistant", "content": inline},
                )
            )
        except TemplateRejection:
            self.thinks = False
            return
        drops = ANSWER in with_inline_trace and TRACE not in with_inline_trace
        self.thinks = TRACE in with_trace_field or drops or opening_in(prompt, self.marks) is not None

    def separated(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns, with the thoughts in the texts of the assistant's apart from their answers. Raises
        UnreadableRow."""
        return [self._separated(turn) if turn["role"] == "assistant" else turn for turn in turns]

    def _separated(self, turn: Turn) -> Turn:
        text = turn["content"]
        text_parts = parts(text, None, self.marks)
        if text_parts.answer is None:
            raise UnreadableRow(UNFINISHED_ROW)
        if not text_parts.trace:
            return turn
        if turn.get("trace"):
            raise UnreadableRow("a turn has two thoughts, one in its text")
        new = turn.copy()
        new["content"] = "".join(text[start:end] for start, end in text_parts.answer)
        new["trace"] = "\n\n".join(text[start:end].strip() for start, end in text_parts.trace).strip()
        return new

    def last_piece(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """(prompt, what the model is to generate behind it) of the last turn, which is one of the assistant.

        Where the template does not end the turn, nor does this text.
        """
        *before, last = turns
        trace, answer = last.get("trace", ""), last["content"]
        prompt = render(self.tokenizer, before, add_generation_prompt=True)
        piece = self._continued(prompt, turns)
        opening = opening_in(prompt, self.marks)
        if piece is not None and trace in piece:
            shown = piece
        elif opening is not None:
            shown = f"{trace}\n{self._closing(opening)}\n\n{answer}"
        elif trace and not self._is_closed(prompt):
            opening, closing = self.marks[0]
            shown = f"{opening}\n{trace}\n{closing}\n\n{answer}"
        else:  # the prompt itself says that there is no thought
            plain: Turn = {"role": "assistant", "content": answer}
            shown = self._continued(prompt, [*before, plain]) or answer
        return prompt, shown

    def before_answer(self) -> str:
        """What stands between a prompt and an answer without a thought: an empty thought, or the mark of a channel; ""
        where the template knows of no thoughts, or a prompt says itself that there is none."""
        if not self.thinks:
            return ""
        _, shown = self.last_piece([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ANSWER}])
        return shown.partition(ANSWER)[0]

    def _continued(self, prompt: str, turns: Sequence[Turn]) -> str | None:
        """What the template writes of the turns behind the prompt; None where it writes another prompt."""
        text = render(self.tokenizer, turns, add_generation_prompt=False)
        return text[len(prompt) :] if text.startswith(prompt) else None

    def _closing(self, opening: str) -> str:
        return next(closing for mark, closing in self.marks if mark == opening)

    def _is_closed(self, prompt: str) -> bool:
        """Whether a prompt ends with a thought that is over already."""
        end = prompt.rstrip().lower()
        return any(end.endswith(closing.lower()) for _, closing in self.marks)

    def count(self, turn: Turn, context: str, shown: str) -> None:
        """Count what becomes of the thought of an answer that is learnt. context: the text before it, which may end
        with the mark of a thought; shown: its own."""
        trace = turn.get("trace", "")
        if trace:
            self.counts.learnt += trace in shown
            self.counts.dropped += trace not in shown
        else:
            self.counts.empty += bool(parts(shown, opening_in(context, self.marks), self.marks).trace)
