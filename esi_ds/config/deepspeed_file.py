"""A DeepSpeed config that the YAML, or ``--deepspeed_config``, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esi_ds import shipped
from esi_ds.config.checks import check_numbers
from esi_ds.errors import UserError
from esi_ds.reading import parse_json, read_text, reading

MAX_BYTES = 1 << 20


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """The mapping in a file, or in the shipped one of that name. Raises UserError."""
    remedy = "give a file, a mapping, or the name of a shipped file: zero3, zero3_offload, ..."
    with reading("deepspeed", name, remedy, "is not the name of a file"):
        path = Path(name)
        user_file = next((file for file in (path, Path(f"{path}.json")) if file.is_file()), None)
        file = user_file or shipped.deepspeed_file(name)
    if file is None:
        raise UserError("deepspeed", name, "there is no such file", remedy)
    with reading("deepspeed", file, "fix it; see ds_configs/zero3.json", "is not valid JSON"):
        settings = parse_json(read_text(file, MAX_BYTES))
    if not isinstance(settings, dict):
        raise UserError("deepspeed", str(file), "is not a mapping", "see ds_configs/zero3.json")
    check_numbers(settings, "deepspeed")
    return settings
