"""Transport `pass_q`: queries go to every rank, keys and values stay where they are, partials come back.

It pays for few new tokens behind a long cached prefix: what travels does not depend on the number of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout, Run
from sps2_mega.attention.partials import bring_home
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.comm.collectives import all_gather_rows
from sps2_mega.kernels.attention.sdpa import attend, attend_run
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group


class PassQ:
    """Bytes sent per rank and layer: T * N * (2 * H * e + 4) * (P-1)/P, whatever the number of keys."""

    def __init__(self, layout: PrefillLayout, group: Group) -> None:
        self._layout, self._group = layout, group
        keys = layout.keys.local_runs(group.rank)
        row = 0
        self._work: list[tuple[slice, Run, list[Run]]] = []
        for rank in range(group.size):
            for queries in sorted(layout.queries.local_runs(rank), key=lambda run: run.local_start):
                rows = slice(row, row + queries.num_tokens)
                row = rows.stop
                # Runs never overlap but where they are the same, so later keys are invisible as a whole.
                seen = [
                    run
                    for run in keys
                    if run.sequence == queries.sequence and run.start <= queries.start
                ]
                self._work.append((rows, queries, seen))

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        q_BNH = all_gather_rows(q_TNH, self._layout.queries.counts, self._group)
        out_BNH = torch.zeros(q_BNH.shape, dtype=torch.float32, device=q_BNH.device)
        lse_BN = torch.full(q_BNH.shape[:2], -torch.inf, device=q_BNH.device)
        for rows, queries, seen in self._work:
            for local, run in _stretches(seen, queries, rule.window):
                if run is None:
                    partial = attend(
                        q_BNH[rows], k_CKH[local], v_CKH[local], scale=rule.scale, causal=False
                    )
                else:
                    partial = attend_run(
                        q_BNH[rows],
                        k_CKH[local],
                        v_CKH[local],
                        scale=rule.scale,
                        q_start=queries.start,
                        k_start=run.start,
                        window=rule.window,
                    )
                out_BNH[rows], lse_BN[rows] = merge_two(out_BNH[rows], lse_BN[rows], *partial)
        return bring_home(out_BNH.to(q_TNH.dtype), lse_BN, self._layout.queries.counts, self._group)


def _stretches(seen: list[Run], queries: Run, window: int | None) -> list[tuple[slice, Run | None]]:
    """Local keys in as few calls as possible: neighbouring rows of earlier runs are one rectangle, whose positions
    do not matter; with a window, and for the queries' own run, positions do (the run is then given)."""
    found: list[tuple[slice, Run | None]] = []
    for run in sorted(seen, key=lambda run: run.local_start):
        if window is not None or run.end > queries.start:
            found.append((run.local, run))
        elif found and found[-1][1] is None and found[-1][0].stop == run.local_start:
            found[-1] = (slice(found[-1][0].start, run.local.stop), None)
        else:
            found.append((run.local, None))
    return found
