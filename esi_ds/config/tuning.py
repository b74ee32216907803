"""How models are tuned and perturbed, in the config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from esi_ds.config.data import Rows, RowSource
from esi_ds.config.section import Section, Seed


def benign_among(num_rows: int, fraction: float) -> int:
    """How many of the first ``num_rows`` rows of a tuning are benign, which are ``fraction`` of them, evenly spread."""
    return int(num_rows * fraction)


class BenignMix(Rows):
    fraction: float = Field(
        0.0, ge=0, le=1, description="The share of benign rows in a batch; with 0 they are not read."
    )


class TuneData(RowSource):
    benign: BenignMix | None = Field(None, description="Benign rows that are mixed in to limit over-refusal.")


class Tune(Section):
    mask: str = Field(
        description="The folder of the mask; for SPA, none means that no scored weight is frozen: the baseline."
    )
    data: TuneData = Field(description="The rows that the model learns.")
    max_steps: int = Field(100, ge=1, description="How many optimizer steps to take.")
    lr: float = Field(1e-4, gt=0, description="The peak learning rate.")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="The course of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="The share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="The decoupled weight decay, on all trained weights and no others; on norms and biases too, where "
        "tune.unscored trains them.",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="The decay rates of AdamW's two moments."
    )
    eps: float = Field(1e-8, gt=0, description="The term in AdamW's denominator that avoids division by zero.")
    clip: float | None = Field(
        1.0, gt=0, description="The largest norm of the trained weights' gradient; null means no clipping."
    )
    batch_size: int = Field(4, ge=1, description="How many sequences a rank learns in a micro-batch.")
    gradient_accumulation: int = Field(
        1, ge=1, description="How many micro-batches make a step, which has ranks × batch_size × this many rows."
    )
    max_length: int = Field(1024, ge=2, description="The longest row in tokens; longer rows lose their end.")
    unscored: Literal["freeze", "train"] = Field(
        "freeze",
        description="What happens to embeddings, norms, biases and routers; weights that only process images or sound "
        "are always frozen.",
    )
    router: Literal["freeze", "train"] | None = Field(
        None,
        description="What happens to routers, even where the mask names them; null means as the mask or tune.unscored "
        "says. Their correction biases are always frozen.",
    )
    reduction: Literal["auto", "compact", "scatter"] = Field(
        "auto", description="How SET reduces gradients: once a step (compact), or sharded in the hooks (scatter)."
    )
    save_every: Literal["auto"] | int = Field(
        "auto", description="How many steps lie between two saves; auto follows the time, as esi.save_every does."
    )
    export: bool = Field(True, description="Whether to write the tuned model to model/.")
    patch: bool = Field(True, description="Whether to write the difference to the base model to patch/.")

    def step_rows(self, num_ranks: int) -> int:
        """Rows of one step, over all ranks and micro-batches."""
        return self.batch_size * self.gradient_accumulation * num_ranks


def _list_of_number(entry: Any) -> Any:
    """A single number may be written without a list around it."""
    return [entry] if isinstance(entry, (int, float)) and not isinstance(entry, bool) else entry


class Perturb(Section):
    mask: str = Field(description="The folder of the mask.")
    scores: str | None = Field(
        None, description="The scores that the mask was made from; null means the folder scores/ beside the mask."
    )
    orders: list[Literal["top", "random", "bottom"]] = Field(
        ["top", "random", "bottom"],
        min_length=1,
        description="Which weights get noise; each order gets the same number.",
    )
    noise: Annotated[list[Annotated[float, Field(ge=0)]], BeforeValidator(_list_of_number)] = Field(
        [0.38], min_length=1, description="The noise's standard deviation in units of σ: a number, or several."
    )
    ratios: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="The shares of the weights that get noise; null means as many as the mask holds."
    )
    seeds: Annotated[list[Seed], BeforeValidator(_list_of_number)] = Field(
        [0, 1, 2],
        min_length=1,
        description="The seeds of the noise and of the random weights, one cell each: a number, or several.",
    )
