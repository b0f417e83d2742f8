"""Transport `ulysses`: heads are dealt to ranks by all-to-all, each rank sees every token.

Source: arXiv 2309.14509. K, V and Q travel as exchanges of their own, outputs go back by part over
the second communicator, all in the order of `pipeline.schedule`. A micro-batch is one group of KV
heads and one part of the query tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.attention.layout.heads import group_heads, head_groups, most_kv_heads
from sps2_mega.attention.layout.token_order import reorder, sequence_index
from sps2_mega.attention.pipeline.micro_batches import (
    CPU_PART,
    CUDA_PART,
    WINDOW,
    cut_by_heads_and_queries,
    num_micro_batches,
)
from sps2_mega.attention.pipeline.parts import cut_queries, seen_keys
from sps2_mega.attention.pipeline.schedule import inputs_by_heads_and_queries, stage_order
from sps2_mega.comm.exchange import Pending, post_all_to_all
from sps2_mega.kernels.attention.sdpa import attend_run

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import PrefillLayout
    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.pipeline.micro_batches import Cut
    from sps2_mega.attention.pipeline.parts import QueryPart
    from sps2_mega.attention.pipeline.schedule import Stage
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.parallel.groups import Group

_Shares = Sequence[tuple[range, range]]  # (query heads, KV heads) of each rank


class Ulysses:
    """All-to-all over heads.

    Bytes sent per rank and layer: (T/P) * (2N + 2max(K, P)) * H * e * (P-1)/P. Ranks may get
    unequal numbers of heads, or none where there are more ranks than heads.
    """

    def __init__(
        self, layout: PrefillLayout, group: Group, device: torch.device, pipeline: Pipeline
    ) -> None:
        self._layout, self._group, self._device = layout, group, device
        self._pipeline = pipeline
        self._key_index = sequence_index(layout.keys, device)
        self._plan: _Plan | None = None

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        # All layers of a step have the same shapes, so the first one plans for all.
        plan = self._plan = self._plan or self._make_plan(q_TNH, k_CKH, softmax.window)
        back = self._pipeline.back or self._group
        tensors = _UlyssesLayer(plan, (q_TNH, k_CKH, v_CKH), softmax, self._group, back)
        self._pipeline.run(plan.stages, tensors, layer)
        return tensors.out_TNH

    def _make_plan(self, q_TNH: Tensor, k_CKH: Tensor, window: int | None) -> _Plan:
        size, queries = self._group.size, self._layout.queries
        num_heads, width = q_TNH.shape[1:]
        num_kv_heads = k_CKH.shape[1]
        # The mean over ranks, so that all ranks cut alike.
        rows = 2 * sum(queries.counts) * num_heads + 2 * sum(self._layout.keys.counts) * max(
            num_kv_heads, size
        )
        wanted = num_micro_batches(
            self._pipeline.settings,
            num_bytes=rows * width * q_TNH.itemsize * (size - 1) // size**2,
            flops=4 * width * num_heads * seen_keys(queries, window=window) // size,
            smallest=CUDA_PART if self._device.type == "cuda" else CPU_PART,
        )
        cut = cut_by_heads_and_queries(
            wanted,
            kv_heads=most_kv_heads(num_heads, num_kv_heads, size),
            query_tokens=max(queries.counts),
        )
        return _Plan(
            cut=cut,
            stages=stage_order(
                inputs_by_heads_and_queries(cut.head_groups, cut.query_parts),
                ahead=WINDOW,
                behind=WINDOW,
            ),
            shares=head_groups(num_heads, num_kv_heads, size, cut.head_groups),
            parts=[
                _PlacedPart.of(part, self._device)
                for part in cut_queries(queries, cut.query_parts, window=window)
            ],
            key_counts=self._layout.keys.counts,
            key_index=self._key_index,
            key_starts=self._layout.keys.seq_starts(),
            repeats=num_heads // num_kv_heads,
        )


@dataclass(frozen=True, slots=True)
class _PlacedPart:
    """Part of the queries with its indices on the device."""

    part: QueryPart
    index: Tensor | None
    inverse: Tensor | None

    @classmethod
    def of(cls, part: QueryPart, device: torch.device) -> _PlacedPart:
        if part.index is None:
            return cls(part, None, None)
        index = torch.from_numpy(part.index).to(device)
        return cls(part, index, torch.argsort(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Plan that all layers of a step share.

    Micro-batch m is head group m // query_parts and query part m % query_parts.
    """

    cut: Cut
    stages: tuple[Stage, ...]
    shares: list[list[tuple[range, range]]]
    parts: list[_PlacedPart]
    key_counts: tuple[int, ...]
    key_index: Tensor | None
    key_starts: list[int]
    repeats: int

    def of(self, micro_batch: int) -> tuple[_Shares, _PlacedPart]:
        group, part = divmod(micro_batch, self.cut.query_parts)
        return self.shares[group], self.parts[part]

    def first_of_group(self, micro_batch: int) -> int:
        """Return the micro-batch that brings the keys and values of the same heads."""
        return micro_batch - micro_batch % self.cut.query_parts


class _UlyssesLayer:
    """Tensors of one layer (`ReturningLayer`), all kept until the layer is done."""

    def __init__(
        self,
        plan: _Plan,
        qkv: tuple[Tensor, Tensor, Tensor],
        softmax: SoftmaxParams,
        group: Group,
        back: Group,
    ) -> None:
        self._plan, self._softmax, self._group, self._back = plan, softmax, group, back
        self._q_TNH, self._k_CKH, self._v_CKH = qkv
        self._inputs: dict[tuple[int, str], Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self.out_TNH = torch.empty_like(self._q_TNH)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        shares, placed = self._plan.of(micro_batch)
        if part == "q":
            x = self._q_TNH[placed.part.local[self._group.rank]]
            counts, heads = placed.part.counts, [query_heads for query_heads, _ in shares]
        else:
            x = self._k_CKH if part == "k" else self._v_CKH
            counts, heads = self._plan.key_counts, [kv_heads for _, kv_heads in shares]
        pieces = [x[:, share.start : share.stop].reshape(-1) for share in heads]
        if self._group.size == 1:
            self.arrived(micro_batch, part, pieces[0])
            return None
        mine = len(heads[self._group.rank]) * x.shape[-1]
        return post_all_to_all(
            torch.cat(pieces),
            [piece.numel() for piece in pieces],
            [count * mine for count in counts],
            self._group,
        )

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        shares, placed = self._plan.of(micro_batch)
        query_heads, kv_heads = shares[self._group.rank]
        heads, tokens, index = len(kv_heads), sum(self._plan.key_counts), self._plan.key_index
        if part == "q":
            heads, tokens, index = len(query_heads), sum(placed.part.counts), placed.index
        x = received.view(tokens, heads, self._q_TNH.shape[-1])
        self._inputs[micro_batch, part] = reorder(x, index)

    def compute(self, micro_batch: int) -> None:
        shares, placed = self._plan.of(micro_batch)
        heads, kv_heads = shares[self._group.rank]
        first = self._plan.first_of_group(micro_batch)
        q_SnH = self._inputs[micro_batch, "q"]
        k_SkH, v_SkH = self._inputs[first, "k"], self._inputs[first, "v"]
        out_SnH = torch.empty_like(q_SnH)
        for query_heads, key_heads in _uniform_groups(heads, kv_heads, self._plan.repeats):
            for run in placed.part.runs:
                first_key = self._plan.key_starts[run.sequence]
                keys = slice(first_key, first_key + run.end)
                out_SnH[run.rows, query_heads], _ = attend_run(
                    q_SnH[run.rows, query_heads],
                    k_SkH[keys, key_heads],
                    v_SkH[keys, key_heads],
                    scale=self._softmax.scale,
                    q_start=run.start,
                    window=self._softmax.window,
                )
        self._outputs[micro_batch] = out_SnH

    def post_scatter(self, micro_batch: int) -> Pending | None:
        placed = self._plan.of(micro_batch)[1]
        out_SnH = reorder(self._outputs[micro_batch], placed.inverse)
        if self._group.size == 1:
            self.returned(micro_batch, out_SnH.view(-1))
            return None
        row = out_SnH.shape[1] * out_SnH.shape[2]
        return post_all_to_all(
            out_SnH.view(-1),
            [count * row for count in placed.part.counts],
            self._return_sizes(micro_batch),
            self._back,
        )

    def returned(self, micro_batch: int, received: Tensor) -> None:
        shares, placed = self._plan.of(micro_batch)
        own = self.out_TNH[placed.part.local[self._group.rank]]
        pieces = received.split(self._return_sizes(micro_batch))
        for (heads, _), piece in zip(shares, pieces, strict=True):
            own[:, heads.start : heads.stop] = piece.view(len(own), len(heads), own.shape[-1])

    def _return_sizes(self, micro_batch: int) -> list[int]:
        """Return how many elements each rank computed for this rank's queries."""
        shares, placed = self._plan.of(micro_batch)
        rows = placed.part.counts[self._group.rank] * self._q_TNH.shape[-1]
        return [rows * len(heads) for heads, _ in shares]


def _uniform_groups(heads: range, kv_heads: range, repeats: int) -> list[tuple[slice, slice]]:
    """Split this rank's heads into pieces that one grouped-query call computes: (queries, keys).

    That is all heads at once where every KV head serves equally many of them, else one KV head at a
    time. Indices are local to the rank.
    """
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
