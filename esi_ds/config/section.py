"""What every section of the config has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_TIMEOUT_S = 10**8  # three years; a timer takes no more


class Section(BaseModel):
    """Rejects unknown keys and converts no type silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


MAX_SEED = 2**32 - 1  # of numpy, which lm-eval seeds
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


BatchNumber = Annotated[int, Field(ge=1)]


GENERATION_BATCH = (
    "How many prompts a rank answers at a time; auto takes as many as fit into free memory, 64 at most; null means "
    "auto on GPUs and batch_size on CPUs."
)
