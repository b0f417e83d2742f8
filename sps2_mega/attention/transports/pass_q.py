"""Transport `pass_q`: queries go to every rank, keys and values stay where they are, partials come
back.

It pays for few new tokens behind a long cached prefix. A micro-batch is one group of KV heads with
the queries of all ranks: what one group computes hides the way of the next queries and of the last
outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.pipeline.executor import Pipeline, plain_pipeline
from sps2_mega.attention.pipeline.parts import kv_head_groups
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.pipeline.settings import CPU_PART, CUDA_PART
from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.transports.partials import merge_partials, post_partials
from sps2_mega.comm.exchange import Pending, post_all_gather
from sps2_mega.kernels.attention.sdpa import attend, attend_run
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group

# The queries of one run (their rows among those of all ranks), and the local keys that they may
# see.
_RunWork = tuple[slice, Run, list[Run]]


class PassQ:
    """All-gather of Q and an exchange of partials; bytes sent per rank and layer: T * N * (2 * H *
    e + 4) * (P-1)/P."""

    def __init__(
        self,
        layout: PrefillLayout,
        group: Group,
        device: torch.device,
        pipeline: Pipeline | None = None,
    ) -> None:
        self._layout, self._group = layout, group
        self._pipeline = pipeline or plain_pipeline(device)
        keys = layout.keys.local_runs(group.rank)
        row = 0
        self._work: list[_RunWork] = []
        for rank in range(group.size):
            for queries in sorted(layout.queries.local_runs(rank), key=lambda run: run.local_start):
                rows = slice(row, row + queries.num_tokens)
                row = rows.stop
                # Runs never overlap but where they are the same, so later keys are invisible as a
                # whole.
                seen = [
                    run
                    for run in keys
                    if run.sequence == queries.sequence and run.start <= queries.start
                ]
                self._work.append((rows, queries, seen))

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: SoftmaxParams
    ) -> Tensor:
        head_groups = kv_head_groups(
            self._pipeline.settings,
            self._layout.queries,
            moved_rows=2 * sum(self._layout.queries.counts) * q_TNH.shape[1],
            num_heads=q_TNH.shape[1],
            num_kv_heads=k_CKH.shape[1],
            row_bytes=q_TNH.shape[2] * q_TNH.itemsize,
            head_dim=q_TNH.shape[2],
            window=rule.window,
            smallest=CUDA_PART if q_TNH.is_cuda else CPU_PART,
        )
        run = _LayerWork(
            self._work,
            self._layout.queries.counts,
            head_groups,
            (q_TNH, k_CKH, v_CKH),
            rule,
            self._group,
            self._pipeline.back or self._group,
        )
        overlap = int(self._pipeline.settings.mode != "off")
        stages = stage_order([("q",)] * len(head_groups), ahead=overlap, behind=overlap)
        self._pipeline.run(stages, run, layer)
        return run.out_TNH


class _LayerWork:
    """One layer's tensors on their way (`PipelineWork`); all of them stay until the layer is
    done."""

    def __init__(
        self,
        work: list[_RunWork],
        counts: tuple[int, ...],
        head_groups: list[range],
        qkv: tuple[Tensor, Tensor, Tensor],
        rule: SoftmaxParams,
        group: Group,
        back: Group,
    ) -> None:
        self._work, self._counts, self._head_groups = work, counts, head_groups
        self._q_TNH, self._k_CKH, self._v_CKH = qkv
        self._rule, self._group, self._back = rule, group, back
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
        longest = max(self._counts)
        if min(self._counts) < longest:
            shards = zip(received.split(longest), self._counts, strict=True)
            received = torch.cat([shard[:count] for shard, count in shards])
        self._queries[micro_batch] = received

    def compute(self, micro_batch: int) -> None:
        kv_heads = self._head_groups[micro_batch]
        key_heads = slice(kv_heads.start, kv_heads.stop)
        q_BnH = self._queries[micro_batch]
        out_BnH = torch.zeros(q_BnH.shape, dtype=torch.float32, device=q_BnH.device)
        lse_Bn = torch.full(q_BnH.shape[:2], -torch.inf, device=q_BnH.device)
        for rows, queries, seen in self._work:
            for local, run in _stretches(seen, queries, self._rule.window):
                k, v = self._k_CKH[local, key_heads], self._v_CKH[local, key_heads]
                if run is None:
                    partial = attend(q_BnH[rows], k, v, scale=self._rule.scale, causal=False)
                else:
                    partial = attend_run(
                        q_BnH[rows],
                        k,
                        v,
                        scale=self._rule.scale,
                        q_start=queries.start,
                        k_start=run.start,
                        window=self._rule.window,
                    )
                out_BnH[rows], lse_Bn[rows] = merge_two(out_BnH[rows], lse_Bn[rows], *partial)
        self._partials[micro_batch] = out_BnH.to(q_BnH.dtype), lse_Bn

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
    """Local keys in as few calls as possible: neighbouring rows of earlier runs are one rectangle,
    whose positions do not matter; with a window, and for the queries' own run, positions do (the
    run is then given)."""
    found: list[tuple[slice, Run | None]] = []
    for run in sorted(seen, key=lambda run: run.local_start):
        if window is not None or run.end > queries.start:
            found.append((run.local, run))
        elif found and found[-1][1] is None and found[-1][0].stop == run.local_start:
            found[-1] = (slice(found[-1][0].start, run.local.stop), None)
        else:
            found.append((run.local, None))
    return found
