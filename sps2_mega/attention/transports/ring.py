"""Transport `ring`: keys and values go round, one rank further per step (pass-KV, arXiv
2310.01889)."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout.token_layout import PrefillLayout
from sps2_mega.attention.pipeline.executor import Pipeline, plain_pipeline
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.comm.exchange import Pending, post_shift
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group


class Ring:
    """Pass-KV: as many bytes as `Gather`, but only two shards of keys are held at a time, and the
    next one comes in while the present one is computed on. Micro-batch m is the shard that came m
    ranks far."""

    def __init__(
        self,
        layout: PrefillLayout,
        group: Group,
        device: torch.device,
        pipeline: Pipeline | None = None,
    ) -> None:
        self._layout, self._group = layout, group
        self._pipeline = pipeline or plain_pipeline(device)
        inputs = [()] + [("kv",)] * (group.size - 1)
        # Without overlap a shard is passed on only when it has been computed on.
        overlap = self._pipeline.settings.mode != "off"
        self._stages = stage_order(inputs, ahead=int(overlap), relayed=overlap, returns=False)

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: SoftmaxParams
    ) -> Tensor:
        work = _LayerWork(self._layout, self._group, q_TNH, torch.stack([k_CKH, v_CKH], 1), rule)
        self._pipeline.run(self._stages, work, layer)
        return work.out_TNH.to(q_TNH.dtype)


class _LayerWork:
    """One layer's queries, and the shards of keys and values that are here (`PipelineWork`)."""

    def __init__(
        self,
        layout: PrefillLayout,
        group: Group,
        q_TNH: Tensor,
        kv_C2KH: Tensor,
        rule: SoftmaxParams,
    ) -> None:
        self._layout, self._group, self._rule = layout, group, rule
        self._queries = layout.queries.local_runs(group.rank)
        self._q_TNH = q_TNH
        self._shards = {0: kv_C2KH}
        # Partials of all steps add up in float32: rounding once per step would grow with the ring.
        self.out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float32, device=q_TNH.device)
        self._lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, device=q_TNH.device)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        counts = self._layout.keys.counts
        rows = counts[self._source(micro_batch)]
        return post_shift(self._shards[micro_batch - 1], rows, self._group)

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        self._shards[micro_batch] = received

    def compute(self, micro_batch: int) -> None:
        kv_C2KH = self._shards[micro_batch]
        self._drop(micro_batch - 1)
        for queries in self._queries:
            rows = queries.local
            for keys in self._layout.keys.local_runs(self._source(micro_batch)):
                # Runs never overlap but where they are the same, so later keys are invisible as a
                # whole.
                if keys.sequence != queries.sequence or keys.start > queries.start:
                    continue
                shard = kv_C2KH[keys.local]
                out, lse = attend_run(
                    self._q_TNH[rows],
                    shard[:, 0],
                    shard[:, 1],
                    scale=self._rule.scale,
                    q_start=queries.start,
                    k_start=keys.start,
                    window=self._rule.window,
                )
                self.out_TNH[rows], self._lse_TN[rows] = merge_two(
                    self.out_TNH[rows], self._lse_TN[rows], out, lse
                )

    def post_scatter(self, micro_batch: int) -> Pending | None:
        raise AssertionError("queries stay, so nothing returns")

    def returned(self, micro_batch: int, received: Tensor) -> None:
        raise AssertionError("queries stay, so nothing returns")

    def _drop(self, micro_batch: int) -> None:
        """A shard that was computed on and has been passed on."""
        shard = self._shards.pop(micro_batch, None)
        if shard is not None and shard.is_cuda:
            # It belongs to the side stream, which must not reuse it before the computation is done.
            shard.record_stream(torch.cuda.current_stream())

    def _source(self, micro_batch: int) -> int:
        """The rank whose shard is computed on then."""
        return (self._group.rank - micro_batch) % self._group.size
