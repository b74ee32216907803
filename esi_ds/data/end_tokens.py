"""Which tokens end a turn. Tuning teaches them, generation stops at them, and answers are read up to them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from esi_ds.data.chat import TemplateRejection, render
from esi_ds.models.folder import ModelSource
from esi_ds.reading import check_type, read_configuration, reading

MARK = "⟦answer⟧"
REMEDY = "give a number or a list of numbers, or leave it out"


def end_tokens(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that end a turn of the model.

    They are the tokenizer's end token, ``eos_token_id`` of generation_config.json and of config.json, and the token
    with which the chat template ends an answer. In some published model or other, each of these is missing or differs
    from the rest. Raises UserError for a file that cannot be read.
    """
    ids = {tokenizer.eos_token_id, template_end(tokenizer)} - {None}
    for name in ("generation_config.json", "config.json"):
        ids |= _stored_ends(source, name)
    return frozenset(ids)


def _stored_ends(source: ModelSource, name: str) -> set[int]:
    """``eos_token_id`` of one of the model's files, and of the text model in it; empty where it names none.

    The file itself is read: a class of transformers would fill in a default that need not be this model's token.
    """
    with reading(source.field, source.path, REMEDY):
        file = source.folder() / name
    if not file.is_file():  # a model need not have a generation_config.json
        return set()
    content = read_configuration(file, source.field, "mend the file, or download the model again")
    text = content.get("text_config")
    ends: set[int] = set()
    for section in (content, text if isinstance(text, dict) else {}):
        stored = section.get("eos_token_id")
        with reading(source.field, file, REMEDY, f"has the eos_token_id {stored!r}"):
            if stored is not None:
                ends |= set(check_type(stored if isinstance(stored, list) else [stored], list[int]))
    return {token for token in ends if token >= 0}  # -1: some models' word for none


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer; None where it writes no token of the tokenizer's own.

    Only what ends the last turn counts: a template may close an earlier part of an answer by another token.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARK}]
    try:
        _, mark, rest = render(tokenizer, turns, add_generation_prompt=False).rpartition(MARK)
    except TemplateRejection:
        return None
    if not mark or not rest.strip():
        return None
    ids = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
