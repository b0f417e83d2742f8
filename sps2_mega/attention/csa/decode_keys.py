"""Keys that a generated token sees under CSA: the pattern of its position without the exact tail.

Decode never samples queries, as every token is computed once and by all heads. The keys of a KV
head depend only on its class, the remainder of (head + layer), so heads and layers of one class
share a list.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sps2_mega.attention.csa.key_blocks import key_ranges
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces


def num_classes(degrees: tuple[int, ...]) -> int:
    """Return the number of classes `(kv_head + layer) % num_classes` that see different keys."""
    return math.lcm(*degrees)


def keys_before_own_cell(pattern: CSAPattern, position: int, head_class: int) -> list[range]:
    """Return disjoint keys before the query's own cell, the cell of level 0 that holds it.

    They are the same for all positions that share their cells of all levels.
    """
    return _seen(pattern, position, head_class, range(pattern.own_start(position)))


def keys_of_own_cell(pattern: CSAPattern, position: int, head_class: int) -> list[range]:
    """Return disjoint keys of the query's own cell, up to itself.

    They depend on the class only by its remainder for the degree of level 0.
    """
    return _seen(pattern, position, head_class, range(pattern.own_start(position), position + 1))


def _seen(pattern: CSAPattern, position: int, head_class: int, keys: range) -> list[range]:
    pieces = csa_pieces(
        replace(pattern, tail=0, sample_queries=False),
        prompt_len=position + 1,
        queries=range(position, position + 1),
        kv_heads=range(head_class, head_class + 1),
        layer=0,
        keys=keys,
    )
    return [part for piece in pieces for part in key_ranges(piece.keys)]
