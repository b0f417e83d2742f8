"""Prefill as a list of exchanges: each SP level by its own transport, CSA or exact.

    for each exchange   receive rows -> attend over a compact buffer -> return partials     (`plan`)
    then                partials of all exchanges merge by LSE in float32

The exact tail uses pass-Q. Exchanges are the micro-batches of the pipeline. The one that needs
nothing from others is computed first, while the rest is in flight; then the ones whose results
travel, and last the ones that only take keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.attention.csa.pattern import CSAPattern, tail_starts
from sps2_mega.attention.levels.exchanges import Exchange, prefill_exchanges
from sps2_mega.attention.levels.kv_parts import num_kv_parts
from sps2_mega.attention.levels.plan import ExchangePlan, ExchangePlans, RowPlan
from sps2_mega.attention.pipeline.micro_batches import CPU_PART, CUDA_PART
from sps2_mega.attention.pipeline.schedule import stage_order
from sps2_mega.attention.transports.partials import PartialSum
from sps2_mega.comm.exchange import Pending, post_all_to_all
from sps2_mega.kernels.csa.dispatch import attend_pieces

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import PrefillLayout
    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.parallel.groups import Group


class HierarchicalTransport:
    """Transport of one step over sequences with one pattern each."""

    def __init__(
        self,
        layout: PrefillLayout,
        patterns: Sequence[CSAPattern],
        prompt_lens: Sequence[int],
        transports: Sequence[str],
        sp_levels: Sequence[int],
        *,
        kv_heads: range,
        group: Group,
        device: torch.device,
        pipeline: Pipeline,
    ) -> None:
        """Take what all layers share.

        Args:
            layout: Tokens of the step.
            patterns: CSA pattern of each sequence.
            prompt_lens: Prompt tokens of each sequence. Tokens that follow are earlier outputs of
                the sequence, which see all keys as generated tokens do.
            transports: One transport per SP level, innermost first, or one for all.
            sp_levels: Ring size of each SP level, innermost first.
            kv_heads: KV heads of this TP rank, numbered over all ranks.
            group: SP group.
            device: Device of the indices.
            pipeline: Runs the layers and counts their communication.
        """
        self._group, self._layout, self._patterns = group, layout, patterns
        self._transports, self._sp_levels = transports, sp_levels
        self._kv_heads, self._device = kv_heads, device
        self._pipeline = pipeline
        self._tail_starts = tail_starts(patterns, prompt_lens)
        self._period = math.lcm(*(d for pattern in patterns for d in pattern.degrees))
        self._plans: dict[tuple[Exchange, int], ExchangePlan] = {}
        self._exchange_plans: ExchangePlans | None = None
        self._exchanges: list[Exchange] = []

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        assert softmax.window is None, "no sliding window here; start-up refuses it"
        if self._exchange_plans is None:
            self._prepare(q_TNH)
        tensors = _HierarchicalLayer(
            [self._plan(exchange, layer) for exchange in self._exchanges],
            (q_TNH, k_CKH, v_CKH),
            softmax.scale,
            self._group,
            self._pipeline.back or self._group,
        )
        # All exchanges at once: the outer levels are needed last and take longest. Memory is
        # planned for the keys of all tokens, of which they hold a d-th.
        window = len(self._exchanges) if self._pipeline.settings.mode != "off" else 0
        inputs = [exchange.inputs for exchange in self._exchanges]
        stages = stage_order(inputs, ahead=window, behind=window)
        self._pipeline.run(stages, tensors, layer)
        return tensors.total.result()

    def _prepare(self, q_TNH: Tensor) -> None:
        """Plan from the number and width of heads, which the first layer shows."""
        num_heads, width = q_TNH.shape[1:]
        self._exchange_plans = ExchangePlans(
            self._layout,
            self._patterns,
            self._tail_starts,
            kv_heads=self._kv_heads,
            num_heads=num_heads,
            rank=self._group.rank,
            device=self._device,
        )
        parts = num_kv_parts(
            self._layout,
            self._patterns,
            self._pipeline.settings,
            num_heads=num_heads,
            num_kv_heads=len(self._kv_heads),
            row_bytes=width * q_TNH.itemsize,
            head_dim=width,
            smallest=CUDA_PART if q_TNH.is_cuda else CPU_PART,
        )
        exchanges = prefill_exchanges(
            self._transports,
            self._sp_levels,
            num_heads=num_heads,
            num_kv_heads=len(self._kv_heads),
            kv_parts=parts,
        )
        self._exchanges = [one for one in exchanges if self._exchange_plans.needs(one)]

    def _plan(self, exchange: Exchange, layer: int) -> ExchangePlan:
        """Plan an exchange; layers with the same remainder for each degree share the plan."""
        assert self._exchange_plans is not None
        key = exchange, 0 if exchange.queries == "tail" else layer % self._period
        if key not in self._plans:
            self._plans[key] = self._exchange_plans.plan(*key)
        return self._plans[key]


class _HierarchicalLayer:
    """Tensors of one layer (`ReturningLayer`); a micro-batch is an exchange."""

    def __init__(
        self,
        plans: Sequence[ExchangePlan],
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        group: Group,
        back: Group,
    ) -> None:
        self._plans, self._scale = plans, scale
        self._q_TNH, self._k_CKH, self._v_CKH = qkv
        self._group, self._back = group, back
        self._kv_CKW: Tensor | None = None
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._partials: dict[int, tuple[Tensor, Tensor]] = {}
        self.total = PartialSum(self._q_TNH)

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        x_TnW, plan = self._moved(micro_batch, part)
        width = x_TnW.shape[-1]
        return post_all_to_all(
            x_TnW.flatten(0, 1).index_select(0, plan.send).flatten(),
            [count * width for count in plan.send_counts],
            [count * width for count in plan.receive_counts],
            self._group,
        )

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        x_TnW, plan = self._moved(micro_batch, part)
        width = x_TnW.shape[-1]
        rows = x_TnW.flatten(0, 1)
        if len(received):
            rows = torch.cat([rows, received.view(-1, width)])
        buffer = rows.index_select(0, plan.gather).view(*plan.shape, width)
        if part == "q":
            self._queries[micro_batch] = buffer
        else:
            k_RkH, v_RkH = buffer.chunk(2, -1)
            self._keys[micro_batch] = k_RkH, v_RkH

    def compute(self, micro_batch: int) -> None:
        plan = self._plans[micro_batch]
        if plan.keys is not None and micro_batch not in self._keys:
            self.arrived(micro_batch, "kv", self._k_CKH.new_empty(0))
        q_BnH = self._queries.pop(micro_batch, self._q_TNH)
        k_RkH, v_RkH = self._keys.pop(micro_batch, (self._k_CKH, self._v_CKH))
        out_BnH = torch.zeros(q_BnH.shape, dtype=q_BnH.dtype, device=q_BnH.device)
        lse_Bn = torch.full(q_BnH.shape[:2], -torch.inf, device=q_BnH.device)
        for block in plan.blocks:
            out_BnH[:, block.heads], lse_Bn[:, block.heads] = attend_pieces(
                q_BnH[:, block.heads],
                k_RkH[:, block.kv_heads],
                v_RkH[:, block.kv_heads],
                block.pieces,
                scale=self._scale,
            )
        if plan.back is not None:
            self._partials[micro_batch] = out_BnH, lse_Bn
        else:
            for block in plan.blocks:
                self.total.add(out_BnH[:, block.heads], lse_Bn[:, block.heads], heads=block.heads)

    def post_scatter(self, micro_batch: int) -> Pending | None:
        # Partials travel as bytes in one exchange: out in its own type and lse in float32.
        plan = self._plans[micro_batch].back
        if plan is None:
            return None
        out_BnH, lse_Bn = self._partials.pop(micro_batch)
        out_RH = out_BnH.flatten(0, 1).index_select(0, plan.pick)
        lse_R1 = lse_Bn.flatten().index_select(0, plan.pick).unsqueeze(-1)
        packed = torch.cat([out_RH.view(torch.uint8), lse_R1.view(torch.uint8)], -1)
        width = packed.shape[-1]
        return post_all_to_all(
            packed.flatten(),
            [count * width for count in plan.counts],
            [len(rows) * width for rows in plan.owned],
            self._back,
        )

    def returned(self, micro_batch: int, received: Tensor) -> None:
        plan = self._plans[micro_batch].back
        assert plan is not None
        width = self._q_TNH.shape[-1] * self._q_TNH.itemsize + 4
        packed = received.view(-1, width)
        out_RH = packed[:, :-4].contiguous().view(self._q_TNH.dtype)
        lse_R = packed[:, -4:].contiguous().view(torch.float32).squeeze(-1)
        self.total.add_single_rows(plan.owned, out_RH, lse_R)

    def _moved(self, micro_batch: int, part: str) -> tuple[Tensor, RowPlan]:
        """Return the local rows that a part takes from, and its plan."""
        plan = self._plans[micro_batch]
        if part == "q":
            assert plan.queries is not None
            return self._q_TNH, plan.queries
        assert plan.keys is not None
        if self._kv_CKW is None:
            self._kv_CKW = torch.cat([self._k_CKH, self._v_CKH], -1)
        return self._kv_CKW, plan.keys
