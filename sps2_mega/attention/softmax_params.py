"""What a layer's attention is apart from its data; fixed when the model is built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SoftmaxParams:
    """Scores are `scale * q @ k`. With a sliding window w a query sees itself and the w - 1 tokens
    before."""

    scale: float
    window: int | None = None
