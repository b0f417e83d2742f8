"""Prefill as a list of works: each SP level by its own transport, CSA or exact, and the exact tail by pass-Q.

    for each work   rows in -> attention over a compact buffer -> partials back      (`work_plan`)
    then            partials of all works are merged by LSE in float32

Pieces of work do not overlap, so their order does not matter for the result; what overlaps in time is decided by
the caller of `post`, `compute` and `merge`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.attention.layout import PrefillLayout
from sps2_mega.attention.pattern import CSAPattern
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.attention.work_plan import BackPlan, RowPlan, WorkPlan, WorkPlanner
from sps2_mega.attention.works import Work
from sps2_mega.comm.collectives import all_to_all_flat
from sps2_mega.kernels.csa.sdpa import attend_pieces
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group


class Leveled:
    """One step's prefill over sequences with one pattern each.

    `prompt_lens[s]` may be less than the sequence's length: what follows are its own earlier outputs, which see
    all keys as generated tokens do. `kv_heads` are this TP rank's, numbered over all ranks.
    """

    def __init__(
        self,
        layout: PrefillLayout,
        patterns: Sequence[CSAPattern],
        prompt_lens: Sequence[int],
        works: Sequence[Work],
        *,
        kv_heads: range,
        group: Group,
        device: torch.device,
    ) -> None:
        self._group = group
        self._planner = WorkPlanner(
            layout,
            patterns,
            [
                length if pattern.exact else max(0, length - pattern.tail)
                for pattern, length in zip(patterns, prompt_lens, strict=True)
            ],
            kv_heads=kv_heads,
            num_heads=works[0].num_heads,
            rank=group.rank,
            device=device,
        )
        self._works = [work for work in works if self._planner.needs(work)]
        self._period = math.lcm(*(d for pattern in patterns for d in pattern.degrees))
        self._plans: dict[tuple[Work, int], WorkPlan] = {}

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        assert rule.window is None, "works know no sliding window; it is refused at start-up"
        total = PartialSum(q_TNH)
        for work in self._works:
            plan = self.plan(work, layer)
            q_BnH, k_RkH, v_RkH = q_TNH, k_CKH, v_CKH
            if plan.keys is not None:
                both = torch.cat([k_CKH, v_CKH], -1)
                k_RkH, v_RkH = bring_rows(both, plan.keys, self._group).chunk(2, -1)
            if plan.queries is not None:
                q_BnH = bring_rows(q_TNH, plan.queries, self._group)
            partial = compute(plan, q_BnH, k_RkH, v_RkH, rule.scale)
            if plan.back is None:
                total.add(*partial)
            else:
                total.add_rows(plan.back.home, *send_back(plan.back, *partial, self._group))
        return total.result()

    def plan(self, work: Work, layer: int) -> WorkPlan:
        """The plan of a work in a layer; layers with the same remainder for each degree share it."""
        key = work, 0 if work.queries == "tail" else layer % self._period
        if key not in self._plans:
            self._plans[key] = self._planner.plan(*key)
        return self._plans[key]


class PartialSum:
    """Attention of this rank's queries [T, N, H] as partials come in, in float32."""

    def __init__(self, like_TNH: Tensor) -> None:
        self._dtype = like_TNH.dtype
        self._out_TNH = torch.zeros(like_TNH.shape, device=like_TNH.device)
        self._lse_TN = torch.full(like_TNH.shape[:2], -torch.inf, device=like_TNH.device)

    def add(self, out_TNH: Tensor, lse_TN: Tensor) -> None:
        """A partial of all queries and heads."""
        self._out_TNH, self._lse_TN = merge_two(self._out_TNH, self._lse_TN, out_TNH, lse_TN)

    def add_rows(self, rows: Sequence[Tensor], out_RH: Tensor, lse_R: Tensor) -> None:
        """Partials of single (token, head) rows, set after set; within a set no row occurs twice."""
        flat_out, flat_lse = self._out_TNH.flatten(0, 1), self._lse_TN.flatten()
        counts = [len(numbers) for numbers in rows]
        for numbers, out, lse in zip(rows, out_RH.split(counts), lse_R.split(counts), strict=True):
            if len(numbers):
                merged = merge_two(flat_out[numbers], flat_lse[numbers], out, lse)
                flat_out[numbers], flat_lse[numbers] = merged

    def result(self) -> Tensor:
        return self._out_TNH.to(self._dtype)


def bring_rows(x_TnW: Tensor, plan: RowPlan, group: Group) -> Tensor:
    """Rows of all ranks, local x [T, heads, W] of this one, as the plan's buffer [rows, heads, W]."""
    own = x_TnW.flatten(0, 1)
    width = x_TnW.shape[-1]
    received = all_to_all_flat(
        own.index_select(0, plan.send).flatten(),
        [count * width for count in plan.send_counts],
        [count * width for count in plan.receive_counts],
        group,
    ).view(-1, width)
    return torch.cat([own, received]).index_select(0, plan.gather).view(*plan.shape, width)


def compute(
    plan: WorkPlan, q_BnH: Tensor, k_RkH: Tensor, v_RkH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, n, H] in q's type and lse [B, n] of all blocks; what has no pieces is 0 and -inf."""
    out_BnH = torch.zeros_like(q_BnH, memory_format=torch.contiguous_format)
    lse_Bn = torch.full(q_BnH.shape[:2], -torch.inf, device=q_BnH.device)
    for block in plan.blocks:
        out_BnH[:, block.heads], lse_Bn[:, block.heads] = attend_pieces(
            q_BnH[:, block.heads],
            k_RkH[:, block.kv_heads],
            v_RkH[:, block.kv_heads],
            block.pieces,
            scale=scale,
        )
    return out_BnH, lse_Bn


def send_back(
    plan: BackPlan, out_BnH: Tensor, lse_Bn: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """Rows of the buffer to those that asked -> this rank's rows as (out [R, H], lse [R]), in the order of
    `plan.home`. Partials travel as bytes in one exchange: out in its own type and lse in float32."""
    out_RH = out_BnH.flatten(0, 1).index_select(0, plan.pick)
    lse_R = lse_Bn.flatten().index_select(0, plan.pick)
    packed = torch.cat([out_RH.view(torch.uint8), lse_R.unsqueeze(-1).view(torch.uint8)], -1)
    width = packed.shape[-1]
    received = all_to_all_flat(
        packed.flatten(),
        [count * width for count in plan.counts],
        [len(rows) * width for rows in plan.home],
        group,
    ).view(-1, width)
    out = received[:, :-4].contiguous().view(out_BnH.dtype)
    return out, received[:, -4:].contiguous().view(torch.float32).squeeze(-1)
