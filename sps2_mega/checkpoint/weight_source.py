"""Source of weights in the canonical form: what every reader of a checkpoint offers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sps2_mega.checkpoint.canonical import Shape
from sps2_mega.checkpoint.sharding import RankPart, copy_part
from sps2_mega.config import ModelConfig


class WeightSource(Protocol):
    """One checkpoint, as canonical tensors.

    `saved_layout` is the writer's (tp, pp) if the format records it. `dtype` is the
    stored one (`bfloat16`, ..).
    """

    path: Path
    format: str
    config: ModelConfig
    iteration: int | None
    saved_layout: tuple[int, int] | None
    dtype: str

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes found, by canonical name; tensors that are not part of the model by their own."""
        ...

    def read(self, name: str) -> Tensor:
        """Read a whole canonical tensor, with the vocabulary rows that a file has as padding."""
        ...

    def read_into(self, target: Tensor, name: str, part: RankPart | None) -> None:
        """Fill `target` (any dtype and device) with a rank's part of a canonical tensor.

        A reader that can read parts alone does so; else the whole tensor is in memory meanwhile.
        """
        copy_part(target, self.read(name), part)

    def origin(self, name: str) -> str:
        """Name in the file."""
        ...
