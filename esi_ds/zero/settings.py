"""DeepSpeed's own check of its config, before anything is loaded with it: its errors name the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from esi_ds.core.footprint import CPU_PREFETCH
from esi_ds.errors import UserError
from esi_ds.reading import first_line

BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
REMEDY = "correct it, or remove it; see DeepSpeed's documentation"
# DeepSpeed's names of the number of weights that it gathers ahead in one collective.
PREFETCH, PREFETCH_NAMES = "stage3_prefetch_bucket_size", ("stage3_prefetch_bucket_size", "prefetch_bucket_size")


def with_prefetch(settings: dict[str, Any], device_type: str) -> dict[str, Any]:
    """A resolved mapping whose prefetch bucket suits the device, where the mapping names none. No collectives.

    A collective's buffer is a new one every time. glibc takes buffers above 32 MiB from the system and gives them back
    at once, and the system zeroes every page again in every step (docs/zero3.md §13); smaller ones come from the
    process's own heap: ``CPU_PREFETCH`` takes 8 MB in fp32. GPUs keep DeepSpeed's default: PyTorch keeps their memory.
    """
    zero = settings["zero_optimization"]
    if device_type != "cpu" or any(name in zero for name in PREFETCH_NAMES):
        return settings
    return {**settings, "zero_optimization": {**zero, PREFETCH: CPU_PREFETCH}}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError where DeepSpeed does not take a resolved mapping. Every rank says the same; no collectives."""
    if (whole := _refusal(settings)) is None:
        return
    common = {key: settings[key] for key in BATCH if key in settings} | {"zero_optimization": {"stage": 3}}
    for name, value in settings.items():
        error = _refusal({**common, name: value})
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, ("deepspeed", name, *first["loc"])))
            problem = "is an unknown key" if first["type"] == "extra_forbidden" else _lower(first["msg"])
            raise UserError(key, first["input"], problem, REMEDY) from error
        if error is not None:
            raise refused(f"deepspeed.{name}", value, error) from error
    raise refused("deepspeed", None, whole) from whole


def _refusal(settings: Mapping[str, Any]) -> Exception | None:
    """The error that DeepSpeed raises for a mapping; it raises every kind of them."""
    try:
        DeepSpeedConfig(deepcopy(dict(settings)))
    except Exception as error:
        return error
    return None


def refused(field: str, value: object, error: Exception) -> UserError:
    """What to raise where DeepSpeed raised ``error`` for a value of its config."""
    return UserError(field, value, f"is refused by DeepSpeed ({first_line(error)})", REMEDY)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
