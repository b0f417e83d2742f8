"""Unit of work of sparse attention: a set of queries against a set of keys, without a mask.

A computation is a list of pieces whose (query, key, KV head) triples are disjoint.
The attention layer makes the list; kernels only carry it out. Pure Python, so that
plans can be made and tested without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Every query of `queries` sees every key of `keys`, for every KV head of `kv_heads`.

    With `causal` the two ranges have the same length and step, and `keys[t] <= queries[t]
    < keys[t + 1]`: the t-th query sees the keys up to and including the t-th. No range is
    empty and all steps are positive, so a piece is always a strided view of its tensor.
    Query head n belongs to KV head n // (N/K).
    """

    queries: range
    keys: range
    kv_heads: range
    causal: bool = False

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs of one KV head."""
        if self.causal:
            return len(self.queries) * (len(self.queries) + 1) // 2
        return len(self.queries) * len(self.keys)
