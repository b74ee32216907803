"""Data sets on the Hugging Face hub: asked for by one rank of each host, whose rows the others read from the cache.

``datasets`` asks the hub at every load, and the hub may have moved to another commit in between. A folder of the cache
is of one commit, so that the ranks of a host that read one folder read the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esi_ds.models.hub import once_on_host

if TYPE_CHECKING:
    from datasets import Dataset


def load_once(load: Callable[..., Any], *arguments: Any, split: str | None = None, **options: Any) -> Any:
    """What ``load``, which is ``datasets.load_dataset``, returns: the rows of a split, or without one a DatasetDict.

    Raises whatever ``load`` raises; a rank that has waited for another one in vain raises OSError with its message.
    """
    loaded: list[Any] = []

    def ask() -> str:
        loaded.append(load(*arguments, split=split, **options))
        return _folder(loaded[0])

    asked = json.dumps([arguments, split, options], sort_keys=True, default=repr)
    folder = once_on_host(f"data {asked}", ask, share_failure=True)
    return loaded[0] if loaded else _cached(Path(folder), split)


def _folder(loaded: Any) -> str:
    """The folder of the cache that holds all rows; empty where there is no such folder, and every rank loads them."""
    from datasets import Dataset, DatasetDict

    parts = loaded.values() if isinstance(loaded, DatasetDict) else [loaded]
    if not all(isinstance(part, Dataset) and part.cache_files for part in parts):
        return ""
    folders = {str(Path(file["filename"]).parent) for part in parts for file in part.cache_files}
    return folders.pop() if len(folders) == 1 else ""


def _cached(folder: Path, split: str | None) -> Any:
    """What ``load_once`` returns, from a folder of the cache that another rank has filled."""
    from datasets import Dataset, DatasetDict, DatasetInfo
    from datasets.arrow_reader import ArrowReader

    info = DatasetInfo.from_directory(str(folder))
    splits = info.splits or {}

    def read(wanted: str) -> Dataset:  # as ``datasets`` itself reads its cache
        return Dataset(**ArrowReader(str(folder), info).read(info.dataset_name, wanted, splits.values()))

    return read(split) if split is not None else DatasetDict({name: read(name) for name in splits})
