"""Transport `ulysses`: heads are dealt to ranks by all-to-all, each rank sees every token (arXiv 2309.14509)."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout, group_heads, split_heads
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
        self._index = sequence_index(layout, device)
        self._inverse = None if self._index is None else torch.argsort(self._index)
        self._seq_starts = layout.seq_starts()

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        num_heads, num_kv_heads = q_TNH.shape[1], k_TKH.shape[1]
        shares = split_heads(num_heads, num_kv_heads, self._group.size)
        q_SnH, k_SkH, v_SkH = self._deal_heads(q_TNH, k_TKH, v_TKH, shares)
        heads, kv_heads = shares[self._group.rank]
        out_SnH = torch.empty(q_SnH.shape, dtype=q_SnH.dtype, device=q_SnH.device)
        for query_heads, keys_heads in _uniform_groups(heads, kv_heads, num_heads // num_kv_heads):
            for first, length in zip(self._seq_starts, self._layout.seq_lens, strict=True):
                tokens = slice(first, first + length)
                out_SnH[tokens, query_heads], _ = attend_run(
                    q_SnH[tokens, query_heads],
                    k_SkH[tokens, keys_heads],
                    v_SkH[tokens, keys_heads],
                    scale=rule.scale,
                    q_start=0,
                    window=rule.window,
                )
        return self._return_heads(out_SnH, [len(heads) for heads, _ in shares], q_TNH.shape[0])

    def _deal_heads(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, shares: list[tuple[range, range]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Local tokens of all heads -> all tokens (sequence order) of this rank's heads."""
        if self._group.size == 1:
            return (
                reorder(q_TNH, self._index),
                reorder(k_TKH, self._index),
                reorder(v_TKH, self._index),
            )
        width = q_TNH.shape[2]
        packed = torch.cat(
            [
                torch.cat(
                    [q_TNH[:, _cut(heads)], k_TKH[:, _cut(kv_heads)], v_TKH[:, _cut(kv_heads)]], 1
                ).flatten()
                for heads, kv_heads in shares
            ]
        )
        widths = [(len(heads) + 2 * len(kv_heads)) * width for heads, kv_heads in shares]
        mine = widths[self._group.rank]
        received = all_to_all_flat(
            packed,
            [q_TNH.shape[0] * width_r for width_r in widths],
            [count * mine for count in self._layout.counts],
            self._group,
        )
        heads, kv_heads = shares[self._group.rank]
        received = received.view(sum(self._layout.counts), mine // width, width)
        received = reorder(received, self._index)
        q_SnH, k_SkH, v_SkH = received.split([len(heads), len(kv_heads), len(kv_heads)], 1)
        return q_SnH, k_SkH, v_SkH

    def _return_heads(self, out_SnH: Tensor, heads_per_rank: list[int], num_tokens: int) -> Tensor:
        """The way back: all tokens of this rank's heads -> local tokens of all heads."""
        out_SnH = reorder(out_SnH, self._inverse)
        if self._group.size == 1:
            return out_SnH
        width = out_SnH.shape[2]
        mine = heads_per_rank[self._group.rank] * width
        sizes = [num_tokens * heads * width for heads in heads_per_rank]
        received = all_to_all_flat(
            out_SnH.flatten(), [count * mine for count in self._layout.counts], sizes, self._group
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
