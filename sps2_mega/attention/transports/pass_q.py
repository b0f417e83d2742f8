"""Transport `pass_q`: queries go to every rank, keys and values stay, partials come back.

It pays for few new tokens behind a long cached prefix. A micro-batch is one group of KV heads with
the queries of all ranks, so computing one group hides the exchange of the next queries and of the
last outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.attention.pipeline.micro_batches import CPU_PART, CUDA_PART
from sps2_mega.attention.pipeline.parts import kv_head_groups
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.transports.partials import PartialSum, merge_partials, post_partials
from sps2_mega.comm.exchange import Pending, post_all_gather, unpadded
from sps2_mega.kernels.attention.sdpa import attend_dense, attend_run

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.parallel.groups import Group


@dataclass(frozen=True, slots=True)
class _QueryRun:
    """One run of queries, its rows among those of all ranks, and the local keys it may see."""

    rows: slice
    queries: Run
    seen: list[Run]


class PassQ:
    """All-gather of Q and an exchange of partials.

    Bytes sent per rank and layer: T * N * (2 * H * e + 4) * (P-1)/P.
    """

    def __init__(
        self, layout: PrefillLayout, group: Group, device: torch.device, pipeline: Pipeline
    ) -> None:
        self._layout, self._group, self._pipeline = layout, group, pipeline
        keys = layout.keys.local_runs(group.rank)
        row = 0
        self._runs: list[_QueryRun] = []
        for rank in range(group.size):
            for queries in sorted(layout.queries.local_runs(rank), key=lambda run: run.local_start):
                rows = slice(row, row + queries.num_tokens)
                row = rows.stop
                # Two runs overlap only where they are the same one, so keys that start later are
                # wholly invisible.
                seen = [
                    run
                    for run in keys
                    if run.sequence == queries.sequence and run.start <= queries.start
                ]
                self._runs.append(_QueryRun(rows, queries, seen))

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        head_groups = kv_head_groups(
            self._pipeline.settings,
            self._layout.queries,
            moved_rows=2 * sum(self._layout.queries.counts) * q_TNH.shape[1],
            num_heads=q_TNH.shape[1],
            num_kv_heads=k_CKH.shape[1],
            row_bytes=q_TNH.shape[2] * q_TNH.itemsize,
            head_dim=q_TNH.shape[2],
            window=softmax.window,
            smallest=CUDA_PART if q_TNH.is_cuda else CPU_PART,
        )
        tensors = _PassQLayer(
            self._runs,
            self._layout.queries.counts,
            head_groups,
            (q_TNH, k_CKH, v_CKH),
            softmax,
            self._group,
            self._pipeline.back or self._group,
        )
        overlap = int(self._pipeline.settings.mode != "off")
        stages = stage_order([("q",)] * len(head_groups), ahead=overlap, behind=overlap)
        self._pipeline.run(stages, tensors, layer)
        return tensors.out_TNH


class _PassQLayer:
    """Tensors of one layer (`ReturningLayer`), all kept until the layer is done."""

    def __init__(
        self,
        runs: list[_QueryRun],
        counts: tuple[int, ...],
        head_groups: list[range],
        qkv: tuple[Tensor, Tensor, Tensor],
        softmax: SoftmaxParams,
        group: Group,
        back: Group,
    ) -> None:
        """Take what the layer computes with.

        Args:
            runs: Runs of the queries of all ranks, in rank-major order.
            counts: Query tokens of each SP rank.
            head_groups: KV heads of each micro-batch.
            qkv: This rank's Q [T, N, H], K and V [C, K, H].
            softmax: Scale and sliding window of the layer.
            group: SP group that queries travel over.
            back: Group of the same ranks that partials travel back over.
        """
        self._runs, self._counts, self._head_groups = runs, counts, head_groups
        self._q_TNH, self._k_CKH, self._v_CKH = qkv
        self._softmax, self._group, self._back = softmax, group, back
        self._repeats = self._q_TNH.shape[1] // self._k_CKH.shape[1]
        self._queries: dict[int, Tensor] = {}
        self._partials: dict[int, tuple[Tensor, Tensor]] = {}
        self.out_TNH = torch.empty_like(self._q_TNH)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        x = self._q_TNH[:, self._heads(micro_batch)]
        if self._group.size == 1 or not any(self._counts):
            self._queries[micro_batch] = x
            return None
        return post_all_gather(x, max(self._counts), self._group)

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        self._queries[micro_batch] = unpadded(received, self._counts)

    def compute(self, micro_batch: int) -> None:
        kv_heads = self._head_groups[micro_batch]
        key_heads = slice(kv_heads.start, kv_heads.stop)
        q_BnH = self._queries[micro_batch]
        total = PartialSum(q_BnH)
        for run in self._runs:
            for local, keys in _stretches(run.seen, run.queries, self._softmax.window):
                q = q_BnH[run.rows]
                k, v = self._k_CKH[local, key_heads], self._v_CKH[local, key_heads]
                if keys is None:
                    partial = attend_dense(q, k, v, scale=self._softmax.scale, causal=False)
                else:
                    partial = attend_run(
                        q,
                        k,
                        v,
                        scale=self._softmax.scale,
                        q_start=run.queries.start,
                        k_start=keys.start,
                        window=self._softmax.window,
                    )
                total.add(*partial, rows=run.rows)
        self._partials[micro_batch] = total.partial()

    def post_scatter(self, micro_batch: int) -> Pending | None:
        out_BnH, lse_Bn = self._partials[micro_batch]
        if self._group.size == 1 or not any(self._counts):
            self.out_TNH[:, self._heads(micro_batch)] = out_BnH
            return None
        return post_partials(out_BnH, lse_Bn, self._counts, self._back)

    def returned(self, micro_batch: int, received: Tensor) -> None:
        like = self._partials[micro_batch][0]
        self.out_TNH[:, self._heads(micro_batch)] = merge_partials(received, like, self._group)

    def _heads(self, micro_batch: int) -> slice:
        kv_heads = self._head_groups[micro_batch]
        return slice(kv_heads.start * self._repeats, kv_heads.stop * self._repeats)


def _stretches(seen: list[Run], queries: Run, window: int | None) -> list[tuple[slice, Run | None]]:
    """Join local keys so that few calls cover them: (rows, run whose positions matter or None).

    Neighbouring rows of earlier runs are one rectangle, in which positions do not matter. They
    matter with a window, and for the run of the queries themselves.
    """
    found: list[tuple[slice, Run | None]] = []
    for run in sorted(seen, key=lambda run: run.local_start):
        if window is not None or run.end > queries.start:
            found.append((run.local, run))
        elif found and found[-1][1] is None and found[-1][0].stop == run.local_start:
            found[-1] = (slice(found[-1][0].start, run.local.stop), None)
        else:
            found.append((run.local, None))
    return found
