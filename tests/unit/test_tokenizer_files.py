"""Token ids are those of a folder's tokenizer.json, whatever class it names (esi_ds/data/tokenizer_files.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import byte_bpe_tokenizer, sentencepiece_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from esi_ds.data.chat import load_tokenizer
from esi_ds.data.tokenizer_files import other_patterns
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource

TEXT = "to:\n\n12 345,6 it's I'LL\t x  y\r\n\n\nÜe\u0301 한국 中文<|end|></s> The guard\n\n1"
NUMBERED = ["Do this:\n\n1. Boil 250 ml.\n\n2. Add 12 g."] * 20
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
PATTERN = r"\p{N}{1,3}|\s*[\r\n]+|[^\p{N}\s]+|\s+"
THREES = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), BYTES])


def tokenizer_folder(folder: Path, kind: str, settings: dict[str, Any], rule: Any = None) -> Path:
    """kind: the model_type that config.json names. settings: of tokenizer_config.json. rule: which splits a text."""
    tokenizer = byte_bpe_tokenizer(vocab_size=420, corpus=NUMBERED) if rule else sentencepiece_tokenizer()
    if rule:
        tokenizer.backend_tokenizer.pre_tokenizer = rule
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("kind", "class_name", "rule"),
    [
        ("llama", "GPT2Tokenizer", DIGITS),  # SmolLM2
        ("starcoder2", "GPT2Tokenizer", DIGITS),
        ("qwen2", "PreTrainedTokenizerFast", THREES),  # a model with another family's vocabulary
        ("llama", "LlamaTokenizerFast", BYTES),  # DeepSeek-R1-Distill-Llama
        ("llama", "LlamaTokenizer", None),
    ],
)
def test_ids_are_those_of_the_file(kind: str, class_name: str, rule: Any, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "base", kind, {"tokenizer_class": class_name}, rule)
    base = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    assert tokenizer(TEXT)["input_ids"] == base.encode(TEXT).ids
    tokenizer.save_pretrained(tmp_path / "exported")
    exported = json.loads((tmp_path / "exported/tokenizer.json").read_text())
    stored = json.loads((folder / "tokenizer.json").read_text())
    assert exported == stored
    assert load_tokenizer(ModelSource(str(tmp_path / "exported")))(TEXT)["input_ids"] == base.encode(TEXT).ids


def test_special_tokens_that_only_the_class_names(tmp_path: Path) -> None:
    """GPT-2's own folder names none; what the file's vocabulary lacks is not added to it."""
    folder = tokenizer_folder(tmp_path, "llama", {"tokenizer_class": "LlamaTokenizer"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        del settings[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer.padding_side == "left"
    folder = tokenizer_folder(tmp_path / "bytes", "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, BYTES)
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    assert "<|endoftext|>" not in tokenizer.get_vocab() and len(tokenizer) == stored.get_vocab_size()


class CommonTokenizer(PreTrainedTokenizerBase):
    """As mistral-common's, which has no ``is_fast``."""


def test_mistrals_own_format_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mistral-common installed, which vLLM needs, transformers prefers tekken.json to tokenizer.json."""
    folder = tokenizer_folder(tmp_path / "both", "mistral", {"tokenizer_class": "LlamaTokenizer"}, DIGITS)
    (folder / "tekken.json").write_text("{}")
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr(
        tokenization_auto, "_use_mistral_format", lambda *_, **options: options["mistral_format"] is None
    )
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    assert type(tokenizer) is PreTrainedTokenizerFast
    tokenizer.save_pretrained(tmp_path / "exported")
    assert "mistral_format" not in (tmp_path / "exported/tokenizer_config.json").read_text()
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(tokenization_auto.AutoTokenizer, "from_pretrained", lambda *_, **__: CommonTokenizer())
    with pytest.raises(UserError, match="its own class is not a fast tokenizer"):
        load_tokenizer(ModelSource(str(folder)))


@pytest.mark.parametrize(
    ("pattern", "settings", "is_other"),
    [
        (PATTERN, {}, False),
        (r"\p{N}|\p{L}+|\s+", {}, True),
        (r"\p{N}|\p{L}+|\s+", {"fix_mistral_regex": True}, False),
        (None, {}, False),
    ],
)
def test_a_pattern_that_is_not_that_of_tekken_is_remarked_on(
    pattern: str | None, settings: dict[str, Any], is_other: bool, tmp_path: Path
) -> None:
    """As of Mistral-Small-24B-Instruct-2501."""
    folder = tokenizer_folder(tmp_path, "mistral", settings, THREES)
    sources = [ModelSource(str(folder))]
    assert other_patterns(sources) == []
    (folder / "tekken.json").write_text(json.dumps({"config": {"pattern": pattern} if pattern else {}, "vocab": []}))
    remarks = other_patterns(sources)
    assert len(remarks) == is_other
    assert all(f"model.path = {folder}: tokenizer.json splits texts by another pattern" in line for line in remarks)
    (folder / "tekken.json").write_text("version https://git-lfs.github.com/spec/v1")
    assert other_patterns(sources) == []
