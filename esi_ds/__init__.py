"""esi_ds: find the weights a model's safety hangs on, and tune only them or everything but them, under ZeRO-3."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Mask", "__version__"]


def __getattr__(name: str) -> Any:
    """``esi_ds.Mask`` without importing torch for those who only want the version."""
    if name == "Mask":
        from esi_ds.core.mask import Mask

        return Mask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
