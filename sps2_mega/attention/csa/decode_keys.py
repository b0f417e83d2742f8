"""Which keys a generated token sees under CSA: the pattern of its position, without the exact tail.

Decode never samples queries: each token is asked for once, and by all heads. A KV head of a layer
sees keys by the remainder of (head + layer) only, its class, so heads and layers of one class share
their list.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sps2_mega.attention.csa.key_blocks import key_ranges
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces


def num_classes(degrees: tuple[int, ...]) -> int:
    """Classes of KV head + layer, `(kv_head + layer) % num_classes`, that see different keys."""
    return math.lcm(*degrees)


def keys_before_own_cell(pattern: CSAPattern, position: int, head_class: int) -> list[range]:
    """Disjoint keys before the cell of level 0 that holds the query: the same for all positions
    that share their cells of all levels."""
    return _seen(pattern, position, head_class, range(pattern.own_start(position)))


def keys_of_own_cell(pattern: CSAPattern, position: int, head_class: int) -> list[range]:
    """Disjoint keys of the query's own cell, up to itself; they depend on the class by its
    remainder for the degree of level 0 only."""
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
