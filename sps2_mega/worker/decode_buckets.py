"""Which decode steps share a captured graph: batch and block table are rounded up to a few sizes.
Pure ints.

Close sizes waste little, far ones need few graphs: rows of padding see no keys, but they go through
the products.
"""

from __future__ import annotations

_SHORTEST_TABLE = 64  # blocks


def batch_bucket(batch: int) -> int:
    """Rows of the graph for `batch` sequences: 1, 2, 4, 8, then multiples of 8, from 64 on
    multiples of 32."""
    if batch <= 8:
        return 1 << (batch - 1).bit_length()
    step = 8 if batch <= 64 else 32
    return -(-batch // step) * step


def table_bucket(num_blocks: int) -> int:
    """Columns of the graph's block table for rows of at most `num_blocks` blocks: a power of
    two."""
    return max(_SHORTEST_TABLE, 1 << max(0, num_blocks - 1).bit_length())
