"""``python -m esi_ds.patch create|apply|revert|info``: a tuned model as a sparse difference (docs/design.md §7).

A patch folder holds, per changed tensor of the checkpoint, one bit a weight (which ones differ), their new values and
their original values, and ``patch.json``. Applying it to the base gives the tuned weights, reverting the base, bit for
bit; both are checked by sha256. One process; one file in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from esi_ds.artifacts import replace_folder, write_json_atomic
from esi_ds.core.mask import INDEX_NAME, pack_bits, unpack_bits
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import checkpoint_tensors, tensor_digests
from esi_ds.zero.files import save_tensors

if TYPE_CHECKING:  # transformers takes seconds to import, and is needed for check_names only
    from transformers import PretrainedConfig

    from esi_ds.models.folder import ModelSource

FORMAT = "esi-patch/1"
SUMMARY = "patch.json"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """The same bits as integers: −0.0 and 0.0 differ, NaN equals itself."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def files_of(folder: Path, field: str) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it."""
    found = {name: file for name, file, *_ in checkpoint_tensors(folder)} if folder.is_dir() else {}
    if not found:
        raise UserError(field, str(folder), "holds no safetensors weights", "give a Hugging Face folder")
    return found


def read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def check_names(source: ModelSource, config: PretrainedConfig, names: Iterable[str]) -> None:
    """Refuse, before training, a patch that could not be made after it: the base's files name the weights otherwise
    than the exported model's. Loading takes the prefix of a larger model away (Llama-4's ``language_model.``) or adds
    one (to a bare GPT-2), which the export does not undo, as it does all else. Raises UserError.

    config, names: the model's architecture and its own parameters.
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
        return  # a prefix is the same for all


def _stored_names(source: ModelSource) -> set[str]:
    """Names of a checkpoint's tensors. Of a hub model only the index is asked for; none are known where it has none."""
    from transformers.utils import cached_file

    tolerant = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(source.path, INDEX_NAME, revision=source.revision, **tolerant)
    if index is not None:
        return set(json.loads(Path(index).read_text())["weight_map"])
    folder = Path(source.path)
    return {name for name, *_ in checkpoint_tensors(folder)} if folder.is_dir() else set()


def _exported_name(name: str, config: PretrainedConfig, source: ModelSource) -> str:
    """A parameter's name in ``model/``, where all renaming that loading under ZeRO-3 tries is undone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    from esi_ds.models.meta import meta_model

    module = meta_model(config, source)
    module._weight_conversions = get_model_conversion_mapping(module)
    return next(iter(revert_weight_conversion(module, {name: module.get_parameter(name)})))


def create_part(base: Path, tuned: Path, folder: Path, part: int = 0, num_parts: int = 1) -> dict[str, dict]:
    """Write the patch of every ``num_parts``-th file of ``tuned`` from number ``part`` on; a row per tensor of those.

    The base is compared in the tuned model's dtype. ``folder`` must exist.
    """
    base_files, tuned_files = files_of(base, "BASE"), files_of(tuned, "TUNED")
    unknown = sorted(set(tuned_files) - set(base_files))
    if unknown:
        raise UserError("TUNED", str(tuned), f"holds {unknown[0]}, which the base does not", "give its own base")
    rows = {}
    for file in sorted(set(tuned_files.values()))[part::num_parts]:
        content: dict[str, Tensor] = {}
        for name in (name for name, own in tuned_files.items() if own == file):
            new, old = read(file, name), read(base_files[name], name)
            if new.shape != old.shape:
                raise UserError(
                    "TUNED", name, f"has shape {list(new.shape)}, the base {list(old.shape)}", "give its base"
                )
            stored_as = old.dtype
            old = old.to(new.dtype)
            differ = (bits_of(new) != bits_of(old)).flatten()
            rows[name] = {
                "numel": new.numel(),
                "changed": int(differ.sum()),
                "dtype": str(new.dtype).removeprefix("torch."),
                "base_dtype": str(stored_as).removeprefix("torch."),
                "file": file.name,
            }
            if rows[name]["changed"]:
                content[f"{name}.bits"] = pack_bits(differ)
                content[f"{name}.new"] = new.flatten()[differ]
                content[f"{name}.old"] = old.flatten()[differ]
        save_tensors(content, folder / file.name, metadata={"format": FORMAT})
    return rows


def finish(
    base: Path, folder: Path, rows: dict[str, dict], base_digests: dict, tuned_digests: dict, facts: dict
) -> None:
    """``patch.json``: what changed, and the sha256 of every tensor before and after."""
    for name, row in rows.items():
        row |= {"base_sha256": base_digests[name], "tuned_sha256": tuned_digests[name]}
    write_json_atomic(
        folder / SUMMARY,
        {
            "format": FORMAT,
            "base": str(base),
            "numel": sum(row["numel"] for row in rows.values()),
            "changed": sum(row["changed"] for row in rows.values()),
            **facts,
            "tensors": dict(sorted(rows.items())),
        },
    )


def create(base: Path, tuned: Path, folder: Path) -> dict:
    """The patch of a tuned model, made in one process; its summary."""
    _refuse_existing(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rows = create_part(base, tuned, temporary)
    finish(base, temporary, rows, tensor_digests(base), tensor_digests(tuned), {})
    replace_folder(temporary, folder)
    return summary(folder)


def summary(folder: Path) -> dict:
    """``patch.json`` of a patch folder."""
    file = folder / SUMMARY
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            "PATCH", str(folder), f"holds no readable {SUMMARY}", "give the patch/ folder of a run"
        ) from error
    if found.get("format") != FORMAT:
        raise UserError("PATCH", str(folder), f"has format {found.get('format')!r}", f"{FORMAT} is read")
    return found


def apply(base: Path, patch: Path, out: Path) -> None:
    """Base + patch → the tuned model in ``out``."""

    def to_tuned(tensor: Tensor, row: dict, opened: safe_open | None, name: str) -> Tensor:
        return _replaced(tensor.to(getattr(torch, row["dtype"])), opened, name, "new")

    _transform(base, patch, out, "base_sha256", "tuned_sha256", to_tuned)


def revert(tuned: Path, patch: Path, out: Path) -> None:
    """Tuned model − patch → the base in ``out``. Raises UserError where the base was stored in a finer dtype."""
    for name, row in summary(patch)["tensors"].items():
        stored, used = getattr(torch, row["base_dtype"]), getattr(torch, row["dtype"])
        if torch.promote_types(stored, used) != used:
            raise UserError(
                "PATCH",
                name,
                f"the base stored it in {row['base_dtype']}, which {row['dtype']} cannot bring back",
                "keep the base model",
            )

    def to_base(tensor: Tensor, row: dict, opened: safe_open | None, name: str) -> Tensor:
        return _replaced(tensor, opened, name, "old").to(getattr(torch, row["base_dtype"]))

    _transform(tuned, patch, out, "tuned_sha256", "base_sha256", to_base)


def _replaced(tensor: Tensor, opened: safe_open | None, name: str, which: str) -> Tensor:
    """The tensor with its changed weights' new or old values."""
    if opened is None:
        return tensor
    flat = tensor.flatten().clone()
    flat[unpack_bits(opened.get_tensor(f"{name}.bits"), flat.numel())] = opened.get_tensor(f"{name}.{which}")
    return flat.view(tensor.shape)


def _transform(source: Path, patch: Path, out: Path, before: str, after: str, change: Callable) -> None:
    """Every file of ``source`` with its tensors changed; checked before and after; moved to its name when whole."""
    rows = summary(patch)["tensors"]
    _refuse_existing(out)
    where = files_of(source, "MODEL")
    digests = tensor_digests(source)
    for name, row in rows.items():
        if digests.get(name) != row[before]:
            problem = "is not in this model" if name not in digests else "has other weights here than the patch is for"
            raise UserError("MODEL", str(source), f"{name} {problem}", "give the model that the patch belongs to")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(set(where.values())):
        made = {}
        for name in (name for name, own in where.items() if own == file):
            tensor = read(file, name)
            if name in rows:  # a tied tensor that only one of the two stores is left as it is
                row = rows[name]
                tensor = _changed(tensor, row, patch, name, change)
            made[name] = tensor
        save_tensors(made, temporary / file.name, metadata={"format": "pt"})
    digests = tensor_digests(temporary)
    wrong = [name for name, row in rows.items() if digests[name] != row[after]]
    if wrong:
        shutil.rmtree(temporary)
        raise UserError("PATCH", str(patch), f"does not give {wrong[0]} back: it is damaged", "make the patch again")
    replace_folder(temporary, out)


def _changed(tensor: Tensor, row: dict, patch: Path, name: str, change: Callable) -> Tensor:
    if not row["changed"]:
        return change(tensor, row, None, name)
    with safe_open(patch / row["file"], "pt") as opened:
        return change(tensor, row, opened, name)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError("OUT", str(folder), "exists already", "give a new folder")


def info(patch: Path) -> list[str]:
    """What a patch is, and which tensors it changes most."""
    found = summary(patch)
    facts = {key: value for key, value in found.items() if not isinstance(value, dict)}
    lines = [f"{key:18} {value:,}" if isinstance(value, int) else f"{key:18} {value}" for key, value in facts.items()]
    changed = sorted(found["tensors"].items(), key=lambda item: -item[1]["changed"])
    lines += ["", f"{'changed':>12}{'of':>9}  tensor"]
    lines += [f"{row['changed']:>12,}{row['changed'] / row['numel']:>9.3%}  {name}" for name, row in changed[:20]]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esi_ds.patch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, arguments, help_text in (
        ("create", ("base", "tuned", "patch"), "the difference of two model folders"),
        ("apply", ("base", "patch", "out"), "base and patch to the tuned model"),
        ("revert", ("tuned", "patch", "out"), "tuned model and patch back to the base"),
        ("info", ("patch",), "what a patch changes"),
    ):
        made = commands.add_parser(command, help=help_text)
        for argument in arguments:
            made.add_argument(argument, type=Path)
    arguments = parser.parse_args(argv)
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
