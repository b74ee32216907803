"""Readers of patches: a damaged folder is refused with nothing left behind, or gives what the sound one gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_folder, fuzz, outcome, replace
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from esi_ds import patch
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import tensor_digests


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/ and the patch/ between them, of two files each."""
    folder = tmp_path_factory.mktemp("patch")
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        tensors = {f"{name}.{number}": torch.randn(4, 5, generator=generator) for name in "ab"}
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        for model in ("base", "tuned"):
            (folder / model).mkdir(exist_ok=True)
            save_file(tensors, folder / model / file, metadata={"format": "pt"})
            tensors = {**tensors, f"a.{number}": tensors[f"a.{number}"].clone().fill_diagonal_(1.5)}
    for model in ("base", "tuned"):
        weight_map = {name: file.name for file in sorted((folder / model).iterdir()) for name in load_file(file)}
        (folder / model / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
        (folder / model / "config.json").write_text("{}")
    patch.create(folder / "base", folder / "tuned", folder / "patch")
    return folder


@fuzz(150)
@given(data=st.data())
def test_patches(models: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Base + patch is the tuned model, tuned − patch the base, or nothing is left behind."""
    words, damage = data.draw(damaged_folder(models / "patch"))
    folder = replace(tmp_path_factory.getbasetemp() / "patch", models / "patch")
    out = folder.with_name("out")
    damage(folder)
    for change, source, expected in ((patch.apply, "base", "tuned"), (patch.revert, "tuned", "base")):

        def read(folder: Path, change: Any = change, source: str = source) -> dict[str, str]:
            change(models / source, folder, out)
            return tensor_digests(out)

        try:
            result = outcome(lambda read=read: read(folder))
            assert isinstance(result, UserError) or result == tensor_digests(models / expected), words
        finally:
            left = sorted(path.name for path in folder.parent.glob(".*out*"))
            shutil.rmtree(out, ignore_errors=True)
        assert not left, words
    outcome(lambda: patch.info(folder))
