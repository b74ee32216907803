"""Ranges of stored tensors, and a whole model that is read onto a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from esi_ds.core import stored
from esi_ds.core.stored import DTYPES, StoredReader
from esi_ds.models.folder import ModelSource
from esi_ds.tensor_files import StoredTensor, read_header
from esi_ds.zero import runtime
from esi_ds.zero.engine import load_replicated
from esi_ds.zero.loading import read_module


def saved(folder: Path, values: torch.Tensor) -> StoredTensor:
    save_file({"before": torch.zeros(3), "values": values}, folder / "a.safetensors")
    tensors, _ = read_header(folder / "a.safetensors", "model.path", "remedy")
    return next(tensor for tensor in tensors if tensor.name == "values")


@pytest.mark.parametrize("name", DTYPES)
def test_a_range_is_read_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(stored, "BLOCK", 3)
    values = (torch.arange(24).view(4, 6) % 2 + 1).to(DTYPES[name])
    tensor = saved(tmp_path, values)
    assert (tensor.dtype, tensor.shape) == (name, (4, 6))
    target = torch.zeros(8, dtype=values.dtype)
    with StoredReader() as reader:
        reader.fill(target, tensor, 5)
        assert reader.num_bytes == 8 * values.element_size()
        assert torch.equal(reader.whole(tensor).view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(target.view(torch.uint8), values.flatten()[5:13].view(torch.uint8))


@pytest.mark.parametrize(("stored_dtype", "dtype"), [("F32", torch.bfloat16), ("F16", torch.float32)])
def test_values_are_rounded_as_torch_does(tmp_path: Path, stored_dtype: str, dtype: torch.dtype) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(DTYPES[stored_dtype])
    target = torch.zeros(20, dtype=dtype)
    with StoredReader() as reader:
        reader.fill(target, saved(tmp_path, values), 10)
    assert torch.equal(target, values[10:30].to(dtype))


def test_an_empty_range_reads_nothing(tmp_path: Path) -> None:
    with StoredReader() as reader:
        reader.fill(torch.zeros(0), saved(tmp_path, torch.ones(4)), 4)
        assert reader.num_bytes == 0


def test_a_file_that_was_cut_since(tmp_path: Path) -> None:
    tensor = saved(tmp_path, torch.ones(4))
    data = tensor.file.read_bytes()
    tensor.file.write_bytes(data[:-1])
    with StoredReader() as reader, pytest.raises(ValueError, match="shorter than its header says"):
        reader.whole(tensor)


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    tensor = saved(tmp_path, torch.ones(4))._replace(description="F4 [4]")
    with StoredReader() as reader, pytest.raises(ValueError, match="is of dtype F4"):
        reader.whole(tensor)


def test_a_replicated_model_is_read_onto_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: not one weight may be left on the host."""
    source = ModelSource(str(build_model("llama", tmp_path / "model", byte_bpe_tokenizer())))
    module = read_module(source, "bf16", AutoModelForCausalLM, device=torch.device("meta"))
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}
    devices: list[str] = []
    plain = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments: object, **options: object) -> object:
        devices.append(str(options["device_map"]))
        return plain(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    loaded = load_replicated(source, "bf16")
    assert devices == [str({"": runtime.device()})]
    expected = plain(source.path, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    named = dict(expected.named_parameters()) | dict(expected.named_buffers())
    for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert torch.equal(tensor, named[name]), name
