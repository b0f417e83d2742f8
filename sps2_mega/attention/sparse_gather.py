"""CSA prefill: only keys that somebody sees travel, and the exact tail moves its queries instead.

    far and halo keys   each rank sends each other rank the (key, KV head) rows that its queries see
    own cell            local
    tail rows           pass-Q: queries of the last tokens go to all ranks, partials come back

The pattern rotates with the layer, so index plans are made once per residue class of layers and step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout, Run
from sps2_mega.attention.partials import bring_home
from sps2_mega.attention.pattern import CSAPattern
from sps2_mega.attention.pieces import csa_pieces
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.attention.volume import visible_keys
from sps2_mega.comm.collectives import all_gather_rows, all_to_all_flat
from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.csa.sdpa import attend_pieces
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group

_ALL_KEYS = CSAPattern(degrees=(1,), spans=(), sinks=0, halo=0, tail=0, sample_queries=False)


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """Row numbers count (token, local KV head) pairs: of this rank's tokens in `send`, of the buffer of all
    tokens in `receive`. `work` has the pieces of each of this rank's runs, positions as queries and keys."""

    send: Tensor
    send_counts: list[int]
    receive: Tensor
    receive_counts: list[int]
    work: list[tuple[Run, list[Piece]]]


class SparseGather:
    """One step's sparse prefill over sequences with one pattern each.

    `prompt_lens[s]` may be less than the sequence's length: what follows are its own earlier outputs, which see
    all keys as generated tokens do. `kv_heads` are this TP rank's, numbered over all ranks.
    """

    def __init__(
        self,
        layout: PrefillLayout,
        patterns: Sequence[CSAPattern],
        prompt_lens: Sequence[int],
        kv_heads: range,
        group: Group,
        device: torch.device,
    ) -> None:
        assert layout.queries is layout.keys, "sparse prefill after cached tokens"
        self._layout, self._patterns, self._prompt_lens = layout.keys, patterns, prompt_lens
        self._kv_heads, self._group, self._device = kv_heads, group, device
        self._seq_starts = layout.keys.seq_starts()
        self._own_runs = layout.keys.local_runs(group.rank)
        self._period = math.lcm(*(d for pattern in patterns for d in pattern.degrees))
        self._plans: dict[int, _LayerPlan] = {}
        self._tails = [self._tail_runs(rank) for rank in range(group.size)]
        self._tail_counts = [sum(r.end - r.start for r in runs) for runs in self._tails]
        self._tail_index = self._make_tail_index()
        self._tail_work = self._make_tail_work()

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        assert rule.window is None, "CSA with a sliding window is refused at start-up"
        plan = self._plan(layer % self._period)
        k_SKH, v_SKH = self._fetch(plan, k_TKH, v_TKH)
        out_TNH = torch.empty_like(q_TNH)
        for run, pieces in plan.work:
            first = self._seq_starts[run.sequence]
            keys = slice(first, first + run.end)
            tokens = slice(run.local_start, run.local_start + run.end - run.start)
            out_TNH[tokens], _ = attend_pieces(
                q_TNH[tokens], k_SKH[keys], v_SKH[keys], pieces, scale=rule.scale, q_start=run.start
            )
        self._attend_tails(q_TNH, k_TKH, v_TKH, out_TNH, rule.scale)
        return out_TNH

    def rows_sent(self, layer: int) -> int:
        """(key, KV head) rows that this rank sends to others in a layer, each as one row of K and one of V."""
        plan = self._plan(layer % self._period)
        return sum(plan.send_counts)

    def _fetch(self, plan: _LayerPlan, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values by sequence and position; rows that this rank does not need stay undefined."""
        shape = (sum(self._layout.counts), *k_TKH.shape[1:])
        k_SKH, v_SKH = k_TKH.new_empty(shape), v_TKH.new_empty(shape)
        for run in self._own_runs:
            first = self._seq_starts[run.sequence]
            local = slice(run.local_start, run.local_start + run.end - run.start)
            k_SKH[first + run.start : first + run.end] = k_TKH[local]
            v_SKH[first + run.start : first + run.end] = v_TKH[local]
        if self._group.size == 1:
            return k_SKH, v_SKH
        width = k_TKH.shape[2]
        rows = [x.flatten(0, 1).index_select(0, plan.send) for x in (k_TKH, v_TKH)]
        received = all_to_all_flat(
            torch.cat(rows, 1).flatten(),
            [count * 2 * width for count in plan.send_counts],
            [count * 2 * width for count in plan.receive_counts],
            self._group,
        ).view(-1, 2 * width)
        k_SKH.flatten(0, 1).index_copy_(0, plan.receive, received[:, :width])
        v_SKH.flatten(0, 1).index_copy_(0, plan.receive, received[:, width:])
        return k_SKH, v_SKH

    def _attend_tails(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, scale: float
    ) -> None:
        """Fill the rows of `out_TNH` that see all keys."""
        q_BNH = all_gather_rows(
            q_TNH.index_select(0, self._tail_index), self._tail_counts, self._group
        )
        out_BNH = torch.zeros_like(q_BNH)
        lse_BN = torch.full(q_BNH.shape[:2], -torch.inf, device=self._device)
        for rows, tail, run, pieces in self._tail_work:
            tokens = slice(run.local_start, run.local_start + run.end - run.start)
            partial = attend_pieces(
                q_BNH[rows],
                k_TKH[tokens],
                v_TKH[tokens],
                pieces,
                scale=scale,
                q_start=tail.start,
                k_start=run.start,
            )
            out_BNH[rows], lse_BN[rows] = merge_two(out_BNH[rows], lse_BN[rows], *partial)
        home_TNH = bring_home(out_BNH, lse_BN, self._tail_counts, self._group)
        out_TNH.index_copy_(0, self._tail_index, home_TNH)

    def _make_tail_index(self) -> Tensor:
        """Local token numbers of this rank's tail rows."""
        mine = self._tails[self._group.rank]
        local = [torch.arange(r.local_start, r.local_start + r.end - r.start) for r in mine]
        return torch.cat([torch.empty(0, dtype=torch.int64), *local]).to(self._device)

    def _make_tail_work(self) -> list[tuple[slice, Run, Run, list[Piece]]]:
        """(rows among all ranks' tail queries, their run, a run of local keys, pieces): the same in every layer,
        since tails see all keys."""
        work = []
        row = 0
        for tail in (tail for runs in self._tails for tail in runs):
            rows = slice(row, row + tail.end - tail.start)
            row = rows.stop
            for run in self._own_runs:
                if run.sequence != tail.sequence:
                    continue
                pieces = csa_pieces(
                    _ALL_KEYS,
                    prompt_len=self._layout.last[run.sequence],
                    queries=range(tail.start, tail.end),
                    keys=range(run.start, run.end),
                    kv_heads=range(len(self._kv_heads)),
                    layer=0,
                )
                work.append((rows, tail, run, pieces))
        return work

    def _tail_runs(self, rank: int) -> list[Run]:
        """The parts of a rank's runs whose queries see all keys."""
        tails = []
        for run in self._layout.local_runs(rank):
            start = max(run.start, self._tail_start(run.sequence))
            if start < run.end:
                local_start = run.local_start + start - run.start
                tails.append(Run(run.sequence, rank, start, run.end, local_start))
        return tails

    def _tail_start(self, sequence: int) -> int:
        return max(0, self._prompt_lens[sequence] - self._patterns[sequence].tail)

    def _sparse_queries(self, run: Run) -> range:
        return range(run.start, min(run.end, self._tail_start(run.sequence)))

    def _plan(self, layer: int) -> _LayerPlan:
        """The plan of all layers with this remainder."""
        if layer not in self._plans:
            self._plans[layer] = self._make_plan(layer)
        return self._plans[layer]

    def _make_plan(self, layer: int) -> _LayerPlan:
        ranks, me, heads = range(self._group.size), self._group.rank, len(self._kv_heads)
        to_send = [self._rows(me, other, layer) for other in ranks]
        to_receive = [self._rows(other, me, layer) for other in ranks]
        local_of = np.zeros(sum(self._layout.counts), dtype=np.int64)
        for run in self._own_runs:
            first = self._seq_starts[run.sequence]
            count = run.end - run.start
            local_of[first + run.start : first + run.end] = run.local_start + np.arange(count)
        send = np.concatenate(to_send)
        send = local_of[send // heads] * heads + send % heads
        work = []
        for run in self._own_runs:
            queries = self._sparse_queries(run)
            if queries:
                pieces = csa_pieces(
                    self._patterns[run.sequence],
                    prompt_len=self._prompt_lens[run.sequence],
                    queries=queries,
                    kv_heads=self._kv_heads,
                    layer=layer,
                )
                work.append(
                    (Run(run.sequence, me, queries.start, queries.stop, run.local_start), pieces)
                )
        return _LayerPlan(
            send=torch.from_numpy(send).to(self._device),
            send_counts=[len(rows) for rows in to_send],
            receive=torch.from_numpy(np.concatenate(to_receive)).to(self._device),
            receive_counts=[len(rows) for rows in to_receive],
            work=work,
        )

    def _rows(self, source: int, target: int, layer: int) -> np.ndarray:
        """Rows (token in sequence order * heads + head) on rank `source` that queries on `target` see; both
        ranks compute the same list."""
        heads = len(self._kv_heads)
        found = [np.zeros(0, dtype=np.int64)]
        for asking in self._layout.local_runs(target) if source != target else []:
            queries = self._sparse_queries(asking)
            for run in self._layout.local_runs(source):
                if run.sequence != asking.sequence or not queries:
                    continue
                slices = visible_keys(
                    self._patterns[run.sequence],
                    prompt_len=self._prompt_lens[run.sequence],
                    queries=queries,
                    keys=range(run.start, run.end),
                    kv_heads=self._kv_heads,
                    layer=layer,
                )
                first = self._seq_starts[run.sequence]
                for part in slices:
                    tokens = first + np.arange(part.keys.start, part.keys.stop, part.keys.step)
                    members = np.arange(part.kv_heads.start, part.kv_heads.stop, part.kv_heads.step)
                    found.append((tokens[:, None] * heads + members).ravel())
        return np.unique(np.concatenate(found))
