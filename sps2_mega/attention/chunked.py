"""Attention of a prompt that goes through every layer chunk by chunk.

The keys of a layer are gathered once and stay until the layer is done:

    layer 3   chunk 0   gather keys of chunk 0, attend to them
              chunk 1   attend to the keys at hand while its own are in flight, then to its own
              ...
    layer 4   starts over and uses the same memory

So a chunk repeats nothing that earlier ones did, however short it is. Often only the last token's
output of the last layer is read. The other tokens then need keys and values there, but do not
attend. The price is one layer's keys and values of the whole prompt on every rank. The scheduler
decides which tokens a chunk has, `chunk_scores` what queries see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.attention.layout.chunk_layout import Stretch, stretch
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.layout.token_order import reorder, sequence_index
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.transports.partials import PartialSum
from sps2_mega.comm.exchange import Pending, post_all_gather, unpadded

if TYPE_CHECKING:
    from sps2_mega.attention.chunk_scores import ChunkScores
    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.parallel.groups import Group


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of one chunk. Its `keys` are the queries' own, in the first chunk also cached ones.

    `index` orders the keys from rank-major to sequence order.
    """

    queries: Stretch
    keys: Stretch
    index: Tensor | None

    @property
    def new_keys(self) -> range:
        return range(self.keys.tokens.first[0], self.keys.tokens.last[0])


class ChunkedPrefill:
    """Attention of one prompt, chunk by chunk.

    `begin` says which chunk the next layer call is about: in each layer from the first token on,
    without gaps. `cached_slots_C` are the cache slots of this rank's cached tokens.
    """

    def __init__(
        self,
        pool: KVPool,
        cached_slots_C: Tensor,
        layout: PrefillLayout,
        scores: ChunkScores,
        group: Group,
        pipeline: Pipeline,
        *,
        whole_output: bool = True,
    ) -> None:
        """Take what all chunks share.

        Args:
            pool: KV cache of this rank.
            cached_slots_C: Slots of this rank's tokens that were cached before the prompt began.
            layout: Tokens of the prompt, one sequence.
            scores: What queries see.
            group: SP group that keys are gathered over.
            pipeline: Runs the layers and counts their communication.
            whole_output: The last layer's output of all tokens is read, not only of the last one.
        """
        self._pool, self._cached_slots_C = pool, cached_slots_C
        self._layout, self._scores = layout, scores
        self._group, self._pipeline, self._whole_output = group, pipeline, whole_output
        self._chunk: _Chunk | None = None
        self._kv_S2KH: Tensor | None = None  # one layer's keys beside its values, by position

    def begin(self, start: int, end: int) -> slice:
        """Begin the chunk [start, end); return its rows among this rank's tokens of the prompt."""
        first = start == self._layout.queries.first[0]
        queries = stretch(self._layout.queries, start, end)
        keys = stretch(self._layout.keys, 0 if first else start, end)
        index = sequence_index(keys.tokens, self._cached_slots_C.device)
        self._chunk = _Chunk(queries, keys, index)
        return queries.rows(self._group.rank)

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        chunk = self._chunk
        assert chunk is not None, "no chunk was begun"
        kv_C2KH = torch.cat([k_TKH, v_TKH], 1)
        if chunk.keys.tokens.counts[self._group.rank] > len(kv_C2KH):
            pages = self._pool.layer(layer)
            cached = [p.flatten(0, 1).index_select(0, self._cached_slots_C) for p in pages]
            kv_C2KH = torch.cat([torch.cat(cached, 1), kv_C2KH])
        if self._kv_S2KH is None:
            self._kv_S2KH = kv_C2KH.new_empty(self._layout.keys.last[0], *kv_C2KH.shape[1:])
        runs = chunk.queries.tokens.local_runs(self._group.rank)
        needed = slice(0, len(q_TNH))
        if not self._whole_output and layer == self._pool.num_layers - 1:
            runs, needed = _last_token(runs, self._layout.queries.last[0])
        tensors = _ChunkLayer(
            chunk,
            runs,
            self._scores,
            q_TNH[needed],
            kv_C2KH,
            self._kv_S2KH,
            layer,
            softmax,
            self._group,
        )
        ahead = int(self._pipeline.settings.mode != "off")
        stages = stage_order([(), ("kv",)], ahead=ahead, returns=False)
        self._pipeline.run(stages, tensors, layer)
        if needed.stop - needed.start == len(q_TNH):
            return tensors.total.result()
        out_TNH = torch.zeros_like(q_TNH)
        out_TNH[needed] = tensors.total.result()
        return out_TNH


def _last_token(runs: list[Run], end: int) -> tuple[list[Run], slice]:
    """Find the last token of a prompt [.., end): a run of it alone at row 0, and its row in `runs`.

    Both are empty where it is not among the runs.
    """
    if not runs or runs[-1].end < end:
        return [], slice(0, 0)
    last = runs[-1]
    row = last.local.stop - 1
    return [Run(last.sequence, last.rank, end - 1, end, 0)], slice(row, row + 1)


class _ChunkLayer:
    """Tensors of one chunk in one layer (`PipelinedLayer`).

    Micro-batch 0 are the keys at hand, micro-batch 1 the ones in flight.
    """

    def __init__(
        self,
        chunk: _Chunk,
        runs: list[Run],
        scores: ChunkScores,
        q_TNH: Tensor,
        kv_C2KH: Tensor,
        kv_S2KH: Tensor,
        layer: int,
        softmax: SoftmaxParams,
        group: Group,
    ) -> None:
        """Take what the layer computes with.

        Args:
            chunk: The chunk, of which this rank sends its keys.
            runs: Runs of the queries, with rows of `q_TNH` as local numbers.
            scores: What queries see.
            q_TNH: Queries of this rank.
            kv_C2KH: This rank's keys beside its values.
            kv_S2KH: Keys beside values by position, with those of earlier chunks filled in.
            layer: Number of the layer, from 0.
            softmax: Scale and sliding window of the layer.
            group: SP group that keys are gathered over.
        """
        self._chunk, self._runs, self._scores, self._group = chunk, runs, scores, group
        self._q_TNH, self._kv_C2KH, self._kv_S2KH = q_TNH, kv_C2KH, kv_S2KH
        self._layer, self._softmax = layer, softmax
        self.total = PartialSum(q_TNH)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        longest = max(self._chunk.keys.tokens.counts)
        if self._group.size == 1 or longest == 0:
            self._store(self._kv_C2KH)
            return None
        return post_all_gather(self._kv_C2KH, longest, self._group)

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        self._store(unpadded(received, self._chunk.keys.tokens.counts))

    def compute(self, micro_batch: int) -> None:
        new = self._chunk.new_keys
        keys = range(new.start) if micro_batch == 0 else new
        if self._softmax.window is not None:
            # A window spans both and is masked tile by tile: one call, when all keys are here.
            keys = range(0) if micro_batch == 0 else range(new.stop)
        if len(keys) and self._runs:
            num_kv_heads = self._kv_S2KH.shape[1] // 2
            kv = self._kv_S2KH[:, :num_kv_heads], self._kv_S2KH[:, num_kv_heads:]
            self._scores.add_partials(
                self.total, self._runs, self._q_TNH, keys, kv, self._layer, self._softmax
            )

    def _store(self, kv_G2KH: Tensor) -> None:
        """Put the chunk's keys and values, in rank-major order, at their positions."""
        new = self._chunk.new_keys
        self._kv_S2KH[new.start : new.stop] = reorder(kv_G2KH, self._chunk.index)
