"""Folders of weights on a full disk: every file that is written is on disk in the end, and named where it cannot be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import byte_bpe_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig

from esi_ds import patch
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.zero import files
from esi_ds.zero.export import export_model
from esi_ds.zero.files import Entry


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is put on disk."""
    names: list[str] = []
    fsync = os.fsync

    def remember(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removeprefix(".").removesuffix(".tmp"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", remember)
    return names


def fail_to_sync(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full when this file, or its temporary one, is put there; a descriptor's error names no file."""

    def fail(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name in (name, f".{name}.tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def write_mask(folder: Path) -> None:
    parameter = Parameter("a.weight", (3, 4), 0, "mlp.up", (Unit("a.weight", "mlp.up", 0, None, 0, 12),))
    shard = Shard(parameter, ((0, 12),), parameter.name)
    bits = {parameter.name: torch.ones(12, dtype=torch.bool)}
    files.write_mask(folder, [parameter], [shard], bits, {"format": "x"}, [{"parameter": parameter.name}])


MASK_FILES = {"units.json", "digests.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}


def test_all_of_a_mask_is_on_disk(tmp_path: Path, synced: list[str]) -> None:
    write_mask(tmp_path / "mask")
    assert {file.name for file in (tmp_path / "mask").iterdir()} == MASK_FILES
    assert set(synced) >= MASK_FILES


@pytest.mark.parametrize("name", sorted(MASK_FILES))
def test_a_mask_without_room_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fail_to_sync(monkeypatch, name)
    with pytest.raises(OSError) as caught:
        write_mask(tmp_path / "mask")
    assert name in caught.value.filename and not (tmp_path / "mask").exists()


def test_hosts_write_parts_of_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS clients write whole pages of a file that they may read too, and of its last page: every write, also of the
    header, is to a file of full size that is open for writing only."""
    written = files.FolderFiles(tmp_path / "model", {"a": [Entry("x", "F32", (3,)), Entry("y", "U8", (4,))]}, {})
    descriptors: list[tuple[int, int]] = []  # access mode, size of the file
    pwrite = os.pwrite

    def look(descriptor: int, data: bytes, position: int) -> int:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        descriptors.append((mode, os.fstat(descriptor).st_size))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", look)
    written.start()
    written.write_tensors("a", {"x": torch.ones(3)})
    written.write(lambda name: [(1, b"123")] if name == "y" else [])
    size = (tmp_path / "model/a").stat().st_size
    assert descriptors == [(os.O_WRONLY, size)] * 3
    stored = load_file(tmp_path / "model/a")
    assert stored["x"].tolist() == [1, 1, 1] and stored["y"].tolist() == [0, *b"123"]


def model() -> SimpleNamespace:
    """What an export asks of a model, without any weight."""
    module = SimpleNamespace(config=LlamaConfig(), generation_config=GenerationConfig(), _auto_class=None)
    return SimpleNamespace(
        module=module, layouts=(), shards=(), parameters=(), by_name={}, buffers=dict, release=lambda: None
    )


def test_all_of_an_exported_model_is_on_disk(tmp_path: Path, synced: list[str]) -> None:
    export_model(model(), tmp_path / "model", byte_bpe_tokenizer(), "card")
    written = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= written <= set(synced)


def test_an_export_has_the_other_files_of_its_base(tmp_path: Path) -> None:
    """An image processor's, a licence; not the base's weights in any format, its card, or what is in its folders."""
    base = tmp_path / "base"
    for name in ("preprocessor_config.json", "LICENSE", "checkpoint-9/trainer_state.json", "config.json"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text('{"model_type": "llama"}')
        (base / name).chmod(0o444)
    others = ("model.safetensors", "model-q4.gguf", ".git/lfs/objects/a", ".cache/huggingface/b", "README.md")
    for name in others:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("the base's")
    base.chmod(0o555)
    export_model(model(), tmp_path / "model", byte_bpe_tokenizer(), "card", base)
    written = {str(file.relative_to(tmp_path / "model")) for file in (tmp_path / "model").rglob("*") if file.is_file()}
    assert {"preprocessor_config.json", "LICENSE"} <= written
    assert written.isdisjoint({*others, "checkpoint-9/trainer_state.json"} - {"README.md"})
    assert (tmp_path / "model/README.md").read_text() == "card"
    assert json.loads((tmp_path / "model/config.json").read_text())["hidden_size"] == LlamaConfig().hidden_size
    for file in (tmp_path / "model", tmp_path / "model/LICENSE"):
        assert file.stat().st_mode & 0o200, file
    base.chmod(0o755)


def test_an_export_without_room_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", fail)
    with pytest.raises(OSError) as caught:
        export_model(model(), tmp_path / "model", byte_bpe_tokenizer(), "card")
    assert caught.value.filename == str(tmp_path / ".model.tmp")


@pytest.mark.parametrize("direction", ["create", "apply"])
def test_a_patch_without_room_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    for number, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((4,), float(number))}, tmp_path / name / "model.safetensors")
    base, tuned, folder, out = (tmp_path / name for name in ("base", "tuned", "patch", "out"))
    if direction == "apply":
        patch.create(base, tuned, folder)

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError) as caught:
        patch.create(base, tuned, folder) if direction == "create" else patch.apply(base, folder, out)
    temporary = ".patch.tmp" if direction == "create" else ".out.tmp"
    assert caught.value.filename == str(tmp_path / temporary / "model.safetensors")
