"""Which checkpoints are quantised, which of them are read, and how their files' tensors make the model's weights.

Read are FP8 with block scales and MXFP4 (``core/quantised.py``). The model's weights then have the names and shapes
that they have in an unquantised checkpoint: masks, scores and exports name those, fingerprints are of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esi_ds.core.quantised import CODES_PER_SCALE, BlockScaled, Microscaled, Weight
from esi_ds.errors import UserError
from esi_ds.models.weights import CONFIG_NAME, REMEDY, checkpoint_tensors
from esi_ds.reading import read_configuration
from esi_ds.tensor_files import StoredTensor

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig

KEY = "quantization_config"
OLDER_KEYS = (KEY, "compression_config")  # the second is older compressed-tensors'
MLX_KEY = "quantization"  # beside ``KEY`` or, in older folders, instead of it
WAY_OUT = "give the unquantised model, or one in FP8 with block scales or in MXFP4, which are dequantised while read"
SCALES_SUFFIX = "_scale_inv"
BLOCKS_SUFFIX, EXPONENTS_SUFFIX = "_blocks", "_scales"
SCALE_DTYPES = ("F32", "BF16", "F16")
# Descriptions of quantised weights that some tools write beside config.json instead of into it.
FOREIGN_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "qmodel.pt": "HQQ",
}
# quant_method → the name that its users know; others are shown as they are.
NAMES = {
    "awq": "AWQ",
    "fbgemm_fp8": "FBGEMM FP8 (a scale a row)",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}
# Endings of what quantised checkpoints hold beside or instead of weights; no model has parameters of these names.
TRACES = (
    SCALES_SUFFIX,
    ".weight_scale",
    ".weight_scale_2",
    ".weight_packed",
    ".qweight",
    ".SCB",
    ".weight.absmax",
    BLOCKS_SUFFIX,
)


@dataclass(frozen=True)
class Quantisation:
    """A format that is read. block: rows and columns that share a scale in FP8; None: MXFP4."""

    block: tuple[int, int] | None

    def __str__(self) -> str:
        return "MXFP4" if self.block is None else "FP8 with a scale for each block of {} × {}".format(*self.block)


def read_quantisation(folder: Path, field: str = "model.path", value: str | None = None) -> Quantisation | None:
    """How the weights of a model's folder are quantised, by its ``config.json``; None if they are not.

    value: what messages show instead of the folder. Raises UserError naming ``field`` for every format that is not
    read.
    """
    shown = value or str(folder)
    for name, tool in FOREIGN_FILES.items():
        if (folder / name).is_file():
            raise UserError(field, shown, f"is quantised by {tool} ({name} says so), which is not read", WAY_OUT)
    if not (folder / CONFIG_NAME).is_file():  # a folder of scores, or one that is being written
        return None
    section = _section(read_configuration(folder / CONFIG_NAME, field, REMEDY))
    if section is None:
        return None
    method = str(section.get("quant_method") or _unnamed_method(section))
    if method == "mxfp4":
        return Quantisation(None)
    if method == "fp8":
        return Quantisation(_block(section, field, shown))
    problem = f"is quantised with {NAMES.get(method, method)}{_variant(section)}, which is not read"
    raise UserError(field, shown, problem, WAY_OUT)


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a configuration, or of the text model in it."""
    for holder in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in (*OLDER_KEYS, MLX_KEY):
            if holder.get(key) and (key != MLX_KEY or _is_mlx(holder[key])):
                section = holder[key]
                return section if isinstance(section, dict) else {"quant_method": str(section)}
    return None


def _is_mlx(section: Any) -> bool:
    return isinstance(section, dict) and {"group_size", "bits"} <= section.keys()


def _unnamed_method(section: Mapping[str, Any]) -> str:
    """The name of a method that a section does not name."""
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return "MLX" if _is_mlx(section) else "an unnamed method"


def _variant(section: Mapping[str, Any]) -> str:
    """What the tool calls the format, e.g. NVFP4 of ModelOpt; empty where it does not say."""
    stated = section.get("quant_algo") or section.get("format") or section.get("quant_type")
    return f" ({stated})" if isinstance(stated, str) else ""


def _block(section: Mapping[str, Any], field: str, shown: str) -> tuple[int, int]:
    """Rows and columns of a block. Raises UserError for FP8 of another kind than DeepSeek-V3's."""
    block = section.get("weight_block_size")
    if block is None:
        problem = "is quantised with FP8 without block scales (no weight_block_size), which is not read"
        raise UserError(field, shown, problem, WAY_OUT)
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        problem = f"has weight_block_size {block!r} in its {KEY}, which is not two positive whole numbers"
        raise UserError(field, shown, problem, REMEDY)
    if section.get("expert_dtype", "fp8") != "fp8":
        problem = f"is quantised with FP8 and experts in {section['expert_dtype']}, which is not read"
        raise UserError(field, shown, problem, WAY_OUT)
    return block[0], block[1]


def plain_configuration(folder: Path, field: str) -> dict[str, Any]:
    """``config.json`` of a folder without what it says of quantisation. Raises UserError."""

    def without(part: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if key not in OLDER_KEYS}
        return {key: without(value) if isinstance(value, dict) else value for key, value in kept.items()}

    return without(read_configuration(folder / CONFIG_NAME, field, REMEDY))


def without_quantisation(config: PretrainedConfig) -> None:
    """Take ``quantization_config`` out of a configuration and its parts: the model is built with plain weights."""
    parts = (getattr(config, name, None) for name in (getattr(config, "sub_configs", None) or {}))
    for part in (config, *parts):
        for key in OLDER_KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)


def model_weights(folder: Path, field: str = "model.path") -> list[Weight]:
    """The weights that a folder's files make, sorted by name; quantised ones have the plain model's names and shapes.

    Raises UserError naming ``field`` where there are no complete weights, where a format is not read, and where codes
    and scales do not belong together.
    """
    quantisation = read_quantisation(folder, field)
    stored = checkpoint_tensors(folder, field)
    if quantisation is None:
        _refuse_traces(stored, folder, field)
        return list(stored)
    by_name = {tensor.name: tensor for tensor in stored}
    try:
        weights = list(_paired(by_name) if quantisation.block is None else _scaled(by_name, quantisation.block))
    except ValueError as error:
        problem = f"says that it is {quantisation}, but {error}"
        raise UserError(field, str(folder), problem, f"copy the model again, or {WAY_OUT}") from error
    return sorted(weights, key=lambda weight: weight.name)


def weight_names(quantisation: Quantisation, names: Iterable[str]) -> set[str]:
    """The names of ``model_weights``, by those of a quantised checkpoint's tensors alone."""
    if quantisation.block is not None:
        return {name for name in names if not name.endswith(SCALES_SUFFIX)}
    return {name.removesuffix(BLOCKS_SUFFIX) for name in names if not name.endswith(EXPONENTS_SUFFIX)}


def _refuse_traces(stored: Sequence[StoredTensor], folder: Path, field: str) -> None:
    """Refuse quantised weights whose configuration does not say so: codes would be taken for weights."""
    for tensor in stored:
        if tensor.name.endswith(TRACES):
            problem = f"holds {tensor.name}, a part of quantised weights, but its {CONFIG_NAME} has no {KEY}"
            raise UserError(field, str(folder), problem, f"copy {CONFIG_NAME} again, or {WAY_OUT}")


def _scaled(stored: Mapping[str, StoredTensor], block: tuple[int, int]) -> Iterator[Weight]:
    """FP8's weights. Raises ValueError."""
    for name, tensor in stored.items():
        if name.endswith(SCALES_SUFFIX):
            if name.removesuffix(SCALES_SUFFIX) not in stored:
                raise ValueError(f"{name} is a scale of a weight that is missing")
            continue
        scales = stored.get(f"{name}{SCALES_SUFFIX}")
        if scales is None:
            if tensor.dtype.startswith("F8") or (tensor.dtype == "I8" and name.endswith(".weight")):
                raise ValueError(f"{name} is stored as {tensor.dtype} without {name}{SCALES_SUFFIX}")
            yield tensor
            continue
        if tensor.dtype != "F8_E4M3" or scales.dtype not in SCALE_DTYPES:
            raise ValueError(f"{name} is stored as {tensor.dtype} with scales in {scales.dtype}")
        if len(tensor.shape) < 2:
            raise ValueError(f"{name} of shape {list(tensor.shape)} is not a matrix")
        weight = BlockScaled(name, tensor, scales, block)
        _check_scales(weight)
        yield weight


def _paired(stored: Mapping[str, StoredTensor]) -> Iterator[Weight]:
    """MXFP4's weights. Raises ValueError."""
    for name, tensor in stored.items():
        if name.endswith(EXPONENTS_SUFFIX):
            if f"{name.removesuffix(EXPONENTS_SUFFIX)}{BLOCKS_SUFFIX}" not in stored:
                raise ValueError(f"{name} are scales of blocks that are missing")
            continue
        if not name.endswith(BLOCKS_SUFFIX):
            yield tensor
            continue
        weight_name = name.removesuffix(BLOCKS_SUFFIX)
        scales = stored.get(f"{weight_name}{EXPONENTS_SUFFIX}")
        if scales is None:
            raise ValueError(f"{name} has no {weight_name}{EXPONENTS_SUFFIX} beside it")
        if tensor.dtype != "U8" or scales.dtype != "U8":
            raise ValueError(f"{name} is stored as {tensor.dtype} with scales in {scales.dtype}")
        if len(tensor.shape) != 4 or tensor.shape[-1] != CODES_PER_SCALE // 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not [experts, rows, groups, 16]")
        weight = Microscaled(weight_name, tensor, scales)
        _check_scales(weight)
        yield weight


def _check_scales(weight: BlockScaled | Microscaled) -> None:
    if weight.scales.shape != weight.scales_shape:
        shapes = f"shape {list(weight.scales.shape)}, not {list(weight.scales_shape)}"
        raise ValueError(f"{weight.scales.name} has {shapes}, which {weight.codes.name} needs")
