"""Transport `ring`: keys and values go round, one rank further per step (pass-KV).

Source: arXiv 2310.01889.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.transports.partials import PartialSum
from sps2_mega.comm.exchange import Pending, post_shift
from sps2_mega.kernels.attention.sdpa import attend_run

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import PrefillLayout
    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.parallel.groups import Group


class Ring:
    """Pass-KV: the bytes of `Gather`, but at most two shards of keys are held at a time.

    The next shard is received while the present one is computed on. Micro-batch m is the shard
    that started m ranks away.
    """

    def __init__(
        self, layout: PrefillLayout, group: Group, device: torch.device, pipeline: Pipeline
    ) -> None:
        self._layout, self._group, self._pipeline = layout, group, pipeline
        inputs = [()] + [("kv",)] * (group.size - 1)
        # Without overlap a shard is passed on only after it has been computed on.
        overlap = pipeline.settings.mode != "off"
        self._stages = stage_order(inputs, ahead=int(overlap), relayed=overlap, returns=False)

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        kv_C2KH = torch.stack([k_CKH, v_CKH], 1)
        tensors = _RingLayer(self._layout, self._group, q_TNH, kv_C2KH, softmax)
        self._pipeline.run(self._stages, tensors, layer)
        return tensors.total.result()


class _RingLayer:
    """Queries of one layer and the shards of keys and values at hand (`PipelinedLayer`)."""

    def __init__(
        self,
        layout: PrefillLayout,
        group: Group,
        q_TNH: Tensor,
        kv_C2KH: Tensor,
        softmax: SoftmaxParams,
    ) -> None:
        self._layout, self._group, self._softmax = layout, group, softmax
        self._queries = layout.queries.local_runs(group.rank)
        self._q_TNH = q_TNH
        self._shards = {0: kv_C2KH}
        self.total = PartialSum(q_TNH)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        counts = self._layout.keys.counts
        rows = counts[self._source(micro_batch)]
        return post_shift(self._shards[micro_batch - 1], rows, self._group)

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        self._shards[micro_batch] = received

    def compute(self, micro_batch: int) -> None:
        kv_C2KH = self._shards[micro_batch]
        self._drop(micro_batch - 1)
        shard_runs = self._layout.keys.local_runs(self._source(micro_batch))
        for queries in self._queries:
            for keys in shard_runs:
                # Two runs overlap only where they are the same one, so keys that start later are
                # wholly invisible.
                if keys.sequence != queries.sequence or keys.start > queries.start:
                    continue
                shard = kv_C2KH[keys.local]
                partial = attend_run(
                    self._q_TNH[queries.local],
                    shard[:, 0],
                    shard[:, 1],
                    scale=self._softmax.scale,
                    q_start=queries.start,
                    k_start=keys.start,
                    window=self._softmax.window,
                )
                self.total.add(*partial, rows=queries.local)

    def _drop(self, micro_batch: int) -> None:
        """Release a shard that was computed on and passed on."""
        shard = self._shards.pop(micro_batch, None)
        if shard is not None and shard.is_cuda:
            # It belongs to the side stream, which must not reuse it before the computation is done.
            shard.record_stream(torch.cuda.current_stream())

    def _source(self, micro_batch: int) -> int:
        """Return the rank whose shard micro-batch `micro_batch` computes on."""
        return (self._group.rank - micro_batch) % self._group.size
