"""The weights of a folder are the files that transformers loads from it, whatever else lies beside them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

from esi_ds import tensor_files
from esi_ds.data.end_tokens import end_tokens
from esi_ds.errors import UserError
from esi_ds.models import fingerprint
from esi_ds.models.beside_weights import copy_beside_weights, name_dtype
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource, check_weights, load_model_config
from esi_ds.models.meta import meta_model
from esi_ds.models.weights import checkpoint_tensors, weight_files
from esi_ds.tensor_files import tensor_sha256

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BESIDE = (
    "model.safetensors",
    INDEX,
    "model.fp16.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
)


def save(folder: Path, names: tuple[str, ...], configured: str | None = None) -> None:
    """A folder with these files; each safetensors file holds a tensor under its own name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if name == INDEX:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {file: file for file in SHARDS}}))
        for file in SHARDS if name == INDEX else (name,):
            save_file({file: torch.zeros(2)}, folder / file)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": configured} if configured else {}))


def loaded_by_transformers(folder: Path, configured: str | None) -> list[str] | None:
    """Names of the files that ``from_pretrained`` would read; None where it refuses."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            str(folder), None, None, use_safetensors=True, user_agent=None, is_remote_code=False,
            transformers_explicit_filename=configured,
        )  # fmt: skip
    except OSError:
        return None
    return sorted(Path(file).name for file in files)


@pytest.mark.parametrize("configured", [None, "consolidated.safetensors", INDEX])
def test_weights_are_the_files_that_transformers_loads(tmp_path: Path, configured: str | None) -> None:
    """Every set of files that may lie side by side: all 64 of them, with and without ``transformers_weights``."""
    sets = (names for size in range(len(BESIDE) + 1) for names in itertools.combinations(BESIDE, size))
    for number, names in enumerate(sets):
        folder = tmp_path / str(number)
        save(folder, names, configured)
        if configured is not None and configured not in names:
            with pytest.raises(UserError, match="^model.path"):
                weight_files(folder)
            continue
        expected = loaded_by_transformers(folder, configured)
        if expected is None:
            reason = r"holds neither model.safetensors nor .*; save the model with save_pretrained$"
            if "pytorch_model.bin" in names:
                reason = r"holds pickled weights \(pytorch_model.bin\), which are not read: .* save_pretrained to a new"
            with pytest.raises(UserError, match=reason):
                weight_files(folder)
        else:
            assert [file.name for file in weight_files(folder)] == expected, names
            assert {tensor.name for tensor in checkpoint_tensors(folder)} == set(expected)


def test_digests_follow_the_weights_that_are_loaded_beside_a_stale_index(tmp_path: Path) -> None:
    """The index and its shards are left over: transformers loads ``model.safetensors``."""
    folder = build_model("llama", tmp_path / "model", byte_bpe_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    for file in (tmp_path / "old").glob("model*"):
        os.rename(file, folder / file.name)
    before = tensor_digests(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(tmp_path / "new")
    os.replace(tmp_path / "new/model.safetensors", folder / "model.safetensors")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))
    after = tensor_digests(folder)
    assert set(after) == set(before) and all(after[name] != before[name] for name in after)


def test_of_a_tensor_in_two_files_the_one_that_is_loaded_counts(tmp_path: Path) -> None:
    """transformers reads the files in the order of their names, and all that is in them."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / SHARDS[0])
    save_file({"b": torch.zeros(2), "c": torch.zeros(2)}, tmp_path / SHARDS[1])
    assert [(tensor.name, tensor.file.name) for tensor in checkpoint_tensors(tmp_path)] == [
        ("a", SHARDS[0]),
        ("b", SHARDS[1]),
        ("c", SHARDS[1]),
    ]
    parts = [tensor_digests(tmp_path, part, 2) for part in range(2)]
    assert parts[0] | parts[1] == tensor_digests(tmp_path) and not set(parts[0]) & set(parts[1])


def test_digests_are_of_every_byte_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 bytes, in three whole blocks and a part of one."""
    monkeypatch.setattr(fingerprint, "BLOCK", 64)
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 64)
    values = torch.arange(50, dtype=torch.float32)
    save_file({"a": values, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    content = values.numpy().tobytes()
    assert tensor_digests(tmp_path)["a"] == hashlib.sha256(b"F32 [50]" + content).hexdigest()
    (tensor,) = (tensor for tensor in checkpoint_tensors(tmp_path) if tensor.name == "a")
    assert tensor_sha256(tensor) == hashlib.sha256(content).hexdigest()


def damage(folder: Path, what: str) -> None:
    """A sound folder of two files becomes one that must be refused."""
    index = folder / INDEX
    if what in ("outside", "absolute", "control"):
        names = {"outside": "../other.safetensors", "absolute": str(folder / SHARDS[0]), "control": "a\nb"}
        index.write_text(json.dumps({"weight_map": {"a": names[what]}}))
    elif what == "no file":
        (folder / SHARDS[1]).unlink()
    elif what == "torn":
        (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-1])
    elif what == "foreign":
        (folder / SHARDS[1]).write_text("version https://git-lfs.github.com/spec/v1\n")
    elif what == "empty":
        (folder / SHARDS[1]).write_bytes(b"")
    elif what == "pipe":
        (folder / SHARDS[1]).unlink()
        os.mkfifo(folder / SHARDS[1])
    elif what == "torn index":
        index.write_text(index.read_text()[:-5])
    elif what == "list":
        index.write_text("[]")
    elif what == "names nothing":
        index.write_text('{"weight_map": {}}')
    elif what == "distributed":
        save_file({"a": torch.zeros(1)}, folder / "shard-00000-model-00001-of-00001.safetensors")
    elif what == "configured outside":
        (folder / "config.json").write_text('{"transformers_weights": "../model.safetensors"}')
    elif what == "configured pickle":
        (folder / "config.json").write_text('{"transformers_weights": "pytorch_model.bin"}')
    elif what == "configured number":
        (folder / "config.json").write_text('{"transformers_weights": 3}')


DAMAGES = (
    "outside", "absolute", "control", "no file", "torn", "foreign", "empty", "pipe", "torn index", "list",
    "names nothing", "distributed", "configured outside", "configured pickle", "configured number",
)  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_folders_are_refused(tmp_path: Path, what: str) -> None:
    save(tmp_path, (INDEX,))
    damage(tmp_path, what)
    with pytest.raises(UserError, match="^judge.path = "):
        checkpoint_tensors(tmp_path, "judge.path")


LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIGS = {
    "empty": "",
    "torn": json.dumps(LLAMA)[:-9],
    "a list": "[]",
    "a number": "3",
    "deep": "[" * 100_000,
    "no text": b"\xff\xfe",
    "no type": "{}",
    "a number for a type": json.dumps(LLAMA | {"model_type": 3}),
    "an unknown type": json.dumps(LLAMA | {"model_type": "llamma"}),
    "a list for a size": json.dumps(LLAMA | {"hidden_size": [8]}),
    "a text for a size": json.dumps(LLAMA | {"hidden_size": "8"}),
    "no heads": json.dumps(LLAMA | {"num_attention_heads": 0}),
    "a negative size": json.dumps(LLAMA | {"hidden_size": -8}),
    "an encoder": json.dumps({"model_type": "vit"}),
    "files of its own": json.dumps({"model_type": "jev"}),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_no_model_can_be_made_of(tmp_path: Path, what: str) -> None:
    content = CONFIGS[what]
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    source = ModelSource(str(tmp_path), field="judge.path")
    with pytest.raises(UserError, match="^judge.path = "):
        meta_model(load_model_config(source), source)


def test_a_configuration_with_infinity(tmp_path: Path) -> None:
    """transformers 4 wrote one so, and Nemotron-H's and Mamba-2's are published so."""
    tokenizer = byte_bpe_tokenizer()
    folder, copied = tmp_path / "model", tmp_path / "copied"
    build_model("llama", folder, tokenizer)
    content = json.loads((folder / "config.json").read_text())
    content |= {"time_step_limit": [0.0, math.inf], "eos_token_id": 7, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(content))
    source = ModelSource(str(folder))
    assert load_model_config(source).time_step_limit == [0.0, math.inf]
    assert 7 in end_tokens(source, tokenizer)
    check_weights(source)
    copy_beside_weights(folder, copied, "MODEL")
    name_dtype(copied, torch.bfloat16, "MODEL")
    copied_config = AutoConfig.from_pretrained(copied)
    assert copied_config.time_step_limit == [0.0, math.inf] and copied_config.dtype == torch.bfloat16


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """With peft installed transformers would add it, without peft it would not."""
    save(tmp_path, ("model.safetensors",))
    check_weights(ModelSource(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter .*, or remove that file if the weights beside it are"):
        check_weights(ModelSource(str(tmp_path)))


def test_the_folder_of_a_saved_model_has_one_file(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path, byte_bpe_tokenizer())
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert {tensor.name for tensor in checkpoint_tensors(folder)} == set(load_file(folder / "model.safetensors"))
