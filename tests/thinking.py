"""Models that think, as tests have them: published chat templates, and a small tokenizer with their special tokens."""

from __future__ import annotations

from pathlib import Path

from builders import byte_bpe_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from esi_ds.data.thoughts import MARKS, Marks, parts

FOLDER = Path(__file__).parent / "thinking_templates"  # its README says where they are from
# Of each template: its own tokens that are special, those that are not, and the token that ends a turn.
TOKENS = {
    "qwen3": (("<|im_start|>", "<|im_end|>"), ("<think>", "</think>"), "<|im_end|>"),
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        "<｜end▁of▁sentence｜>",
    ),
    "gptoss": (("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), (), "<|return|>"),
}


def thought(response: str, opening: str | None = None, marks: Marks = MARKS) -> str:
    """The text of a response's thoughts, each without white space around it, an empty line between two; "" if it has
    none."""
    texts = (response[slice(*span)].strip() for span in parts(response, opening, marks).trace)
    return "\n\n".join(text for text in texts if text)


def template(name: str) -> str:
    """A published chat template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def thinking_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A small tokenizer with the published chat template, its tokens and its end token."""
    tokenizer = byte_bpe_tokenizer()
    special, ordinary, end = TOKENS[name]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    tokenizer.eos_token = end
    tokenizer.chat_template = template(name)
    return tokenizer
