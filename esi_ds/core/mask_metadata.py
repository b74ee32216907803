"""What a mask and its scores say of themselves (docs/design.md §7): strings in the files, typed and bounded here.

``problems`` names every number that contradicts another one; whether the bits agree is ``core.mask``'s to check.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from esi_ds.reading import check_type, parse_json

FORMAT = "esi-mask/1"
SCORES_FORMAT = "esi-scores/1"
ORDERS = ("top", "bottom", "random")
BASES = ("all", "scored")
SCOPES = ("model", "matrix")
NORMALISATIONS = ("none", "matrix")
LARGEST = (1 << 62) - 1  # positions and counts are int64
INTEGER = re.compile(r"0|[1-9][0-9]{0,18}")

Value = TypeVar("Value")


@dataclass(frozen=True)
class MaskMetadata:
    """The metadata of a mask's files. of, scope, seed and offsets may be absent in masks from other tools, normalise
    wherever scores are as their criterion defines them.

    criterion: one of ours, or what another tool calls its own. shapes, counts: by parameter: shape, and number of
    selected weights. The shapes are in the model's order, which is that of the offsets where the files have some.
    offsets: number of weights of the model before each parameter; None if the files do not say. threshold: the score of
    the last selected weight; None where no single score is the limit.
    """

    k: int
    ratio: float
    total_numel: int
    threshold: float | None
    criterion: str
    contrastive: bool
    order: str
    of: str
    scope: str
    seed: int
    fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    counts: dict[str, int]
    offsets: dict[str, int] | None
    normalise: str = "none"

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> MaskMetadata:
        """From the strings in a file. Raises ValueError naming the key that is missing or not of its type."""
        shapes = _value(texts, "shapes", _shapes)
        offsets = _value(texts, "offsets", _counts) if "offsets" in texts else None
        if offsets is not None and offsets.keys() == shapes.keys():
            shapes = dict(sorted(shapes.items(), key=lambda item: offsets[item[0]]))
        metadata = cls(
            k=_value(texts, "k", _integer),
            ratio=_value(texts, "ratio", _ratio),
            total_numel=_value(texts, "total_numel", _integer),
            threshold=None,
            criterion=_value(texts, "criterion", _text),
            contrastive=_value(texts, "contrastive", _boolean, "false"),
            order=_value(texts, "order", _choice(ORDERS), "top"),
            of=_value(texts, "of", _choice(BASES), "all"),
            scope=_value(texts, "scope", _choice(SCOPES), "model"),
            seed=_value(texts, "seed", _integer, "0"),
            fingerprint=_value(texts, "fingerprint", _text),
            shapes=shapes,
            counts=_value(texts, "counts", _counts),
            offsets=offsets,
            normalise=_value(texts, "normalise", _choice(NORMALISATIONS), "none"),
        )
        if not metadata.has_threshold:  # whatever another tool writes there
            return metadata
        return replace(metadata, threshold=_value(texts, "threshold", _threshold))

    @property
    def scored_numel(self) -> int:
        """Number of scored weights."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def base(self) -> int:
        """Number of weights that the ratio of a mask with scope ``model`` is a share of."""
        return self.scored_numel if self.of == "scored" else self.total_numel

    def k_of(self, ratio: float) -> int:
        """How many weights a ratio selects with scope ``model``; for the mask's own ratio, as many as the mask
        holds."""
        return self.k if ratio == self.ratio else min(int(ratio * self.base), self.scored_numel)

    @property
    def has_threshold(self) -> bool:
        """Whether one score is the limit of the selection (``core.select.key_to_score``)."""
        return self.scope == "model" and self.order != "random" and self.k > 0

    def problems(self) -> list[str]:
        """Every number that contradicts another, one sentence each; empty if there is none."""
        problems = [
            f"{name}: {count:,} weights are said to be selected, it has {math.prod(self.shapes[name]):,}"
            for name, count in self.counts.items()
            if count > math.prod(self.shapes.get(name, ()))
        ]
        if (total := sum(self.counts.values())) != self.k:
            problems.append(f"counts add up to {total:,}, k is {self.k:,}")
        if self.scored_numel > self.total_numel:
            problems.append(f"total_numel is {self.total_numel:,}, the shapes alone have {self.scored_numel:,} weights")
        if self.scope == "model" and not follows(self.k, self.ratio, self.base, self.scored_numel):
            problems.append(f"ratio {self.ratio!r} of {self.base:,} weights ({self.of}) is not k = {self.k:,}")
        if self.has_threshold and self.threshold is None:
            problems.append(f"threshold is null with order {self.order}, scope {self.scope} and k = {self.k:,}")
        return problems + self._wrong_offsets()

    def _wrong_offsets(self) -> list[str]:
        """Parameters that would overlap, or lie beyond the model's weights."""
        if self.offsets is None:
            return []
        problems, end = [], 0
        for name, shape in self.shapes.items():
            if self.offsets[name] < end:
                problems.append(f"{name}: offset {self.offsets[name]:,} lies before the end of the parameter before it")
            end = self.offsets[name] + math.prod(shape)
        if end > self.total_numel:
            problems.append(f"the last parameter ends at {end:,}, total_numel is {self.total_numel:,}")
        return problems


def follows(k: int, ratio: float, base: int, most: int) -> bool:
    """Whether k is what a ratio of ``base`` weights selects, of which ``most`` can be. A mask from another tool may
    state the quotient k / base itself, which ⌊ratio · base⌋ may miss by one."""
    return k == min(int(ratio * base), most) or (base > 0 and ratio == k / base)


@dataclass(frozen=True)
class ScoresMetadata:
    """The metadata of the files of ``scores/``. seed: of the run; None in scores that were written before it was."""

    criterion: str
    contrastive: bool
    total_numel: int
    fingerprint: str
    seed: int | None
    normalise: str = "none"

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> ScoresMetadata:
        """From the strings in a file. Raises ValueError naming the key that is missing or not of its type."""
        _value(texts, "format", _choice((SCORES_FORMAT,)))
        return cls(
            criterion=_value(texts, "criterion", _text),
            contrastive=_value(texts, "contrastive", _boolean, "false"),
            total_numel=_value(texts, "total_numel", _integer),
            fingerprint=_value(texts, "fingerprint", _text),
            seed=_value(texts, "seed", _integer) if "seed" in texts else None,
            normalise=_value(texts, "normalise", _choice(NORMALISATIONS), "none"),
        )

    def differences(self, mask: MaskMetadata) -> list[str]:
        """Where these scores contradict a mask that is said to be made from them, one sentence each."""
        pairs: Iterable[tuple[str, Any, Any]] = [
            ("fingerprint", self.fingerprint, mask.fingerprint),
            ("total_numel", self.total_numel, mask.total_numel),
            ("criterion", self.criterion, mask.criterion),
            ("contrastive", self.contrastive, mask.contrastive),
            ("normalise", self.normalise, mask.normalise),
        ]
        if self.seed is not None and mask.order != "random":  # a random order may have a seed of its own
            pairs = [*pairs, ("seed", self.seed, mask.seed)]
        return [f"{key} is {ours} in the scores and {other} in the mask" for key, ours, other in pairs if ours != other]


def _value(texts: Mapping[str, str], key: str, parse: Callable[[str], Value], default: str | None = None) -> Value:
    text = texts.get(key, default)
    if text is None:
        raise ValueError(f"{key} is missing")
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        shown = text if len(text) < 60 else f"{text[:50]}…"
        raise ValueError(f"{key} = {shown!r} {error}") from error


def _integer(text: str) -> int:
    if not INTEGER.fullmatch(text) or int(text) > LARGEST:
        raise ValueError(f"is not an integer from 0 to {LARGEST}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError("is not a number") from error
    if not math.isfinite(value):
        raise ValueError("is not finite")
    return value


def _ratio(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise ValueError("is not a share above 0 and up to 1")
    return value


def _threshold(text: str) -> float | None:
    if text == "null":
        return None
    try:
        value = _number(text)
    except ValueError as error:
        raise ValueError(f"{error}, and not null") from error
    if not value >= 0:
        raise ValueError("is not a score, which is at least 0")
    return value


def _boolean(text: str) -> bool:
    return _choice(("false", "true"))(text) == "true"


def _choice(known: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"is not {'one of ' if len(known) > 1 else ''}{', '.join(known)}")
        return text

    return parse


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    shapes = check_type(parse_json(text), dict[str, list[int]])
    for name, shape in shapes.items():
        if any(size < 1 for size in shape) or math.prod(shape) > LARGEST:
            raise ValueError(f"gives {name} the shape {shape}, which no parameter has"[:200])
    return {name: tuple(shape) for name, shape in shapes.items()}


def _counts(text: str) -> dict[str, int]:
    counts = check_type(parse_json(text), dict[str, int])
    for name, count in counts.items():
        if not 0 <= count <= LARGEST:
            raise ValueError(f"gives {name} a number that is not from 0 to {LARGEST}")
    return counts


def mask_texts(metadata: MaskMetadata) -> dict[str, str]:
    """The strings of a mask's files; safetensors takes strings only."""
    return {
        "format": FORMAT,
        "k": str(metadata.k),
        "ratio": repr(metadata.ratio),
        "total_numel": str(metadata.total_numel),
        "threshold": "null" if metadata.threshold is None else repr(metadata.threshold),
        "criterion": metadata.criterion,
        "contrastive": str(metadata.contrastive).lower(),
        **({"normalise": metadata.normalise} if metadata.normalise != "none" else {}),
        "order": metadata.order,
        "of": metadata.of,
        "scope": metadata.scope,
        "seed": str(metadata.seed),
        "fingerprint": metadata.fingerprint,
        "shapes": json.dumps(metadata.shapes),
        **({} if metadata.offsets is None else {"offsets": json.dumps(metadata.offsets)}),
        "counts": json.dumps(metadata.counts),
    }
