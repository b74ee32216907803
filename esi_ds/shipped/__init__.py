"""Files that come with the package, found by name: recipes (``configs/``), ``ds_configs/`` and ``slurm/``.

In a checkout they lie at its top, where people read and change them; a wheel holds copies below this package
(``setup.py``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from esi_ds.errors import UserError
from esi_ds.reading import reading

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def folder(name: str) -> Path:
    """``configs``, ``ds_configs`` or ``slurm``: in the wheel if there, else of the checkout."""
    packaged = Path(__file__).resolve().parent / name
    return packaged if packaged.is_dir() else CHECKOUT / name


def recipes() -> dict[str, Path]:
    """Names as ``--config`` takes them, such as ``dense/llama3-8b`` → the YAML."""
    top = folder("configs")
    return {file.relative_to(top).with_suffix("").as_posix(): file for file in sorted(top.rglob("*.yaml"))}


def recipe(name: str, field: str = "--config") -> Path:
    """The recipe of a name, whose folder may be left out where no other recipe has the same last part: ``llama3-8b``,
    ``dense/llama3-8b``, ``configs/dense/llama3-8b.yaml``. field: what the user gave it as; ``NAME`` where
    a file would not do. Raises UserError."""
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    known = recipes()
    matches = [wanted] if wanted in known else [other for other in known if other.rsplit("/", 1)[-1] == wanted]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise UserError(field, name, "is the name of several recipes", f"give one of {', '.join(matches)}")
    near = difflib.get_close_matches(wanted, [*known, *(other.rsplit("/", 1)[-1] for other in known)], n=3)
    nearest = f" (near: {', '.join(near)})" if near else ""
    remedy = f"a name that `esi-ds recipes` lists{nearest}"
    if field == "NAME":
        raise UserError(field, name, "is not the name of a recipe", f"give {remedy}")
    raise UserError(field, name, "is neither a file nor the name of a recipe", f"give a YAML file, or {remedy}")


def own_recipe(name: str) -> Path:
    """``recipe``, for a run. Raises UserError also where the working directory holds a changed copy of the recipe."""
    file = recipe(name)
    known = {other.read_bytes() for other in recipes().values()}  # esi.yaml may be that of another folder's recipe
    for copied in (Path(file.name), Path("configs", file.relative_to(folder("configs")))):
        if copied.is_file() and copied.read_bytes() not in known:
            problem = f"is the name of a recipe, and {copied} here may be a changed copy of it"
            raise UserError("--config", name, problem, f"give --config {copied}, or start elsewhere")
    return file


def deepspeed_file(name: str) -> Path | None:
    """A DeepSpeed config of a name: ``zero3_offload``, ``zero3_offload.json`` or ``ds_configs/zero3_offload.json``."""
    wanted = name.removeprefix("ds_configs/").removesuffix(".json")
    return next((file for file in _files(folder("ds_configs")) if file.name == f"{wanted}.json"), None)


def copy(source: Path, target: Path) -> list[Path]:
    """Copy a file, or what a folder holds, to ``target``, which becomes that file or folder; returns the files written.

    Raises UserError before anything is written if a file of other content is in the way: it may be the user's work.
    """
    pairs = [(source, target)]
    if source.is_dir():
        pairs = [(file, target / file.relative_to(source)) for file in _files(source)]
    for file, copied in pairs:
        if copied.exists() and (not copied.is_file() or copied.read_bytes() != file.read_bytes()):
            problem = f"already holds another {copied.name}, or a changed one"
            raise UserError(
                "DIR", str(copied.parent), problem, "use what is there, move it away, or name another folder"
            )
    with reading("DIR", target, "name a folder that you may write to", "cannot be written"):
        for file, copied in pairs:
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())
            copied.chmod(file.stat().st_mode & 0o777)
    return [copied for _, copied in pairs]


def _files(top: Path) -> Iterator[Path]:
    """The shipped files of a folder; jobs write their logs below it (``slurm/logs/``)."""
    for file in sorted(top.rglob("*")):
        if file.is_file() and "logs" not in file.relative_to(top).parts:
            yield file
