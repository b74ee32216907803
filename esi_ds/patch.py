"""``esi-ds patch create|apply|revert|info``: a tuned model as a sparse difference (docs/design.md §7).

A patch folder holds ``patch.json`` and, for every changed tensor of the checkpoint, one bit per weight (whether it
differs) and the new and the original values of those that differ. Applying it to the base gives the tuned model,
reverting it the base, bit for bit, unless that is stored in a finer dtype; both are checked by sha256. One process;
one file in memory at a time.

For a quantised base (FP8 with block scales, MXFP4) the patch is against the dequantised weights in the tuned model's
dtype. It is applied to the quantised folder or to the dequantised one; reverting gives the dequantised base.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from esi_ds.artifacts import check_new_folder, whole_folder, write_json_atomic
from esi_ds.core.adamw import as_integers
from esi_ds.core.mask import INDEX_NAME, pack_bits, unpack_bits
from esi_ds.core.quantised import Weight, file_of, fill_weights, whole_weight
from esi_ds.core.stored import DTYPES, StoredReader
from esi_ds.errors import UserError, ends_with_message
from esi_ds.models.beside_weights import check_same_configuration, copy_beside_weights, name_dtype
from esi_ds.models.chat_templates import FILE_NAME, chat_templates, of_tokenizer, write_chat_templates
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.quantised import model_weights, read_quantisation, weight_names
from esi_ds.models.weights import INDEX_SUFFIX, checkpoint_tensors, weights_name
from esi_ds.reading import (
    check_regular,
    check_type,
    is_bare_name,
    parse_json,
    read_index,
    read_text,
    reading,
    share_of,
)
from esi_ds.tensor_files import StoredTensor
from esi_ds.terminal import clean_output, help_text
from esi_ds.zero.files import raw_bytes, save_tensors

if TYPE_CHECKING:  # transformers takes seconds to import, and little here needs it
    from transformers import PretrainedConfig, PreTrainedModel

    from esi_ds.models.folder import ModelSource

FORMAT = "esi-patch/1"
SUMMARY = "patch.json"
ORIGIN = "give the model it was tuned from"
START = 64  # first values of a tensor by which most pairs are told apart
FOLDERS = {  # argument of the command → what it names
    "base": "folder of the base model",
    "tuned": "folder of the tuned model",
    "patch": "folder of the patch",
    "out": "new folder to write",
}
# Keys of a tensor's two digests, and names of its values in the patch.
Digest = Literal["base_sha256", "tuned_sha256"]
Values = Literal["old", "new"]


class TensorChange(TypedDict):
    """How a tensor of the checkpoint changed."""

    numel: int  # number of weights
    changed: int  # number of weights that differ
    dtype: str  # of the tuned tensor, in which both are compared
    base_dtype: str  # in which the base stores it
    file: str  # file of the patch that holds the bits and values, if any changed


class PatchedTensor(TensorChange):
    """An entry of ``tensors`` in ``patch.json``."""

    base_sha256: str
    tuned_sha256: str


class BaseOnlyTensor(TypedDict):
    """A tensor that the base stores and the tuned model does not."""

    sha256: str
    # A tensor that both store and that has the same values: the other name of a tied weight, which the tuned model
    # stores once. None: nothing that the model loads.
    twin: str | None


class TemplateChange(TypedDict):
    """The chat templates of both models, file's name → text."""

    old: dict[str, str]
    new: dict[str, str]


class PatchSummary(TypedDict):
    """``patch.json``; a stage may add facts about its run."""

    format: str  # ``FORMAT``
    base: str  # folder or hub id of the base
    numel: int  # number of weights
    changed: int  # number of weights that differ
    tensors: dict[str, PatchedTensor]  # by name; all that the tuned model stores
    left_out: NotRequired[dict[str, BaseOnlyTensor]]  # by name; all else that the base stores
    chat_templates: NotRequired[TemplateChange]  # where the tuned model's differ from the base's
    dequantised_from: NotRequired[str]  # format of the base's files, whose values here are the dequantised ones


# (tensor, its entry, the patch's file or None if nothing changed, its name) → the changed tensor.
Change = Callable[[Tensor, PatchedTensor, "safe_open | None", str], Tensor]


def weights_of(folder: Path, field: str) -> dict[str, Weight]:
    """The weights of a model's folder by name. Raises UserError, naming ``field``, if there are none."""
    return {weight.name: weight for weight in model_weights(folder, field)}


def read(weight: Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One whole weight as it is stored; a quantised one in ``dtype``."""
    if isinstance(weight, StoredTensor):
        with safe_open(weight.file, "pt") as opened:
            return opened.get_tensor(weight.name)
    with StoredReader() as reader:
        return whole_weight(reader, weight, dtype)


def check_names(source: ModelSource, config: PretrainedConfig) -> None:
    """Raise UserError, before training, if the exported model will hold a name that the base's files do not, so that no
    patch could be made.

    Loading removes the prefix of a larger model (Llama-4's ``language_model.``) or adds one (to a bare GPT-2), and
    finds a tied weight under its other name; unlike all other renaming, the export does not undo this. config: the
    model's.
    """
    from esi_ds.models.meta import meta_model

    if not (stored := _stored_names(source)):
        return
    module = meta_model(config, source)
    unknown = sorted(set(_stored_as(module, _exported_tensors(module), stored)) - stored)
    if unknown:
        other = _other_name(unknown[0], module.all_tied_weights_keys, stored)
        fate = "does not hold" if other is None else f"calls {other}"
        problem = f"no patch can be made: the tuned model will hold {unknown[0]}, which {source.path} {fate}"
        raise UserError("tune.patch", True, problem, "set tune.patch: false; model/ holds the whole tuned model")


def _other_name(name: str, ties: Mapping[str, str], stored: Collection[str]) -> str | None:
    """What a checkpoint calls a tensor that it does not hold under this name: its tied twin, or the name with a prefix
    more or less. ties: name → name of the weight it is tied to."""
    twins = [other for pair in ties.items() for one, other in (pair, pair[::-1]) if one == name]
    shorter, longer = name.partition(".")[2], [other for other in stored if other.partition(".")[2] == name]
    return next((other for other in (*twins, shorter, *sorted(longer)) if other in stored), None)


def _stored_names(source: ModelSource) -> set[str]:
    """Names of a checkpoint's tensors. For a hub model only the index is fetched; without an index none are known."""
    from esi_ds.models.folder import stored_weights

    if (stored := stored_weights(source)) or Path(source.path).is_dir():
        return {weight.name for weight in stored}
    with reading(source.field, source.path, ORIGIN):
        index = source.folder() / INDEX_NAME
    names = set(read_index(index, source.field, ORIGIN)) if index.is_file() else set()
    quantisation = read_quantisation(source.folder(), source.field, source.path)
    return names if quantisation is None else weight_names(quantisation, names)


def _exported_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """What ``model/`` will hold of a model, by the model's names: a tied weight once, and its persistent buffers."""
    state = module.state_dict()
    return dict(module.named_parameters()) | {name: b for name, b in module.named_buffers() if name in state}


def _stored_as(module: PreTrainedModel, tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A model's tensors under the names, and in the shapes, that a checkpoint has; names: of all that it stores."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    from esi_ds.models.conversions import keep_used, loaded_names

    conversions = get_model_conversion_mapping(module)
    for _ in loaded_names(module, conversions, names, module.state_dict()):
        pass  # marks the conversions that are used
    keep_used(module, conversions)
    stored: dict[str, Tensor] = revert_weight_conversion(module, tensors)
    return stored


def create_part(base: Path, tuned: Path, folder: Path, part: int = 0, num_parts: int = 1) -> dict[str, TensorChange]:
    """Write the patch of every ``num_parts``-th file of ``tuned`` from number ``part`` on; the changes by tensor.

    The base is compared in the tuned model's dtype. ``folder`` must exist.
    """
    base_weights, tuned_weights = weights_of(base, "BASE"), weights_of(tuned, "TUNED")
    tuned_files = {name: file_of(weight) for name, weight in tuned_weights.items()}
    unknown = sorted(set(tuned_files) - set(base_weights))
    if unknown:
        raise UserError("TUNED", str(tuned), f"holds {unknown[0]}, which the base does not", ORIGIN)
    changes: dict[str, TensorChange] = {}
    for file in sorted(set(tuned_files.values()))[part::num_parts]:
        content: dict[str, Tensor] = {}
        for name in (name for name, holder in tuned_files.items() if holder == file):
            new = read(tuned_weights[name])
            old = read(base_weights[name], new.dtype)
            if new.shape != old.shape:
                raise UserError("TUNED", name, f"has shape {list(new.shape)}, the base {list(old.shape)}", ORIGIN)
            base_dtype = old.dtype
            old = old.to(new.dtype)
            differ = (as_integers(new.contiguous()) != as_integers(old.contiguous())).flatten()
            changes[name] = {
                "numel": new.numel(),
                "changed": int(differ.sum()),
                "dtype": str(new.dtype).removeprefix("torch."),
                "base_dtype": str(base_dtype).removeprefix("torch."),
                "file": file.name,
            }
            if changes[name]["changed"]:
                content[f"{name}.bits"] = pack_bits(differ)
                content[f"{name}.new"] = new.flatten()[differ]
                content[f"{name}.old"] = old.flatten()[differ]
        save_tensors(content, folder / file.name, metadata={"format": FORMAT})
    return changes


def finish(
    base: Path,
    folder: Path,
    changes: Mapping[str, TensorChange],
    base_digests: Mapping[str, str],
    tuned_digests: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """Write ``patch.json``. base_digests: of ``weight_digests``. tuned_digests: sha256 of every tensor. facts: what the
    stage adds."""
    tensors: dict[str, PatchedTensor] = {
        name: {**changes[name], "base_sha256": base_digests[name], "tuned_sha256": tuned_digests[name]}
        for name in sorted(changes)
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "base": str(base),
        "numel": sum(tensor["numel"] for tensor in tensors.values()),
        "changed": sum(tensor["changed"] for tensor in tensors.values()),
        **facts,
        "tensors": tensors,
    }
    if (quantisation := read_quantisation(base, "BASE")) is not None:
        content["dequantised_from"] = str(quantisation)
    if left_out := _left_out(base, tensors, base_digests):
        content["left_out"] = left_out
    write_json_atomic(folder / SUMMARY, content)


def _left_out(
    base: Path, rows: Mapping[str, PatchedTensor], base_digests: Mapping[str, str]
) -> dict[str, BaseOnlyTensor]:
    """The base's tensors that the tuned model does not store, each with its twin among those that it stores.

    Compared in the tuned model's dtype, in which transformers decides whether two weights are tied.
    """
    left_out: dict[str, BaseOnlyTensor] = {
        name: {"sha256": base_digests[name], "twin": None} for name in sorted(base_digests.keys() - rows.keys())
    }
    if not left_out:
        return left_out
    weights = weights_of(base, "BASE")
    dtypes = {name: dtype_of(row["dtype"]) for name, row in rows.items()}
    starts: dict[tuple[torch.dtype, tuple[int, ...], bytes], list[str]] = {}
    for name, dtype in dtypes.items():
        starts.setdefault((dtype, *_start(weights[name], dtype)), []).append(name)
    for name, entry in left_out.items():
        for dtype in set(dtypes.values()):
            candidates = starts.get((dtype, *_start(weights[name], dtype)), [])
            for twin in candidates:
                if torch.equal(read(weights[name], dtype).to(dtype), read(weights[twin], dtype).to(dtype)):
                    entry["twin"] = twin
    return left_out


def _start(weight: Weight, dtype: torch.dtype) -> tuple[tuple[int, ...], bytes]:
    """A weight's shape and first values, by which most pairs are told apart without reading them whole."""
    if isinstance(weight, StoredTensor):
        with safe_open(weight.file, "pt") as opened:
            values = opened.get_slice(weight.name)[:1] if weight.shape else opened.get_tensor(weight.name)
        first = values.to(dtype).flatten()[:START].clone()
    else:
        first = torch.empty(min(START, math.prod(weight.shape[1:])), dtype=dtype)
        with StoredReader() as reader:
            fill_weights(reader, first, weight)
    first[first == 0] = 0  # −0.0 equals 0.0, as it does for transformers
    return weight.shape, bytes(raw_bytes(first))


def template_change(base: Path, tuned: Path) -> dict[str, TemplateChange]:
    """The fact ``chat_templates`` of a summary; none where both tokenizers have the same, or one folder has none."""
    old, new = chat_templates(base), chat_templates(tuned)
    if of_tokenizer(old) == of_tokenizer(new) or not all(any(folder.glob("tokenizer*")) for folder in (base, tuned)):
        return {}
    return {"chat_templates": {"old": old, "new": new}}


def weight_digests(
    folder: Path, dtypes: Mapping[str, torch.dtype], part: int = 0, num_parts: int = 1, field: str = "MODEL"
) -> dict[str, str]:
    """``tensor_digests`` of a model's weights; for quantised ones, those that they have in a plain safetensors file.

    dtypes: by name, the dtype in which a quantised weight is dequantised; bf16 where none is given. Raises UserError.
    """
    if read_quantisation(folder, field) is None:
        return tensor_digests(folder, part, num_parts, field)
    names = {dtype: name for name, dtype in DTYPES.items()}
    digests = {}
    weights = weights_of(folder, field)
    for name in share_of({name: math.prod(weight.shape) for name, weight in weights.items()}, part, num_parts):
        values = read(weights[name], dtypes.get(name, torch.bfloat16))
        digest = hashlib.sha256(f"{names[values.dtype]} {list(values.shape)}".encode())
        digest.update(raw_bytes(values))
        digests[name] = digest.hexdigest()
    return digests


def base_digests(base: Path, tuned: Path, part: int = 0, num_parts: int = 1) -> dict[str, str]:
    """``weight_digests`` of a base in the dtypes of the model that was tuned from it."""
    stored = checkpoint_tensors(tuned, "TUNED")
    dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in stored if tensor.dtype in DTYPES}
    return weight_digests(base, dtypes, part, num_parts, "BASE")


def create(base: Path, tuned: Path, folder: Path) -> PatchSummary:
    """The patch of a tuned model, made in one process; its summary."""
    check_new_folder("PATCH", folder)
    if (quantisation := read_quantisation(tuned, "TUNED")) is not None:
        raise UserError("TUNED", str(tuned), f"is {quantisation}: its weights are rounded", "give model/ of a run")
    check_same_configuration(base, tuned)
    with whole_folder(folder) as temporary:
        changes = create_part(base, tuned, temporary)
        digests = base_digests(base, tuned), tensor_digests(tuned, field="TUNED")
        finish(base, temporary, changes, *digests, template_change(base, tuned))
        left_out = summary(temporary).get("left_out", {})
        lost = {name for name, entry in left_out.items() if entry["twin"] is None} & _loaded_names(base)
        if lost:
            problem = f"does not hold {min(lost)}, which the base model loads"
            remedy = "give the whole tuned model, with its weights tied as the base's are"
            raise UserError("TUNED", str(tuned), problem, remedy)
    return summary(folder)


def _loaded_names(base: Path) -> set[str]:
    """Names of the tensors that transformers loads from a folder as a causal language model; none if it is not one."""
    from esi_ds.models.folder import ModelSource, load_model_config
    from esi_ds.models.meta import meta_model

    source = ModelSource(str(base), field="BASE")
    try:
        module = meta_model(load_model_config(source), source)
    except UserError:
        return set()
    return set(_stored_as(module, module.state_dict(), weights_of(base, "BASE")))


def summary(folder: Path) -> PatchSummary:
    """``patch.json`` of a patch folder. Raises UserError where it is missing, torn, foreign or incomplete."""
    file, remedy = folder / SUMMARY, "give the patch/ folder of a run"
    with reading("PATCH", folder, remedy, f"holds no readable {SUMMARY}"):
        content = check_type(parse_json(read_text(file)), dict[str, Any])
        if content.get("format") != FORMAT:
            problem = f"has format {content.get('format')!r}, not {FORMAT}"
            raise UserError("PATCH", str(folder), problem, "make the patch again with this version")
        check_type(content, PatchSummary)
        return _checked(cast(PatchSummary, content))


def _checked(content: PatchSummary) -> PatchSummary:
    """The summary itself. Raises ValueError where it lacks tensors or contradicts itself."""
    rows = content["tensors"]
    if not rows:
        raise ValueError("it names no tensors")
    for key in ("numel", "changed"):
        if content[key] != (total := sum(row[key] for row in rows.values())):
            raise ValueError(f"{key} is {content[key]:,}, but that of its tensors is {total:,}: tensors are missing")
    for name, row in rows.items():
        if not 0 <= row["changed"] <= row["numel"]:
            raise ValueError(f"{name} has {row['changed']:,} changed of {row['numel']:,} weights")
        for dtype in (row["dtype"], row["base_dtype"]):
            dtype_of(dtype)
        if not is_bare_name(row["file"]):
            raise ValueError(f"{name} is in {row['file']!r}, which is not the name of a file beside {SUMMARY}")
    for name, entry in content.get("left_out", {}).items():
        if name in rows or (entry["twin"] is not None and entry["twin"] not in rows):
            raise ValueError(f"left_out.{name} contradicts its tensors")
    templates = content.get("chat_templates")
    for name in (*templates["old"], *templates["new"]) if templates is not None else ():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"chat_templates names {name!r}, which is not the file of a chat template")
    return content


def dtype_of(name: str) -> torch.dtype:
    """The dtype that torch gives a name. Raises ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def apply(base: Path, patch: Path, out: Path) -> None:
    """Base + patch → the tuned model in ``out``. Raises UserError if the patch is not for this base."""

    def to_tuned(tensor: Tensor, entry: PatchedTensor, stored: safe_open | None, name: str) -> Tensor:
        return _replaced(tensor.to(dtype_of(entry["dtype"])), stored, name, "new")

    _transform(base, patch, out, "base_sha256", "tuned_sha256", to_tuned)


def revert(tuned: Path, patch: Path, out: Path) -> None:
    """Tuned model − patch → the base in ``out``.

    Raises UserError if the patch is not for this tuned model, or the base was stored in a finer dtype.
    """
    for name, entry in summary(patch)["tensors"].items():
        stored, used = dtype_of(entry["base_dtype"]), dtype_of(entry["dtype"])
        if torch.promote_types(stored, used) != used:
            raise UserError(
                "PATCH",
                name,
                f"was stored in {entry['base_dtype']} by the base, which {entry['dtype']} cannot restore",
                "keep the base model",
            )

    def to_base(tensor: Tensor, entry: PatchedTensor, stored: safe_open | None, name: str) -> Tensor:
        return _replaced(tensor, stored, name, "old").to(dtype_of(entry["base_dtype"]))

    _transform(tuned, patch, out, "tuned_sha256", "base_sha256", to_base)


def _replaced(tensor: Tensor, stored: safe_open | None, name: str, values: Values) -> Tensor:
    """The tensor with its changed weights' new or old values. stored: the patch's file; None if nothing changed."""
    if stored is None:
        return tensor
    flat = tensor.flatten().clone()
    flat[unpack_bits(stored.get_tensor(f"{name}.bits"), flat.numel())] = stored.get_tensor(f"{name}.{values}")
    return flat.view(tensor.shape)


def _transform(source: Path, patch: Path, out: Path, before: Digest, after: Digest, change: Change) -> None:
    """Write ``source`` with its tensors changed to ``out``, completely or not at all; check it before and after."""
    content = summary(patch)
    entries, twins = content["tensors"], _twins(content)
    check_new_folder("OUT", out)
    if source.resolve() in out.resolve().parents:
        raise UserError("OUT", str(out), "lies in the model's folder, which is copied", "give a folder beside it")
    weights = weights_of(source, "MODEL")
    files = {name: file_of(weight) for name, weight in weights.items()}
    dtypes = {name: dtype_of(entry["base_dtype"]) for name, entry in entries.items()}
    _check_source(source, content, before, dtypes)
    with whole_folder(out) as temporary:
        copy_beside_weights(source, temporary, "MODEL")
        if (templates := content.get("chat_templates")) is not None:
            write_chat_templates(temporary, templates["new" if after == "tuned_sha256" else "old"])
        written: dict[str, str] = {}  # tensor → file
        sizes = Counter[torch.dtype]()  # weights of each dtype
        for file in sorted(set(files.values())):
            tensors: dict[str, Tensor] = {}
            for name in (name for name, holder in files.items() if holder == file and name not in twins):
                tensors[name] = read(weights[name], dtypes.get(name, torch.bfloat16))
                if name in entries:
                    tensors[name] = _changed(tensors[name], entries[name], patch, name, change)
            if after == "base_sha256":
                tensors |= {name: tensors[twin].clone() for name, twin in twins.items() if twin in tensors}
            save_tensors(tensors, temporary / file.name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, file.name)
            for tensor in tensors.values():
                sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
        if (name := weights_name(source, "MODEL")).endswith(INDEX_SUFFIX):
            write_json_atomic(temporary / name, {"metadata": {}, "weight_map": dict(sorted(written.items()))})
        name_dtype(temporary, sizes.most_common(1)[0][0], "MODEL")
        _check_result(temporary, patch, content, after)


def _twins(content: PatchSummary) -> dict[str, str]:
    """Tensors that only the base stores → the tensor of the same values that the tuned model stores."""
    left_out = content.get("left_out", {})
    return {name: entry["twin"] for name, entry in left_out.items() if entry["twin"] is not None}


def _check_source(source: Path, content: PatchSummary, before: Digest, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise UserError unless every tensor of the model is known to the patch and has the bits that it is for.

    dtypes: in which quantised ones are dequantised.
    """
    digests = weight_digests(source, dtypes)
    expected = {name: entry[before] for name, entry in content["tensors"].items()}
    left_out = {name: entry["sha256"] for name, entry in content.get("left_out", {}).items()}
    if before == "base_sha256":
        expected |= left_out
    else:
        for name in left_out.keys() - _twins(content).keys() - digests.keys():
            problem = f"does not hold {name}, which the base holds beside the weights that are loaded"
            raise UserError("TUNED", str(source), problem, "give a folder that apply made, or keep the base model")
        expected |= {name: left_out[name] for name in left_out.keys() & digests.keys()}
    for name in sorted(expected.keys() | digests.keys()):
        if digests.get(name) != expected.get(name):
            problem = (
                "is not in this model"
                if name not in digests
                else "is not in the patch"
                if name not in expected
                else "has other weights than those the patch is for"
            )
            raise UserError("MODEL", str(source), f"{name} {problem}", "give the model that the patch belongs to")


def _check_result(folder: Path, patch: Path, content: PatchSummary, after: Digest) -> None:
    """Raise UserError unless the folder holds exactly the tensors that it should, to the bit."""
    digests = tensor_digests(folder, field="PATCH")
    expected = {name: entry[after] for name, entry in content["tensors"].items()}
    twins = _twins(content)
    for name, entry in content.get("left_out", {}).items():
        if name not in twins or after == "base_sha256":
            expected[name] = entry["sha256"]
    wrong = sorted(name for name in expected.keys() | digests.keys() if digests.get(name) != expected.get(name))
    if wrong:
        raise UserError("PATCH", str(patch), f"does not restore {wrong[0]}: it is damaged", "make the patch again")


def _changed(tensor: Tensor, entry: PatchedTensor, patch: Path, name: str, change: Change) -> Tensor:
    if not entry["changed"]:
        return change(tensor, entry, None, name)
    file = patch / entry["file"]
    with reading("PATCH", file, f"make the patch again: {name} cannot be restored"):
        check_regular(file)
        with safe_open(file, "pt") as stored:
            return change(tensor, entry, stored, name)


def info(patch: Path) -> list[str]:
    """Lines about a patch and the tensors it changes most."""
    content = summary(patch)
    facts = {key: value for key, value in content.items() if not isinstance(value, dict)}
    lines = [f"{key:18} {value:,}" if isinstance(value, int) else f"{key:18} {value}" for key, value in facts.items()]
    lines += ["chat template      changed, too"] if "chat_templates" in content else []
    changed = sorted(content["tensors"].items(), key=lambda item: -item[1]["changed"])
    lines += ["", f"{'changed':>12}{'of':>9}  tensor"]
    lines += [
        f"{entry['changed']:>12,}{entry['changed'] / entry['numel']:>9.3%}  {name}" for name, entry in changed[:20]
    ]
    return lines


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="esi-ds patch", description=help_text(__doc__))
    commands = parser.add_subparsers(dest="command", required=True)
    for command, folders, purpose in (
        ("create", ("base", "tuned", "patch"), "write the difference of two model folders"),
        ("apply", ("base", "patch", "out"), "make the tuned model from base and patch"),
        ("revert", ("tuned", "patch", "out"), "make the base model from tuned model and patch"),
        ("info", ("patch",), "show what a patch changes"),
    ):
        command_parser = commands.add_parser(command, help=purpose)
        for folder in folders:
            command_parser.add_argument(folder, type=Path, metavar=folder.upper(), help=FOLDERS[folder])
    return parser


@clean_output()
@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    arguments = make_parser().parse_args(argv)
    if arguments.command == "create":
        create(arguments.base, arguments.tuned, arguments.patch)
        print("\n".join(info(arguments.patch)))
    elif arguments.command == "apply":
        apply(arguments.base, arguments.patch, arguments.out)
    elif arguments.command == "revert":
        revert(arguments.tuned, arguments.patch, arguments.out)
    else:
        print("\n".join(info(arguments.patch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
