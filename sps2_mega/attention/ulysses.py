"""Transport `ulysses`: heads are dealt to ranks by all-to-all, each rank sees every token (arXiv 2309.14509)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout, TokenLayout, group_heads, split_heads
from sps2_mega.attention.order import reorder, sequence_index
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.comm.collectives import all_to_all_flat
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.parallel.groups import Group


class Ulysses:
    """All-to-all over heads; bytes sent per rank and layer: (T/P) * (2N + 2max(K, P)) * H * e * (P-1)/P.

    Ranks may get unequal numbers of heads, or none where there are more ranks than heads.
    """

    def __init__(self, layout: PrefillLayout, group: Group, device: torch.device) -> None:
        self._layout, self._group = layout, group
        queries, keys = layout.queries, layout.keys
        self._query_index = sequence_index(queries, device)
        self._key_index = sequence_index(keys, device)
        self._inverse = None if self._query_index is None else torch.argsort(self._query_index)
        self._sequences = list(
            zip(queries.seq_starts(), keys.seq_starts(), queries.first, queries.last, strict=True)
        )

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        num_heads, num_kv_heads = q_TNH.shape[1], k_CKH.shape[1]
        shares = split_heads(num_heads, num_kv_heads, self._group.size)
        heads, kv_heads = shares[self._group.rank]
        kv_C2KH = torch.stack([k_CKH, v_CKH], 1)
        kv_S2kH = self._deal(
            kv_C2KH, [share for _, share in shares], self._layout.keys, self._key_index
        )
        q_SnH = self._deal(
            q_TNH, [share for share, _ in shares], self._layout.queries, self._query_index
        )
        out_SnH = torch.empty(q_SnH.shape, dtype=q_SnH.dtype, device=q_SnH.device)
        for query_heads, key_heads in _uniform_groups(heads, kv_heads, num_heads // num_kv_heads):
            for first_query, first_key, start, end in self._sequences:
                queries = slice(first_query, first_query + end - start)
                keys = slice(first_key, first_key + end)
                out_SnH[queries, query_heads], _ = attend_run(
                    q_SnH[queries, query_heads],
                    kv_S2kH[keys, 0, key_heads],
                    kv_S2kH[keys, 1, key_heads],
                    scale=rule.scale,
                    q_start=start,
                    window=rule.window,
                )
        return self._return_heads(out_SnH, [len(heads) for heads, _ in shares], q_TNH.shape[0])

    def _deal(
        self, x: Tensor, shares: list[range], layout: TokenLayout, index: Tensor | None
    ) -> Tensor:
        """Local tokens of all heads x [T, ..., heads, H] -> all tokens (sequence order) of this rank's heads."""
        if self._group.size == 1:
            return reorder(x, index)
        packed = torch.cat([x[..., _cut(share), :].flatten() for share in shares])
        per_head = math.prod(x.shape[1:-2]) * x.shape[-1]
        mine = len(shares[self._group.rank]) * per_head
        received = all_to_all_flat(
            packed,
            [x.shape[0] * len(share) * per_head for share in shares],
            [count * mine for count in layout.counts],
            self._group,
        )
        own = (*x.shape[1:-2], len(shares[self._group.rank]), x.shape[-1])
        return reorder(received.view(sum(layout.counts), *own), index)

    def _return_heads(self, out_SnH: Tensor, heads_per_rank: list[int], num_tokens: int) -> Tensor:
        """The way back: all tokens of this rank's heads -> local tokens of all heads."""
        out_SnH = reorder(out_SnH, self._inverse)
        if self._group.size == 1:
            return out_SnH
        width = out_SnH.shape[2]
        mine = heads_per_rank[self._group.rank] * width
        sizes = [num_tokens * heads * width for heads in heads_per_rank]
        received = all_to_all_flat(
            out_SnH.flatten(),
            [count * mine for count in self._layout.queries.counts],
            sizes,
            self._group,
        )
        pieces = [
            piece.view(num_tokens, heads, width)
            for piece, heads in zip(received.split(sizes), heads_per_rank, strict=True)
        ]
        return torch.cat(pieces, 1)


def _cut(heads: range) -> slice:
    return slice(heads.start, heads.stop)


def _uniform_groups(heads: range, kv_heads: range, repeats: int) -> list[tuple[slice, slice]]:
    """Pieces of this rank's heads that one grouped-query call can do: all at once where every KV head
    serves equally many of them, else one KV head at a time (indices local to the rank)."""
    if not heads:
        return []
    pieces = group_heads(heads, repeats)
    if len({len(queries) for queries, _ in pieces}) == 1:
        return [(slice(0, len(heads)), slice(0, len(kv_heads)))]
    return [
        (
            slice(queries.start - heads.start, queries.stop - heads.start),
            slice(kv_head - kv_heads.start, kv_head - kv_heads.start + 1),
        )
        for queries, kv_head in pieces
    ]
