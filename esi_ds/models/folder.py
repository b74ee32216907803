"""A model's folder before its weights are loaded: configuration, weights files, context length."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from esi_ds.artifacts import file_sha256
from esi_ds.config import JudgeModel, Model
from esi_ds.core.quantised import Weight
from esi_ds.errors import UserError
from esi_ds.models import hub
from esi_ds.models.quantised import WAY_OUT, Quantisation, model_weights, read_quantisation, without_quantisation
from esi_ds.models.weights import checkpoint_tensors
from esi_ds.reading import check_written_out, reading

# Configurations' names for the longest sequence: MPT's is max_seq_len, that of Whisper's decoder max_target_positions;
# the others are remote code's.
POSITIONS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_target_positions",
    "n_positions",
    "n_ctx",
    "seq_length",
    "max_sequence_length",
)

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names
EXACT_IN = {"bf16": {"BF16"}, "fp16": {"F16"}, "fp32": {"F32", "F16", "BF16"}}  # model.dtype → what it holds exactly


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    path: a folder or hub id. revision: branch, tag or commit of a hub id. trust_remote_code: whether the model's own
    code may run. field: the config key that names the path, for error messages.
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    field: str = "model.path"

    @property
    def trust_key(self) -> str:
        """The config key that says whether the model's own code may run; the models of ``eval`` have ``model``'s."""
        section = self.field.removesuffix(".path")
        return f"{'model' if section.startswith('eval.models.') else section}.trust_remote_code"

    @classmethod
    def of(cls, section: Model | JudgeModel, key: str = "model") -> ModelSource:
        """The source that the section at ``key`` of the experiment's config names."""
        return cls(section.path, section.revision, section.trust_remote_code, f"{key}.path")

    def folder(self, only_local: bool = False) -> Path:
        """The folder with its files on this machine; weights need not be there.

        A hub model's are downloaded, once on each host of the job, unless ``only_local``. Raises OSError or ValueError,
        and UserError where the path is not a folder and the hub has no such id or cannot be reached.
        """
        if os.path.isdir(self.path):
            return Path(self.path)
        try:
            return hub.files(self.path, self.revision, only_local)
        except (OSError, ValueError) as error:
            if reason := hub.why_not_found(error):
                raise hub.not_found(self.field, self.path, "model", reason) from error
            raise

    def code_revision(self, only_local: bool = False) -> str | None:
        """The commit of the code that the model takes from another repository on the hub; None where it takes none.

        Each of transformers' loaders must be given it: else they take that repository's main branch. That code is
        downloaded, once on each host of the job, unless ``only_local``. Raises UserError where it cannot be read or is
        of several repositories, and as ``folder``.
        """
        names = _code_repositories(self.folder(only_local)) if self.trust_remote_code else set()
        if os.path.isdir(self.path):
            names.discard(self.path)  # transformers looks for a folder of that name first
        if not names:
            return None
        name, *others = sorted(names)
        remedy = f"copy that code into the model's folder, and remove {name}-- from auto_map"
        if others or os.path.isdir(name):
            problem = "but only code of one repository on the hub can be held to a commit"
            raise UserError(
                self.field, self.path, f"takes code from {' and '.join([name, *others])}, {problem}", remedy
            )
        with reading(self.field, self.path, remedy, f"takes code from {name}, which cannot be read"):
            return hub.files(name, self.revision if name == self.path else None, only_local).name


def _code_repositories(folder: Path) -> set[str]:
    """The repositories from which a model's folder takes code (``auto_map``: "repository--module.Class").

    Raises OSError, ValueError, or whatever transformers does over a damaged file.
    """
    sections = [get_tokenizer_config(folder)]
    if (folder / "config.json").is_file():
        sections.append(PretrainedConfig.get_config_dict(folder)[0])
    named = (name for section in sections for name in _texts(section.get("auto_map")))
    return {repository for repository, dashes, _ in (name.partition("--") for name in named) if dashes}


def _texts(content: Any) -> Iterator[str]:
    """Every value in a JSON content that is a text."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)


@contextmanager
def reading_model(source: ModelSource, remedy: str, problem: str) -> Iterator[None]:
    """``reading`` around transformers' loading, whose refusal of a model's own code names the key that allows it."""
    with reading(source.field, source.path, remedy, problem):
        try:
            yield
        except ValueError as error:
            if source.trust_remote_code or "trust_remote_code=True" not in str(error):
                raise
            allow = f"read it, and set {source.trust_key}: true if you trust it"
            raise UserError(source.field, source.path, "needs code that comes with it", allow) from error


def load_model_config(source: ModelSource, only_local: bool = False) -> PretrainedConfig:
    """The model's architecture.

    For a quantised model that can be read, it is the plain model's. only_local: do not contact the hub; read folders
    and the hub's cache only. Raises UserError where there is no readable configuration, or where the weights are
    quantised in a way that is not read.
    """
    path, field = source.path, source.field
    # os.path, unlike pathlib, takes a name that is too long for a file for one that is not there.
    looks_local = path.startswith((".", "/", "~")) or os.path.exists(path)
    check_written_out(field, path)
    if looks_local and not os.path.lexists(path):
        raise UserError(field, path, "there is no such folder", "give a Hugging Face folder")
    if looks_local and path.endswith(".gguf"):
        raise UserError(field, path, "is a GGUF file, which is not read", WAY_OUT)
    if looks_local and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(field, path, "is not a model folder: it has no config.json", "give a Hugging Face folder")
    if not looks_local and not hub.is_hub_id(path):
        raise hub.no_model(field, path)
    remedy = "give a Hugging Face folder or the id of a model on the hub that can be reached"
    with reading_model(source, remedy, "has no readable model configuration"):
        folder = source.folder(only_local)
        config = AutoConfig.from_pretrained(
            folder,
            trust_remote_code=source.trust_remote_code,
            code_revision=source.code_revision(only_local),
            local_files_only=only_local,
        )
    config.name_or_path = path  # for messages: not the folder in the hub's cache
    read_quantisation(folder, field, path)
    without_quantisation(config)
    if extra_files := getattr(type(config), "extra_files", ()):  # transformers would load them beside the weights
        problem = f"is a {config.model_type}, which keeps weights in a file of their own ({extra_files[0]})"
        raise UserError(field, path, problem, "give a model whose weights are all in its safetensors files")
    return config


def rounded_from(section: Model) -> str | None:
    """The dtypes of a checkpoint that ``model.dtype`` does not hold exactly, such as "F32"; None where none is lost.

    Of a quantised checkpoint the plain weights' dtype counts, which is what the model is read in.
    """
    source, kept = ModelSource.of(section), EXACT_IN[section.dtype]
    if quantisation_of(source) is not None:
        return None
    stored = {tensor.dtype for tensor in checkpoint_tensors(checkpoint_folder(source), source.field)}
    return ", ".join(sorted((stored & FLOATS) - kept)) or None


def check_weights(source: ModelSource) -> None:
    """Raise UserError for a model whose weights transformers would not load, or in whose place it would load others.

    Pickled weights are never read. A hub model's are checked once they are here (``checked_folder``).
    """
    if os.path.isdir(source.path):
        checked_folder(source)


def checked_folder(source: ModelSource) -> Path:
    """``checkpoint_folder``, with the weights checked as ``check_weights`` does it."""
    folder = checkpoint_folder(source)
    if (folder / "adapter_config.json").is_file():  # with peft installed, transformers would add it to the weights
        remedy = "merge it into its base model first, or remove that file if the weights beside it are merged already"
        raise UserError(source.field, source.path, "holds an adapter (LoRA): adapter_config.json", remedy)
    model_weights(folder, source.field)
    return folder


def checkpoint_folder(source: ModelSource) -> Path:
    """The folder of the model's files with its weights on this machine.

    A hub model is downloaded unless it is in the cache, once on each host of the job. Raises as ``ModelSource.folder``.
    """
    folder = source.folder()
    return folder if os.path.isdir(source.path) else hub.weights(source.path, source.revision, source.field)


def files_digest(folder: Path) -> str:
    """sha256 of the names and bytes of a model's files but for weights: configuration, tokenizer, template, code."""
    names = sorted({file.name for pattern in hub.SMALL_FILES for file in folder.glob(pattern) if file.is_file()})
    digests = {name: file_sha256(folder / name) for name in names}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def quantisation_of(source: ModelSource) -> Quantisation | None:
    """How the model's weights are quantised; None if they are not. Raises UserError, OSError or ValueError."""
    return read_quantisation(source.folder(), source.field, source.path)


def dequantised(sources: Iterable[ModelSource]) -> list[str]:
    """A sentence on each model whose weights are dequantised while read. Raises as ``quantisation_of``."""
    formats = ((source, quantisation_of(source)) for source in sources)
    return [f"{s.field} = {s.path}: weights dequantised from {form}" for s, form in formats if form is not None]


def stored_weights(source: ModelSource) -> list[Weight]:
    """What the model's checkpoint holds; nothing where its weights are not, or not yet, on this machine.

    Raises UserError where a local folder's weights are damaged.
    """
    folder = Path(source.path)
    if folder.is_dir():
        return model_weights(folder, source.field) if any(folder.glob("*.safetensors")) else []
    try:
        return model_weights(source.folder(only_local=True), source.field)
    except (OSError, ValueError, UserError):  # not downloaded, or only in part
        return []


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence the model takes, in tokens; None where its configuration does not say.

    XLNet's says -1: there is no limit.
    """
    text = config.get_text_config()
    stated = (getattr(text, name, None) for name in POSITIONS)
    longest = next((value for value in stated if isinstance(value, int)), -1)
    return longest if longest > 0 else None
