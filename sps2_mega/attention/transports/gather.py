"""Transport `gather`: keys and values go to every rank at once, queries stay.

A micro-batch is one group of KV heads with all queries, so computing one group hides the exchange
of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.attention.layout.token_order import reorder, sequence_index
from sps2_mega.attention.pipeline.micro_batches import CPU_PART, CUDA_PART
from sps2_mega.attention.pipeline.parts import kv_head_groups
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.comm.exchange import Pending, post_all_gather, unpadded
from sps2_mega.kernels.attention.sdpa import attend_run

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import PrefillLayout
    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.parallel.groups import Group


class Gather:
    """All-gather of K and V; bytes sent per rank and layer: 2 * S * K * H * e * (P-1)/P."""

    def __init__(
        self, layout: PrefillLayout, group: Group, device: torch.device, pipeline: Pipeline
    ) -> None:
        self._layout, self._group, self._pipeline = layout, group, pipeline
        self._index = sequence_index(layout.keys, device)

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        head_groups = kv_head_groups(
            self._pipeline.settings,
            self._layout.queries,
            moved_rows=2 * sum(self._layout.keys.counts) * k_CKH.shape[1],
            num_heads=q_TNH.shape[1],
            num_kv_heads=k_CKH.shape[1],
            row_bytes=k_CKH.shape[2] * k_CKH.itemsize,
            head_dim=k_CKH.shape[2],
            window=softmax.window,
            smallest=CUDA_PART if q_TNH.is_cuda else CPU_PART,
        )
        tensors = _GatherLayer(
            self._layout, self._index, head_groups, (q_TNH, k_CKH, v_CKH), softmax, self._group
        )
        ahead = int(self._pipeline.settings.mode != "off")
        stages = stage_order([("k", "v")] * len(head_groups), ahead=ahead, returns=False)
        self._pipeline.run(stages, tensors, layer)
        return tensors.out_TNH


class _GatherLayer:
    """Tensors of one layer (`PipelinedLayer`), all kept until the layer is done."""

    def __init__(
        self,
        layout: PrefillLayout,
        index: Tensor | None,
        head_groups: list[range],
        qkv: tuple[Tensor, Tensor, Tensor],
        softmax: SoftmaxParams,
        group: Group,
    ) -> None:
        self._layout, self._index, self._group, self._softmax = layout, index, group, softmax
        self._q_TNH, k_CKH, v_CKH = qkv
        self._own = {"k": k_CKH, "v": v_CKH}
        self._head_groups = head_groups
        self._repeats = self._q_TNH.shape[1] // k_CKH.shape[1]
        self._keys: dict[tuple[int, str], Tensor] = {}
        self.out_TNH = torch.empty_like(self._q_TNH)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        heads = self._head_groups[micro_batch]
        x = self._own[part][:, heads.start : heads.stop]
        longest = max(self._layout.keys.counts)
        if self._group.size == 1 or longest == 0:
            self._keys[micro_batch, part] = reorder(x, self._index)
            return None
        return post_all_gather(x, longest, self._group)

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        rows = unpadded(received, self._layout.keys.counts)
        self._keys[micro_batch, part] = reorder(rows, self._index)

    def compute(self, micro_batch: int) -> None:
        kv_heads = self._head_groups[micro_batch]
        heads = slice(kv_heads.start * self._repeats, kv_heads.stop * self._repeats)
        k_SKH, v_SKH = self._keys[micro_batch, "k"], self._keys[micro_batch, "v"]
        seq_starts = self._layout.keys.seq_starts()
        for run in self._layout.queries.local_runs(self._group.rank):
            first = seq_starts[run.sequence]
            keys = slice(first, first + run.end)
            self.out_TNH[run.local, heads], _ = attend_run(
                self._q_TNH[run.local, heads],
                k_SKH[keys],
                v_SKH[keys],
                scale=self._softmax.scale,
                q_start=run.start,
                window=self._softmax.window,
            )
