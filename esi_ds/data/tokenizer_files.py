"""Whether a folder's files say how its tokenizer splits texts, or transformers would have to guess."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.models.auto.tokenization_auto import get_tokenizer_config

from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource

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
