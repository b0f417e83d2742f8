"""Attention of a prefill that goes through every layer chunk by chunk: a layer's keys come once and
stay until it is done.

    layer 3   chunk 0  keys of chunk 0 come                  | attends to them
              chunk 1  attends to those that are here already, while its own come | attends to its
              own
              ...
    layer 4   from the beginning; the same memory is used again

So a chunk repeats nothing of what earlier ones did, however short it is. Of the last layer often
only the last token's output is read; of the other tokens keys and values are then all that is
wanted there, and they do not attend. The price is one layer's keys and values of the whole prompt
on every rank. Which tokens a chunk has is the scheduler's choice, what queries see is
`chunk_scores`'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_mega.attention.chunk_scores import ChunkScores
from sps2_mega.attention.layout.chunk_layout import Stretch, stretch
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.layout.token_order import reorder, sequence_index
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.step import Rotation, keep
from sps2_mega.comm.exchange import Pending, post_all_gather
from sps2_mega.kernels.lse.dispatch import merge_two
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import Group


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`keys` come with it: the queries' own, with the first one of a layer also what was cached
    before."""

    queries: Stretch
    keys: Stretch
    index: Tensor | None  # rank-major to sequence order, of the keys

    @property
    def new_keys(self) -> range:
        return range(self.keys.tokens.first[0], self.keys.tokens.last[0])


class ChunkedPrefill:
    """Of one prompt. `begin` says which chunk the next layer call is about: in each layer from the
    first token on, without gaps. `slots_T` are the cache slots of this rank's tokens,
    `cached_slots_C` those of its cached ones."""

    def __init__(
        self,
        pool: KVPool,
        slots_T: Tensor,
        cached_slots_C: Tensor,
        layout: PrefillLayout,
        scores: ChunkScores,
        group: Group,
        pipeline: Pipeline,
        *,
        whole_output: bool = True,
    ) -> None:
        """`whole_output`: the last layer's output of all tokens is read, not only the last
        one's."""
        self._pool, self._slots_T, self._cached_slots_C = pool, slots_T, cached_slots_C
        self._layout, self._scores = layout, scores
        self._group, self._pipeline, self._whole_output = group, pipeline, whole_output
        self._chunk: _Chunk | None = None
        self._kv_S2KH: Tensor | None = None  # of one layer, keys beside values, by position

    def begin(self, start: int, end: int) -> slice:
        """The chunk [start, end); returns its rows among this rank's tokens of the prompt."""
        first = start == self._layout.queries.first[0]
        queries = stretch(self._layout.queries, start, end)
        keys = stretch(self._layout.keys, 0 if first else start, end)
        index = sequence_index(keys.tokens, self._slots_T.device)
        self._chunk = _Chunk(queries, keys, index)
        return queries.rows(self._group.rank)

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        chunk = self._chunk
        assert chunk is not None, "no chunk was begun"
        cache = self._pool.layer(layer)
        rows = chunk.queries.rows(self._group.rank)
        keep(cache, q_TNH, k_TKH, v_TKH, self._slots_T[rows], rotation)
        kv_C2KH = torch.cat([k_TKH, v_TKH], 1)
        if chunk.keys.tokens.counts[self._group.rank] > len(kv_C2KH):
            cached = [p.flatten(0, 1).index_select(0, self._cached_slots_C) for p in cache]
            kv_C2KH = torch.cat([torch.cat(cached, 1), kv_C2KH])
        if self._kv_S2KH is None:
            self._kv_S2KH = kv_C2KH.new_empty(self._layout.keys.last[0], *kv_C2KH.shape[1:])
        runs = chunk.queries.tokens.local_runs(self._group.rank)
        needed = slice(0, len(q_TNH))
        if not self._whole_output and layer == self._pool.num_layers - 1:
            runs, needed = _last_token(runs, self._layout.queries.last[0])
        work = _ChunkWork(
            chunk,
            runs,
            self._scores,
            q_TNH[needed],
            kv_C2KH,
            self._kv_S2KH,
            layer,
            rule,
            self._group,
        )
        ahead = int(self._pipeline.settings.mode != "off")
        stages = stage_order([(), ("kv",)], ahead=ahead, returns=False)
        self._pipeline.run(stages, work, layer)
        if needed.stop - needed.start == len(q_TNH):
            return work.out_TNH.to(q_TNH.dtype)
        out_TNH = torch.zeros_like(q_TNH)
        out_TNH[needed] = work.out_TNH.to(q_TNH.dtype)
        return out_TNH


def _last_token(runs: list[Run], end: int) -> tuple[list[Run], slice]:
    """The last of a prompt's tokens [.., end) as a run that begins at row 0, and its row among
    those of `runs`; none where it is not among them."""
    if not runs or runs[-1].end < end:
        return [], slice(0, 0)
    last = runs[-1]
    row = last.local.stop - 1
    return [Run(last.sequence, last.rank, end - 1, end, 0)], slice(row, row + 1)


class _ChunkWork:
    """One chunk in one layer (`PipelineWork`): micro-batch 0 are the keys that are here, 1 those
    that come."""

    def __init__(
        self,
        chunk: _Chunk,
        runs: list[Run],
        scores: ChunkScores,
        q_TNH: Tensor,
        kv_C2KH: Tensor,
        kv_S2KH: Tensor,
        layer: int,
        rule: SoftmaxParams,
        group: Group,
    ) -> None:
        self._chunk, self._scores, self._group = chunk, scores, group
        self._q_TNH, self._kv_C2KH, self._kv_S2KH = q_TNH, kv_C2KH, kv_S2KH
        self._layer, self._rule = layer, rule
        self._runs = runs  # of the queries
        # Partials add up in float32: rounding once per partial would show.
        self.out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float32, device=q_TNH.device)
        self._lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, device=q_TNH.device)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        longest = max(self._chunk.keys.tokens.counts)
        if self._group.size == 1 or longest == 0:
            self.arrived(micro_batch, part, self._kv_C2KH)
            return None
        return post_all_gather(self._kv_C2KH, longest, self._group)

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        counts, longest = self._chunk.keys.tokens.counts, max(self._chunk.keys.tokens.counts)
        if min(counts) < longest:
            shards = zip(received.split(longest), counts, strict=True)
            received = torch.cat([shard[:count] for shard, count in shards])
        new = self._chunk.new_keys
        self._kv_S2KH[new.start : new.stop] = reorder(received, self._chunk.index)

    def compute(self, micro_batch: int) -> None:
        new = self._chunk.new_keys
        keys = range(new.start) if micro_batch == 0 else new
        if self._rule.window is not None:
            # A window reaches over both and is masked tile by tile: all at once, when all are here.
            keys = range(0) if micro_batch == 0 else range(new.stop)
        if len(keys) and self._runs:
            num_kv_heads = self._kv_S2KH.shape[1] // 2
            kv = self._kv_S2KH[:, :num_kv_heads], self._kv_S2KH[:, num_kv_heads:]
            self._scores.attend(
                self._runs, self._q_TNH, keys, kv, self._layer, self._rule, self._add
            )

    def post_scatter(self, micro_batch: int) -> Pending | None:
        raise AssertionError("queries stay, so nothing returns")

    def returned(self, micro_batch: int, received: Tensor) -> None:
        raise AssertionError("queries stay, so nothing returns")

    def _add(self, rows: slice, out_TNH: Tensor, lse_TN: Tensor) -> None:
        sums = self.out_TNH[rows], self._lse_TN[rows]
        self.out_TNH[rows], self._lse_TN[rows] = merge_two(*sums, out_TNH, lse_TN)
