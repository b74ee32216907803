"""How a folder's files say that its tokenizer splits texts, and whether transformers would have to guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource
from esi_ds.reading import check_type, read_configuration, read_text, reading

WHOLE = ("tokenizer.json", "tokenizer.*.json", "tekken.json")  # the pattern that splits a text is in them
NEEDED = "add one: its authors', or one made with the pattern of its own class (docs/running.md)"
RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")  # a line of a tiktoken file: a token's bytes in base64, and its id


def check_pattern_known(source: ModelSource, folder: Path) -> None:
    """Raise UserError for a vocabulary of tiktoken's that neither a tokenizer.json nor code that may run reads.

    transformers would read it with the pattern of other models, whatever class the folder names, and other token ids
    would result. What SentencePiece has written says itself how texts are split. folder: of the source's files. Raises
    OSError or ValueError where they cannot be read.
    """
    if any(True for pattern in WHOLE for _ in folder.glob(pattern)):
        return
    if source.trust_remote_code and "AutoTokenizer" in get_tokenizer_config(folder).get("auto_map", ()):
        return
    file = next(filter(_is_tiktoken, (*folder.glob("*.model"), *folder.glob("*.tiktoken"))), None)
    if file is not None:
        problem = f"has no tokenizer.json, and its {file.name} does not say how a text is split"
        raise UserError(source.field, source.path, problem, NEEDED)


def _is_tiktoken(file: Path) -> bool:
    with file.open("rb") as opened:
        return RANK.fullmatch(opened.readline(1 << 16).strip()) is not None


def as_in_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as tokenizer.json defines it; as transformers loaded it where there is none, or by code that may
    run.

    Most classes take only vocabulary and merges from that file, and split texts by a rule of their own: GPT-2's, which
    SmolLM2's folder names, makes two tokens of a blank line before a digit, where the model has learnt one. Models are
    trained with the file, and other libraries read it whole. folder: the tokenizer's. Raises OSError or ValueError.
    """
    kind = type(tokenizer)
    if kind is PreTrainedTokenizerFast or not kind.__module__.startswith("transformers."):
        return tokenizer
    if not (folder / "tokenizer.json").is_file():
        return tokenizer
    whole = PreTrainedTokenizerFast.from_pretrained(
        folder, padding_side=tokenizer.padding_side, model_input_names=tokenizer.model_input_names
    )
    vocabulary, named = whole.get_vocab(), whole.special_tokens_map
    defaults = {key: token for key, token in tokenizer.special_tokens_map.items() if key not in named}
    whole.add_special_tokens({key: token for key, token in defaults.items() if token in vocabulary})
    return whole


def other_patterns(sources: Iterable[ModelSource]) -> list[str]:
    """A sentence on each model whose tokenizer.json splits texts by another pattern than the tekken.json beside it.

    Some of Mistral's models were published so, and were trained with the latter. Nothing else reads that file: one that
    cannot be read is left out. Raises UserError as ``ModelSource.folder``.
    """
    sentences = []
    for source in sources:
        tekken, file = (source.folder() / name for name in ("tekken.json", "tokenizer.json"))
        if not tekken.is_file() or not file.is_file():
            continue
        try:
            with reading(source.field, file, "download the model again"):
                content = read_configuration(tekken, source.field, "download it again")
                pattern = check_type(content.get("config", {}), dict[str, Any]).get("pattern")
                is_same = pattern is None or json.dumps(pattern) in read_text(file)
                is_mended = get_tokenizer_config(file.parent).get("fix_mistral_regex", False)
        except UserError:
            continue
        if not is_same and not is_mended:
            problem = "tokenizer.json splits texts by another pattern than tekken.json"
            remedy = "fix_mistral_regex: true in its tokenizer_config.json takes that of Mistral's models"
            sentences.append(f"{source.field} = {source.path}: {problem}; {remedy}")
    return sentences
