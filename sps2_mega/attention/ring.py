"""Transport `ring`: keys and values go round, one rank further per step (pass-KV, arXiv 2310.01889)."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.comm.exchange import post_shift
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.lse.dispatch import merge_two
from sps2_mega.parallel.groups import Group


class Ring:
    """Pass-KV: as many bytes as `Gather`, but only two shards of keys are held at a time, and the next one
    comes in while the present one is computed on."""

    def __init__(self, layout: PrefillLayout, group: Group) -> None:
        self._layout, self._group = layout, group
        self._queries = layout.queries.local_runs(group.rank)
        self._keys = [layout.keys.local_runs(rank) for rank in range(group.size)]

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        size, me = self._group.size, self._group.rank
        # Partials of all steps add up in float32: rounding once per step would grow with the ring.
        out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float32, device=q_TNH.device)
        lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, device=q_TNH.device)
        kv_C2KH = torch.stack([k_CKH, v_CKH], 1)
        for step in range(size):
            source = (me - step) % size
            pending = None
            if step + 1 < size:
                pending = post_shift(
                    kv_C2KH, self._layout.keys.counts[(source - 1) % size], self._group
                )
            for queries in self._queries:
                rows = queries.local
                for keys in self._keys[source]:
                    # Runs never overlap but where they are the same, so later keys are invisible as a whole.
                    if keys.sequence != queries.sequence or keys.start > queries.start:
                        continue
                    shard = kv_C2KH[keys.local]
                    out, lse = attend_run(
                        q_TNH[rows],
                        shard[:, 0],
                        shard[:, 1],
                        scale=rule.scale,
                        q_start=queries.start,
                        k_start=keys.start,
                        window=rule.window,
                    )
                    out_TNH[rows], lse_TN[rows] = merge_two(out_TNH[rows], lse_TN[rows], out, lse)
            if pending is not None:
                kv_C2KH = pending.wait()
        return out_TNH.to(q_TNH.dtype)
