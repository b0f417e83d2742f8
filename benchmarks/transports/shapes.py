"""Prefill steps that `transport.py` times, and the exact transports that compete."""

from __future__ import annotations

from dataclasses import dataclass

TRANSPORTS = ("ulysses", "gather", "ring", "pass_q")
DEGREES = (1, 4)  # of the sparse steps, near and far


@dataclass(frozen=True)
class Shape:
    """A step of `new` tokens behind `cached` ones, with heads of one TP rank."""

    new: int
    cached: int
    heads: int
    kv_heads: int
    width: int = 64


SHAPES = (
    Shape(2048, 0, 8, 8),
    Shape(2048, 0, 8, 2),
    Shape(2048, 0, 16, 1),
    Shape(256, 0, 8, 2),
    Shape(128, 4096, 8, 2),
    Shape(128, 4096, 8, 8),
    Shape(1024, 2048, 8, 2),
)
