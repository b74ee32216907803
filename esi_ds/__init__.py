"""esi_ds: find the weights a model's safety depends on, and tune only them or everything but them, under ZeRO-3."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Mask", "MaskedAdamW", "__version__", "freeze"]


def __getattr__(name: str) -> Any:
    """Names that need torch, without importing it for those who only want the version."""
    if name == "Mask":
        from esi_ds.core.mask import Mask

        return Mask
    if name == "MaskedAdamW":
        from esi_ds.zero.optimizer import MaskedAdamW

        return MaskedAdamW
    if name == "freeze":
        from esi_ds.zero.freeze import freeze

        return freeze
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
