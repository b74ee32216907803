"""Checkpoints in FP8 with block scales and in MXFP4: their weights are transformers' own; others are refused."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from quantised_models import (
    build_gpt_oss,
    fp8_of,
    mxfp4_of,
    plain_of_fp8,
    plain_of_mxfp4,
    write_dequantised,
    write_fp8,
    write_mxfp4,
)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from esi_ds.config import validate
from esi_ds.core import quantised
from esi_ds.core.quantised import BlockScaled, Microscaled, fill_weights, whole_weight
from esi_ds.core.stored import MODEL_DTYPES, StoredReader
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource, check_weights, dequantised, load_model_config
from esi_ds.models.meta import meta_parameters
from esi_ds.models.quantised import model_weights, read_quantisation, weight_names
from esi_ds.models.roles import describe
from esi_ds.models.weights import checkpoint_tensors
from esi_ds.options import Options
from esi_ds.patch import main as patch_main
from esi_ds.patch import summary
from esi_ds.stages.plan.stages import print_plan
from esi_ds.tensor_files import StoredTensor, read_header
from esi_ds.zero.engine import load_replicated


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    save_file(tensors, folder / "a.safetensors")
    return {tensor.name: tensor for tensor in read_header(folder / "a.safetensors", "model.path", "remedy")[0]}


def assert_ranges(weight: BlockScaled | Microscaled, expected: torch.Tensor) -> None:
    """Every range that a rank of three, or of more ranks than rows, would read."""
    with StoredReader() as reader:
        assert torch.equal(bits(whole_weight(reader, weight, expected.dtype)), bits(expected))
        flat, numel = expected.flatten(), expected.numel()
        for ranks in (2, 3, 7, numel + 1):
            size = -(-numel // ranks)
            for low in range(0, numel, size * max(1, ranks // 8)):
                values = torch.empty(min(size, numel - low), dtype=expected.dtype)
                fill_weights(reader, values, weight, low)
                assert torch.equal(bits(values), bits(flat[low : low + size])), (ranks, low)
        fill_weights(reader, torch.empty(0), weight, numel)  # an empty shard


@pytest.mark.parametrize("dtype", MODEL_DTYPES.values())
@pytest.mark.parametrize("shape", [(128, 256), (130, 257), (5, 3), (2, 129, 130), (576, 100)])
def test_fp8_is_dequantised_in_blocks_whose_last_are_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(quantised, "CHUNK", 1000)
    block = (128, 128)
    codes, scales = fp8_of(torch.randn(shape, generator=torch.Generator().manual_seed(0)), block)
    tensors = stored(tmp_path, {"w": codes, "w_scale_inv": scales})
    expected = plain_of_fp8(codes, scales, block).to(dtype)
    theirs = _dequantize_fp8_weight(codes, scales, list(block), torch.float32).to(dtype)
    assert torch.equal(bits(expected), bits(theirs))
    assert_ranges(BlockScaled("w", tensors["w"], tensors["w_scale_inv"], block), expected)


@pytest.mark.parametrize("dtype", MODEL_DTYPES.values())
def test_mxfp4_is_dequantised_by_expert(tmp_path: Path, dtype: torch.dtype) -> None:
    """All codes and all scales: from 2⁻¹²⁷, which is subnormal, to 2¹²⁷."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 6, 15, 16), generator=generator, dtype=torch.uint8)
    scales = torch.arange(270).remainder(255).view(3, 6, 15).to(torch.uint8)
    tensors = stored(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    expected = plain_of_mxfp4(blocks, scales).to(dtype)
    assert torch.equal(bits(expected), bits(convert_moe_packed_tensors(blocks, scales, dtype=dtype)))
    weight = Microscaled("w", tensors["w_blocks"], tensors["w_scales"])
    assert weight.shape == expected.shape
    assert_ranges(weight, expected)


def test_a_scale_that_is_not_a_number(tmp_path: Path) -> None:
    blocks, scales = mxfp4_of(torch.randn(2, 32, 4))
    scales[1, 0, 0] = 255
    tensors = stored(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    weight = Microscaled("w", tensors["w_blocks"], tensors["w_scales"])
    with StoredReader() as reader:
        fill_weights(reader, torch.empty(128), weight)  # the first expert alone
        with pytest.raises(ValueError, match=r"w_scales holds a scale that is not a number \(expert 1\)"):
            whole_weight(reader, weight, torch.bfloat16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised models; those with blocks of 8 × 8 have sizes that transformers divides into blocks as we do."""
    folder, tokenizer = tmp_path_factory.mktemp("quantised"), byte_bpe_tokenizer()
    for kind in ("qwen3_moe", "llama"):
        build_model(kind, folder / kind, tokenizer)
    write_fp8(folder / "qwen3_moe", folder / "even", (4, 8))
    write_fp8(folder / "llama", folder / "uneven", (16, 16), split=True)
    write_mxfp4(build_gpt_oss(folder / "gpt_oss", tokenizer), folder / "mxfp4")
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["even", "mxfp4"])
def test_a_replicated_model_has_the_weights_that_transformers_dequantises(models: Path, kind: str, dtype: str) -> None:
    source = ModelSource(str(models / kind))
    check_weights(source)
    module = load_replicated(source, dtype)
    section = FineGrainedFP8Config(dequantize=True) if kind == "even" else Mxfp4Config(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(
        models / kind, dtype=MODEL_DTYPES[dtype], quantization_config=section, device_map="cpu"
    )
    named = dict(expected.named_parameters())
    assert set(named) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        theirs = named[name].detach().to(MODEL_DTYPES[dtype])  # they leave what is not quantised as it is stored
        assert parameter.dtype == MODEL_DTYPES[dtype] and torch.equal(bits(parameter.detach()), bits(theirs)), name
    assert getattr(module.config, "quantization_config", None) is None
    assert meta_parameters(load_model_config(source), source, dtype=dtype) == describe(module)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_blocks_that_transformers_would_divide_otherwise(models: Path, tmp_path: Path, dtype: str) -> None:
    """A matrix of 24 columns in blocks of 16 has 2 scales a row of blocks: transformers takes blocks of 12."""
    module = load_replicated(ModelSource(str(models / "uneven")), dtype)
    folder = write_dequantised(models / "uneven", tmp_path / "plain", MODEL_DTYPES[dtype])
    plain = load_replicated(ModelSource(str(folder)), dtype)
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in plain.named_parameters()}
    for (name, one), (_, two) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(bits(one), bits(two)), name
    theirs = AutoModelForCausalLM.from_pretrained(models / "uneven", dtype=MODEL_DTYPES[dtype], device_map="cpu")
    differ = [name for name, one in module.named_parameters() if not torch.equal(one, theirs.get_parameter(name))]
    assert differ and all(name.endswith("_proj.weight") for name in differ)


def test_the_fingerprint_is_of_the_files(models: Path) -> None:
    digests = tensor_digests(models / "even")
    assert set(digests) == set(load_file(models / "even/model.safetensors"))
    assert any(name.endswith("_scale_inv") for name in digests)


SECTIONS: dict[str, tuple[dict, str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "AWQ": ({"quant_method": "awq"}, "AWQ"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "older bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "HQQ": ({"quant_method": "hqq"}, "HQQ"),
    "NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"ModelOpt \(NVFP4\)"),
    "MXFP8": ({"quant_method": "mxfp8"}, "MXFP8"),
    "FP8 without blocks": ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8 without block scales"),
    "FP8 of a null": ({"quant_method": "fp8", "weight_block_size": None}, "FP8 without block scales"),
    "FP4 experts": ({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}, "experts in fp4"),
    "an odd block": ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
    "MLX": ({"group_size": 64, "bits": 4}, "MLX"),
    "a tool of tomorrow": ({"quant_method": "fp3"}, "fp3"),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_other_formats_are_refused_by_name(models: Path, tmp_path: Path, name: str) -> None:
    section, named = SECTIONS[name]
    folder = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    stated = {"quantization_config": section}
    for content in (config | stated, config | {"text_config": stated}):
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=named) as caught:
            check_weights(ModelSource(str(folder), field="judge.path"))
        assert caught.value.field == "judge.path"
    (folder / "config.json").write_text(json.dumps(config | stated))
    with pytest.raises(UserError, match=named):
        load_model_config(ModelSource(str(folder)))


@pytest.mark.parametrize(
    ("file", "named"), [("hf_quant_config.json", "ModelOpt"), ("quantize_config.json", "GPTQ"), ("qmodel.pt", "HQQ")]
)
def test_formats_that_another_file_names(models: Path, tmp_path: Path, file: str, named: str) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    (folder / file).write_text("{}")
    with pytest.raises(UserError, match=f"quantised by {named}"):
        load_model_config(ModelSource(str(folder)))


def test_older_folders_of_mlx(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    with pytest.raises(UserError, match="is quantised with MLX, which is not read"):
        load_model_config(ModelSource(str(folder)))
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {}}))
    load_model_config(ModelSource(str(folder)))


def test_gguf(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(UserError, match="holds GGUF files, which are not read"):
        check_weights(ModelSource(str(folder)))
    with pytest.raises(UserError, match="is a GGUF file, which is not read"):
        load_model_config(ModelSource(str(folder / "model-Q4_K_M.gguf")))


def test_plans_and_runs_say_what_is_dequantised(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And count the bytes of plain weights."""
    sources = [ModelSource(str(models / kind), field=f"{kind}.path") for kind in ("gpt_oss", "mxfp4", "even")]
    assert dequantised(sources) == [
        f"mxfp4.path = {models / 'mxfp4'}: weights dequantised from MXFP4",
        f"even.path = {models / 'even'}: weights dequantised from FP8 with a scale for each block of 4 × 8",
    ]
    plans = {}
    for kind in ("gpt_oss", "mxfp4"):
        content = {
            "run": {"output_dir": "unused"},
            "model": {"path": str(models / kind), "dtype": "bf16"},
            "data": {"prompts": {"path": "unused.jsonl"}},
            "select": {"criterion": "magnitude", "ratio": 0.01},
        }
        print_plan(validate(content), Options())
        plans[kind] = capsys.readouterr().out.replace(str(models / kind), "model").splitlines()
    notes = [line for line in plans["mxfp4"] if line not in plans["gpt_oss"]]
    assert notes == ["NOTE: model.path = model: weights dequantised from MXFP4"]


def changed(source: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a model with other tensors; None removes one."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


QUERY = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
DAMAGES: dict[str, tuple[str, dict[str, torch.Tensor | None], str]] = {
    "no scale": ("even", {f"{QUERY}_scale_inv": None}, f"{QUERY} is stored as F8_E4M3 without {QUERY}_scale_inv"),
    "no codes": ("even", {QUERY: None}, f"{QUERY}_scale_inv is a scale of a weight that is missing"),
    "scales of other blocks": ("even", {f"{QUERY}_scale_inv": torch.ones(1, 1)}, r"has shape \[1, 1\], not \[6, 3\]"),
    "FP4 codes": ("even", {QUERY: torch.zeros(24, 12, dtype=torch.int8)}, f"{QUERY} is stored as I8 with scales"),
    "E5M2": ("even", {QUERY: torch.zeros(24, 24).to(torch.float8_e5m2)}, f"{QUERY} is stored as F8_E5M2"),
    "no exponents": ("mxfp4", {f"{EXPERTS}_scales": None}, f"{EXPERTS}_blocks has no {EXPERTS}_scales"),
    "no blocks": ("mxfp4", {f"{EXPERTS}_blocks": None}, f"{EXPERTS}_scales are scales of blocks that are missing"),
    "other groups": ("mxfp4", {f"{EXPERTS}_blocks": torch.zeros(5, 64, 2, 8, dtype=torch.uint8)}, "has shape"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_codes_and_scales_that_do_not_belong_together(models: Path, tmp_path: Path, name: str) -> None:
    kind, change, problem = DAMAGES[name]
    with pytest.raises(UserError, match=problem):
        check_weights(ModelSource(str(changed(models / kind, tmp_path / "model", change))))


@pytest.mark.parametrize("kind", ["even", "mxfp4"])
def test_quantised_weights_whose_config_does_not_say_so(models: Path, tmp_path: Path, kind: str) -> None:
    """The codes would be taken for weights."""
    folder = Path(shutil.copytree(models / kind, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a part of quantised weights, but its config.json has no quantization_config"):
        check_weights(ModelSource(str(folder)))


def test_the_names_are_those_of_the_plain_model(models: Path) -> None:
    for kind, plain in (("even", "qwen3_moe"), ("uneven", "llama"), ("mxfp4", "gpt_oss")):
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(models / plain / "model.safetensors").items()}
        assert {weight.name: weight.shape for weight in model_weights(models / kind)} == shapes
        form = read_quantisation(models / kind)
        names = [tensor.name for tensor in checkpoint_tensors(models / kind)]  # all that an index on the hub says
        assert form is not None and weight_names(form, names) == set(shapes)


def tuned_from(model: Path, folder: Path, dtype: str) -> Path:
    """A model with a few other weights than the dequantised one, among them quantised ones, saved as exports are."""
    module = load_replicated(ModelSource(str(model)), dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "layers.1." in name and parameter.ndim > 1:
                parameter.view(-1)[3:5] += 1
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["even", "uneven", "mxfp4"])
def test_a_patch_is_against_the_dequantised_weights(models: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    base = models / kind
    tuned = tuned_from(base, tmp_path / "tuned", dtype)
    assert patch_main(["create", str(base), str(tuned), str(tmp_path / "patch")]) == 0
    content = summary(tmp_path / "patch")
    assert content["dequantised_from"].startswith("MXFP4" if kind == "mxfp4" else "FP8")
    changed = {name: row["changed"] for name, row in content["tensors"].items() if row["changed"]}
    assert changed and set(changed.values()) == {2} and all("layers.1." in name for name in changed)
    plain = write_dequantised(base, tmp_path / "plain", MODEL_DTYPES[dtype])
    for number, source in enumerate((base, plain)):  # the quantised folder, and the dequantised one
        out = tmp_path / f"again{number}"
        assert patch_main(["apply", str(source), str(tmp_path / "patch"), str(out)]) == 0
        assert tensor_digests(out) == tensor_digests(tuned)
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert AutoModelForCausalLM.from_pretrained(out) is not None
    assert patch_main(["revert", str(tuned), str(tmp_path / "patch"), str(tmp_path / "back")]) == 0
    assert tensor_digests(tmp_path / "back") == tensor_digests(plain)


def test_patches_of_other_quantised_models_are_refused(models: Path, tmp_path: Path, capsys) -> None:
    tuned = tuned_from(models / "even", tmp_path / "tuned", "bf16")
    assert patch_main(["create", str(models / "even"), str(tuned), str(tmp_path / "patch")]) == 0
    scales = load_file(models / "even/model.safetensors")[f"{QUERY}_scale_inv"]
    other = changed(models / "even", tmp_path / "other", {f"{QUERY}_scale_inv": scales * 2})
    assert patch_main(["apply", str(other), str(tmp_path / "patch"), str(tmp_path / "out")]) == 2
    assert f"{QUERY} has other weights" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert patch_main(["create", str(tuned), str(models / "even"), str(tmp_path / "turned")]) == 2
    assert "its weights are rounded" in capsys.readouterr().err and not (tmp_path / "turned").exists()


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were made inside the block and lived at one time. others: made before it."""

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in others}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known and storage.nbytes():
                    self._known.add(storage.data_ptr())
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        return result

    def _free(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.live -= num_bytes


def test_a_weight_is_dequantised_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its values: of FP8 the scales and a chunk, of MXFP4 one of the 64 experts."""
    monkeypatch.setattr(quantised, "CHUNK", 1 << 14)
    codes = torch.ones(1024, 1024).to(torch.float8_e4m3fn)
    blocks, scales = torch.zeros(64, 64, 8, 16, dtype=torch.uint8), torch.full((64, 64, 8), 127, dtype=torch.uint8)
    content = {"w": codes, "w_scale_inv": torch.ones(8, 8), "m_blocks": blocks, "m_scales": scales}
    tensors = stored(tmp_path, content)
    for weight in (
        BlockScaled("w", tensors["w"], tensors["w_scale_inv"], (128, 128)),
        Microscaled("m", tensors["m_blocks"], tensors["m_scales"]),
    ):
        values = torch.empty(1 << 20, dtype=torch.bfloat16)
        with LiveBytes(values) as memory, StoredReader() as reader:
            fill_weights(reader, values, weight)
        assert 1 << 14 < memory.peak < 24 << 14, weight.name  # 64 KiB of float32 at a time, and what they are made of


@pytest.mark.parametrize("kind", ["uneven", "mxfp4"])
def test_a_replicated_model_is_never_there_twice(models: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(quantised, "CHUNK", 256)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread alone
    with LiveBytes() as memory:
        module = load_replicated(ModelSource(str(models / kind)), "bf16")
    held = sum(parameter.nbytes for parameter in module.parameters())
    largest = max(parameter.nbytes for parameter in module.parameters())
    assert held <= memory.peak < held + 2 * largest + 8192 < 2 * held
