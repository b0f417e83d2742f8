"""The unit of work of sparse attention: some queries against some keys, without a mask.

What to compute is a list of pieces whose (query, key, KV head) triples are disjoint; who makes the
list is the attention layer's affair, kernels only carry it out. Pure Python, so that plans can be
made and tested without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Every query of `queries` sees every key of `keys`, for every KV head of `kv_heads`.

    With `causal` the two ranges have the same length and step, and `keys[t] <= queries[t] < keys[t
    + 1]`: the t-th query sees the keys up to and with the t-th. No range is empty and all steps are
    positive, so a piece is always a strided view of its tensor. Query head n belongs to KV head n
    // (N/K).
    """

    queries: range
    keys: range
    kv_heads: range
    causal: bool = False

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs of one KV head."""
        if self.causal:
            return len(self.queries) * (len(self.queries) + 1) // 2
        return len(self.queries) * len(self.keys)
