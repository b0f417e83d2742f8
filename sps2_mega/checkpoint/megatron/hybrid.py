"""Checkpoints of megatron-core's HybridModel as those of the GPT that computes the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import Shape, canonical_shapes
from sps2_mega.checkpoint.megatron.settings.hybrid import HybridPattern
from sps2_mega.checkpoint.sharding import RankPart
from sps2_mega.checkpoint.weight_source import WeightSource


class HybridSource(WeightSource):
    """A source with numbered sublayers as one with the layers of a GPT."""

    def __init__(self, source: WeightSource, pattern: HybridPattern) -> None:
        self._source = source
        self.path, self.config, self.dtype = source.path, source.config, source.dtype
        self.format = f"{source.format}, hybrid"
        self.iteration, self.saved_layout = source.iteration, source.saved_layout
        shapes = source.shapes()
        self._stored = {pattern.canonical(name): name for name in shapes}
        self._shapes: dict[str, Shape] = {
            name: tuple(shapes[stored]) for name, stored in self._stored.items()
        }
        self._constants: dict[str, float] = {}
        for name, shape in canonical_shapes(self.config).items():
            if name not in self._stored and (value := pattern.absent(name)) is not None:
                self._constants[name], self._shapes[name] = value, shape

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        if name in self._constants:
            dtype = getattr(torch, self.dtype)
            return torch.full(self._shapes[name], self._constants[name], dtype=dtype)
        return self._source.read(self._stored[name])

    def read_into(self, target: Tensor, name: str, part: RankPart | None) -> None:
        if name in self._constants:
            target.fill_(self._constants[name])
        else:
            self._source.read_into(target, self._stored[name], part)

    def origin(self, name: str) -> str:
        stored = self._stored.get(name)
        return "no sublayer has it" if stored is None else self._source.origin(stored)
