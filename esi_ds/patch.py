"""``python -m esi_ds.patch create|apply|revert|info``: a tuned model as a sparse difference (docs/design.md §7).

A patch folder holds ``patch.json`` and, for every changed tensor of the checkpoint, one bit per weight (whether it
differs) and the new and the original values of those that differ. Applying it to the base gives the tuned model,
reverting it the base, bit for bit; both are checked by sha256. One process; one file in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor

from esi_ds.artifacts import replace_folder, write_json_atomic
from esi_ds.core.mask import INDEX_NAME, pack_bits, unpack_bits
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.weights import checkpoint_tensors
from esi_ds.reading import read_index
from esi_ds.zero.files import save_tensors

if TYPE_CHECKING:  # transformers takes seconds to import, and is needed for check_names only
    from transformers import PretrainedConfig

    from esi_ds.models.folder import ModelSource

FORMAT = "esi-patch/1"
SUMMARY = "patch.json"
ORIGIN = "give the model it was tuned from"
# Keys of a tensor's two digests, and names of its values in the patch.
Digest = Literal["base_sha256", "tuned_sha256"]
Values = Literal["old", "new"]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


class PatchSummary(TypedDict):
    """``patch.json``; a stage may add facts about its run."""

    format: str  # ``FORMAT``
    base: str  # folder or hub id of the base
    numel: int  # number of weights
    changed: int  # number of weights that differ
    tensors: dict[str, PatchedTensor]  # by name


# (tensor, its entry, the patch's file or None if nothing changed, its name) → the changed tensor.
Change = Callable[[Tensor, PatchedTensor, "safe_open | None", str], Tensor]


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: −0.0 and 0.0 differ, NaN equals itself."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def files_of(folder: Path, field: str) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it. Raises UserError, naming ``field``, if there is none."""
    files = {tensor.name: tensor.file for tensor in checkpoint_tensors(folder)} if folder.is_dir() else {}
    if not files:
        raise UserError(field, str(folder), "holds no safetensors weights", "give a Hugging Face folder")
    return files


def read(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def check_names(source: ModelSource, config: PretrainedConfig, names: Iterable[str]) -> None:
    """Raise UserError, before training, if the base's files and the exported model's will name the weights differently,
    so that no patch could be made.

    Loading removes the prefix of a larger model (Llama-4's ``language_model.``) or adds one (to a bare GPT-2); unlike
    all other renaming, the export does not undo this. config, names: the model's architecture and its parameters.
    """
    stored = _stored_names(source)
    without_first = {name.partition(".")[2]: name for name in stored}
    for name in names:
        shorter = name.partition(".")[2]
        other = without_first.get(name) or (shorter if shorter in stored else None)
        if name in stored or other is None:
            continue
        if _exported_name(name, config, source) not in stored:
            problem = f"no patch can be made: the tuned model will hold {name}, which {source.path} calls {other}"
            raise UserError("tune.patch", True, problem, "set tune.patch: false; model/ holds the whole tuned model")
        return  # the prefix is the same for all names


def _stored_names(source: ModelSource) -> set[str]:
    """Names of a checkpoint's tensors. Of a hub model only the index is fetched; without an index none are known."""
    from transformers.utils import cached_file

    from esi_ds.models.folder import stored_tensors

    if (stored := stored_tensors(source)) or Path(source.path).is_dir():
        return {tensor.name for tensor in stored}
    tolerant = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(source.path, INDEX_NAME, revision=source.revision, **tolerant)
    return set(read_index(Path(index), source.field, ORIGIN)) if index is not None else set()


def _exported_name(name: str, config: PretrainedConfig, source: ModelSource) -> str:
    """A parameter's name in ``model/``: the export undoes all renaming that loading under ZeRO-3 may do."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    from esi_ds.models.meta import meta_model

    module = meta_model(config, source)
    # nn.Module declares every attribute a tensor or a module; this one is neither, hence the ignore.
    module._weight_conversions = get_model_conversion_mapping(module)  # type: ignore[assignment]
    return next(iter(revert_weight_conversion(module, {name: module.get_parameter(name)})))


def create_part(base: Path, tuned: Path, folder: Path, part: int = 0, num_parts: int = 1) -> dict[str, TensorChange]:
    """Write the patch of every ``num_parts``-th file of ``tuned`` from number ``part`` on; the changes by tensor.

    The base is compared in the tuned model's dtype. ``folder`` must exist.
    """
    base_files, tuned_files = files_of(base, "BASE"), files_of(tuned, "TUNED")
    unknown = sorted(set(tuned_files) - set(base_files))
    if unknown:
        raise UserError("TUNED", str(tuned), f"holds {unknown[0]}, which the base does not", ORIGIN)
    changes: dict[str, TensorChange] = {}
    for file in sorted(set(tuned_files.values()))[part::num_parts]:
        content: dict[str, Tensor] = {}
        for name in (name for name, holder in tuned_files.items() if holder == file):
            new, old = read(file, name), read(base_files[name], name)
            if new.shape != old.shape:
                raise UserError("TUNED", name, f"has shape {list(new.shape)}, the base {list(old.shape)}", ORIGIN)
            base_dtype = old.dtype
            old = old.to(new.dtype)
            differ = (bits_of(new) != bits_of(old)).flatten()
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
    """Write ``patch.json``. base_digests, tuned_digests: sha256 of every tensor. facts: what the stage adds."""
    tensors: dict[str, PatchedTensor] = {
        name: {**changes[name], "base_sha256": base_digests[name], "tuned_sha256": tuned_digests[name]}
        for name in sorted(changes)
    }
    content = {
        "format": FORMAT,
        "base": str(base),
        "numel": sum(tensor["numel"] for tensor in tensors.values()),
        "changed": sum(tensor["changed"] for tensor in tensors.values()),
        **facts,
        "tensors": tensors,
    }
    write_json_atomic(folder / SUMMARY, content)


def create(base: Path, tuned: Path, folder: Path) -> PatchSummary:
    """The patch of a tuned model, made in one process; its summary."""
    _refuse_existing(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    changes = create_part(base, tuned, temporary)
    finish(base, temporary, changes, tensor_digests(base), tensor_digests(tuned), {})
    replace_folder(temporary, folder)
    return summary(folder)


def summary(folder: Path) -> PatchSummary:
    """``patch.json`` of a patch folder. Raises UserError if it is missing or of another format."""
    file = folder / SUMMARY
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        problem = f"holds no readable {SUMMARY}"
        raise UserError("PATCH", str(folder), problem, "give the patch/ folder of a run") from error
    if content.get("format") != FORMAT:
        problem = f"has format {content.get('format')!r}, not {FORMAT}"
        raise UserError("PATCH", str(folder), problem, "make the patch again with this version")
    return content


def apply(base: Path, patch: Path, out: Path) -> None:
    """Base + patch → the tuned model in ``out``. Raises UserError if the patch is not for this base."""

    def to_tuned(tensor: Tensor, entry: PatchedTensor, stored: safe_open | None, name: str) -> Tensor:
        return _replaced(tensor.to(getattr(torch, entry["dtype"])), stored, name, "new")

    _transform(base, patch, out, "base_sha256", "tuned_sha256", to_tuned)


def revert(tuned: Path, patch: Path, out: Path) -> None:
    """Tuned model − patch → the base in ``out``.

    Raises UserError if the patch is not for this tuned model, or the base was stored in a finer dtype.
    """
    for name, entry in summary(patch)["tensors"].items():
        stored, used = getattr(torch, entry["base_dtype"]), getattr(torch, entry["dtype"])
        if torch.promote_types(stored, used) != used:
            raise UserError(
                "PATCH",
                name,
                f"was stored in {entry['base_dtype']} by the base, which {entry['dtype']} cannot restore",
                "keep the base model",
            )

    def to_base(tensor: Tensor, entry: PatchedTensor, stored: safe_open | None, name: str) -> Tensor:
        return _replaced(tensor, stored, name, "old").to(getattr(torch, entry["base_dtype"]))

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
    entries = summary(patch)["tensors"]
    _refuse_existing(out)
    files = files_of(source, "MODEL")
    digests = tensor_digests(source)
    for name, entry in entries.items():
        if digests.get(name) != entry[before]:
            problem = "is not in this model" if name not in digests else "has other weights than those the patch is for"
            raise UserError("MODEL", str(source), f"{name} {problem}", "give the model that the patch belongs to")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(set(files.values())):
        tensors = {}
        for name in (name for name, holder in files.items() if holder == file):
            tensors[name] = read(file, name)
            if name in entries:  # of two tied tensors the tuned model may store only one: the other stays
                tensors[name] = _changed(tensors[name], entries[name], patch, name, change)
        save_tensors(tensors, temporary / file.name, metadata={"format": "pt"})
    digests = tensor_digests(temporary)
    wrong = [name for name, entry in entries.items() if digests[name] != entry[after]]
    if wrong:
        shutil.rmtree(temporary)
        raise UserError("PATCH", str(patch), f"does not restore {wrong[0]}: it is damaged", "make the patch again")
    replace_folder(temporary, out)


def _changed(tensor: Tensor, entry: PatchedTensor, patch: Path, name: str, change: Change) -> Tensor:
    if not entry["changed"]:
        return change(tensor, entry, None, name)
    with safe_open(patch / entry["file"], "pt") as stored:
        return change(tensor, entry, stored, name)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError("OUT", str(folder), "exists already", "give a new folder")


def info(patch: Path) -> list[str]:
    """Lines about a patch and the tensors it changes most."""
    content = summary(patch)
    facts = {key: value for key, value in content.items() if not isinstance(value, dict)}
    lines = [f"{key:18} {value:,}" if isinstance(value, int) else f"{key:18} {value}" for key, value in facts.items()]
    changed = sorted(content["tensors"].items(), key=lambda item: -item[1]["changed"])
    lines += ["", f"{'changed':>12}{'of':>9}  tensor"]
    lines += [
        f"{entry['changed']:>12,}{entry['changed'] / entry['numel']:>9.3%}  {name}" for name, entry in changed[:20]
    ]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m esi_ds.patch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, folders, help_text in (
        ("create", ("base", "tuned", "patch"), "the difference of two model folders"),
        ("apply", ("base", "patch", "out"), "from base and patch to the tuned model"),
        ("revert", ("tuned", "patch", "out"), "from tuned model and patch back to the base"),
        ("info", ("patch",), "what a patch changes"),
    ):
        command_parser = commands.add_parser(command, help=help_text)
        for folder in folders:
            command_parser.add_argument(folder, type=Path)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "create":
            create(arguments.base, arguments.tuned, arguments.patch)
            print("\n".join(info(arguments.patch)))
        elif arguments.command == "apply":
            apply(arguments.base, arguments.patch, arguments.out)
        elif arguments.command == "revert":
            revert(arguments.tuned, arguments.patch, arguments.out)
        else:
            print("\n".join(info(arguments.patch)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
