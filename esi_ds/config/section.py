"""What every section of the config has in common."""

from __future__ import annotations

import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_TIMEOUT_S = 10**8  # three years; a timer takes no more


class Section(BaseModel):
    """Rejects unknown keys and converts no type silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section types that an annotation holds, in lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_of(argument)]


MAX_SEED = 2**32 - 1  # of numpy, which lm-eval seeds
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


BatchNumber = Annotated[int, Field(ge=1)]


GENERATION_BATCH = (
    "How many prompts a rank answers at a time; auto takes as many as fit into free memory, 64 at most; null means "
    "auto on GPUs and batch_size on CPUs."
)
