"""Transport `gather`: keys and values go to every rank at once, queries stay."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout
from sps2_mega.attention.order import reorder, sequence_index
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.comm.collectives import all_gather_rows
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.parallel.groups import Group


class Gather:
    """All-gather of K and V; bytes sent per rank and layer: 2 * S * K * H * e * (P-1)/P."""

    def __init__(self, layout: PrefillLayout, group: Group, device: torch.device) -> None:
        self._layout, self._group = layout, group
        self._index = sequence_index(layout.keys, device)
        self._runs = layout.queries.local_runs(group.rank)
        self._seq_starts = layout.keys.seq_starts()

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        k_SKH, v_SKH = (
            reorder(all_gather_rows(x, self._layout.keys.counts, self._group), self._index)
            for x in (k_CKH, v_CKH)
        )
        out_TNH = torch.empty_like(q_TNH)
        for run in self._runs:
            first = self._seq_starts[run.sequence]
            keys = slice(first, first + run.end)
            out_TNH[run.local], _ = attend_run(
                q_TNH[run.local],
                k_SKH[keys],
                v_SKH[keys],
                scale=rule.scale,
                q_start=run.start,
                window=rule.window,
            )
        return out_TNH
