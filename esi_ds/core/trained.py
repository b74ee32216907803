"""Which weights train (docs/method.md §3): the mask's (SET) or all others (SPA), and unscored ones as configured."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from esi_ds.core.mask import Mask, identity
from esi_ds.core.units import Shard
from esi_ds.reading import json_sha256


class Trained:
    """The trained coordinates of every parameter of a model, keyed by full name and flat index.

    train: ``selected`` | ``complement``. unscored: ``freeze`` | ``train``, for parameters that the mask does not name.
    shapes: of every parameter, in the model's order. routers: names of the routers' parameters. router: ``freeze`` |
    ``train`` for these, whether or not the mask names them; None: as the mask or ``unscored`` says. towers, biases:
    names of parameters of towers, and routers' correction biases. No text gives either a gradient: they are always
    frozen, since weight decay would shrink them.
    """

    def __init__(
        self,
        mask: Mask,
        train: str,
        unscored: str,
        shapes: Mapping[str, tuple[int, ...]],
        routers: Collection[str] = (),
        router: str | None = None,
        towers: Collection[str] = (),
        biases: Collection[str] = (),
    ):
        self.mask, self.train, self.unscored = mask, train, unscored
        self.routers, self.router, self.towers = frozenset(routers), router, frozenset(towers)
        self.biases = frozenset(biases)
        self._frozen = self.towers | self.biases
        self.numels = {name: math.prod(shape) for name, shape in shapes.items()}

    @cached_property
    def digest(self) -> str:
        """sha256 of what decides which weights of a model train: the mask, and what is made of it."""
        settings = {"train": self.train, "unscored": self.unscored, "router": self.router or self.unscored}
        if self.router and self.masked_routers:
            settings["masked_routers"] = self.router
        if self.towers and self.unscored == "train":
            settings["towers"] = "freeze"
        if self.biases and settings["router"] == "train":
            settings["correction_biases"] = "freeze"
        if self.mask.digests:
            return json_sha256({**identity(self.mask), **settings})
        bits = self.mask.digests_of_bits() if self.mask.k else {}
        return json_sha256({"mask_sha256": json_sha256(self.mask.metadata), **bits, **settings})

    @property
    def masked_routers(self) -> frozenset[str]:
        """Names of the routers' parameters that the mask names, as one made with other roles may."""
        return self.routers & self.mask.shapes.keys()

    def is_masked(self, name: str) -> bool:
        """Whether the mask decides which of a parameter's weights train; else all of them do, or none."""
        is_overruled = name in self._frozen or (name in self.routers and self.router is not None)
        return name in self.mask.shapes and not is_overruled

    def _trains_whole(self, name: str) -> bool:
        """Whether a parameter that is not masked trains."""
        if name in self._frozen:
            return False
        return ((name in self.routers and self.router) or self.unscored) == "train"

    def count(self, name: str) -> int:
        """Number of trained weights of a parameter."""
        if not self.is_masked(name):
            return self.numels[name] if self._trains_whole(name) else 0
        selected = self.mask.counts[name]
        return selected if self.train == "selected" else self.numels[name] - selected

    @property
    def total(self) -> int:
        """Number of trained weights of the model."""
        return sum(self.count(name) for name in self.numels)

    def bits(self, name: str, low: int, high: int) -> Tensor:
        """bool [high − low]: whether each weight of [low, high), flat, trains. Reads only their bytes of the mask."""
        if not self.is_masked(name):
            return torch.full((high - low,), self._trains_whole(name))
        bits = self.mask.bits(name, low, high)
        return bits if self.train == "selected" else ~bits

    def bits_of(self, shard: Shard) -> Tensor:
        """bool [shard.numel]: whether each weight of the shard trains."""
        parts = [self.bits(shard.parameter.name, low, high) for low, high in shard.runs]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *parts])

    def positions_of(self, shard: Shard) -> Tensor | None:
        """Positions of the trained weights in the shard, int32 where that suffices, else int64; None: all of them."""
        name = shard.parameter.name
        if self.count(name) == self.numels[name]:
            return None
        dtype = torch.int32 if shard.numel < 1 << 31 else torch.int64
        return self.bits_of(shard).nonzero().flatten().to(dtype)
