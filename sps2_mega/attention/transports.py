"""How prefill brings queries and keys together: one class per transport, all giving the one-rank result.

    Gather    keys and values go to every rank at once, queries stay
    Ring      keys and values go round, one rank further per step (pass-KV, arXiv 2310.01889)
    Ulysses   heads are dealt to ranks by all-to-all, each rank sees every token (arXiv 2309.14509)

A transport is made per step from the layout; indices are computed then, not in each layer.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout, group_heads, split_heads
from sps2_mega.comm.collectives import all_gather_rows, all_to_all_flat
from sps2_mega.comm.exchange import post_shift
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group


class Transport(Protocol):
    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Causal attention of this rank's tokens (local order) -> out [T, N, H]."""
        ...


def make_transport(
    name: str, layout: PrefillLayout, group: Group, device: torch.device
) -> Transport:
    """The transport called `name` in the configuration, for one step."""
    if name == "gather":
        return Gather(layout, group, device)
    if name == "ring":
        return Ring(layout, group)
    assert name == "ulysses", f"unknown transport {name!r}"
    return Ulysses(layout, group, device)


class Gather:
    """All-gather of K and V; bytes sent per rank and layer: 2 * S * K * H * e * (P-1)/P."""

    def __init__(self, layout: PrefillLayout, group: Group, device: torch.device) -> None:
        self._layout, self._group = layout, group
        self._index = _to_device(layout, device)
        self._runs = layout.local_runs(group.rank)
        self._seq_starts = layout.seq_starts()

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        k_SKH, v_SKH = (
            _reorder(all_gather_rows(x, self._layout.counts, self._group), self._index)
            for x in (k_TKH, v_TKH)
        )
        out_TNH = torch.empty_like(q_TNH)
        for run in self._runs:
            first = self._seq_starts[run.sequence]
            keys = slice(first, first + run.end)
            tokens = slice(run.local_start, run.local_start + run.end - run.start)
            out_TNH[tokens], _ = attend_run(
                q_TNH[tokens],
                k_SKH[keys],
                v_SKH[keys],
                scale=scale,
                q_start=run.start,
                window=window,
            )
        return out_TNH


class Ring:
    """Pass-KV: as many bytes as `Gather`, but only two shards of keys are held at a time, and the next one
    comes in while the present one is computed on."""

    def __init__(self, layout: PrefillLayout, group: Group) -> None:
        self._layout, self._group = layout, group

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        size, me = self._group.size, self._group.rank
        # Partials of all steps add up in float32: rounding once per step would grow with the ring.
        out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float32, device=q_TNH.device)
        lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, device=q_TNH.device)
        kv_S2KH = torch.stack([k_TKH, v_TKH], 1)
        for step in range(size):
            source = (me - step) % size
            pending = None
            if step + 1 < size:
                pending = post_shift(kv_S2KH, self._layout.counts[(source - 1) % size], self._group)
            for queries in self._layout.local_runs(me):
                rows = slice(queries.local_start, queries.local_start + queries.end - queries.start)
                for keys in self._layout.local_runs(source):
                    # Runs of two ranks never overlap, so later keys are invisible as a whole.
                    if keys.sequence != queries.sequence or keys.start > queries.start:
                        continue
                    shard = kv_S2KH[keys.local_start : keys.local_start + keys.end - keys.start]
                    out, lse = attend_run(
                        q_TNH[rows],
                        shard[:, 0],
                        shard[:, 1],
                        scale=scale,
                        q_start=queries.start,
                        k_start=keys.start,
                        window=window,
                    )
                    out_TNH[rows], lse_TN[rows] = merge_two(out_TNH[rows], lse_TN[rows], out, lse)
            if pending is not None:
                kv_S2KH = pending.wait()
        return out_TNH.to(q_TNH.dtype)


class Ulysses:
    """All-to-all over heads; bytes sent per rank and layer: (T/P) * (2N + 2max(K, P)) * H * e * (P-1)/P.

    Ranks may get unequal numbers of heads, or none where there are more ranks than heads.
    """

    def __init__(self, layout: PrefillLayout, group: Group, device: torch.device) -> None:
        self._layout, self._group = layout, group
        self._index = _to_device(layout, device)
        self._inverse = None if self._index is None else torch.argsort(self._index)
        self._seq_starts = layout.seq_starts()

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        *,
        scale: float,
        window: int | None,
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
                    scale=scale,
                    q_start=0,
                    window=window,
                )
        return self._return_heads(out_SnH, [len(heads) for heads, _ in shares], q_TNH.shape[0])

    def _deal_heads(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, shares: list[tuple[range, range]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Local tokens of all heads -> all tokens (sequence order) of this rank's heads."""
        if self._group.size == 1:
            return (
                _reorder(q_TNH, self._index),
                _reorder(k_TKH, self._index),
                _reorder(v_TKH, self._index),
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
        received = _reorder(received, self._index)
        q_SnH, k_SkH, v_SkH = received.split([len(heads), len(kv_heads), len(kv_heads)], 1)
        return q_SnH, k_SkH, v_SkH

    def _return_heads(self, out_SnH: Tensor, heads_per_rank: list[int], num_tokens: int) -> Tensor:
        """The way back: all tokens of this rank's heads -> local tokens of all heads."""
        out_SnH = _reorder(out_SnH, self._inverse)
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


def _to_device(layout: PrefillLayout, device: torch.device) -> Tensor | None:
    index = layout.rank_major_index()
    return None if index is None else torch.from_numpy(index).to(device)


def _reorder(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


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
