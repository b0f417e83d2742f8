"""Feed-forward layer whose weights may be read in slices, one per SP rank.

All SP ranks hold all of its weights. In a step with few rows the time of the layer is the time in
which its weights are read, so the ranks can share that work (as Helix, arXiv 2507.07120, does over
the ranks of an attention group): every rank gets the normalized rows of all, computes its slice of
the inner dimension, and the partial sums go back to the rows' owners. Otherwise each rank computes
its own rows (`owner`). The slices are views of the weights, or packed one by one; no weight is
held twice.

R rows of all ranks, T of this one, C hidden size, F inner size on this TP rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sps2_mega.comm.collectives import all_gather_rows, reduce_scatter_rows
from sps2_mega.mcore.packed_weights import PackedWeight, drop_values
from sps2_mega.parallel.groups import ParallelGroups

Product = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class StepRows:
    """Rows of the running step on each SP rank, where the step slices; shared by all layers."""

    by_rank: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class _Slice:
    """Products with a slice of the inner dimension; `bias` is the first one's."""

    up: Product
    bias: Tensor | None
    down: Product


def share(size: int, rank: int, ranks: int) -> range:
    """Part of a dimension that a rank computes in a sliced step; parts differ by one at most."""
    return range(size * rank // ranks, size * (rank + 1) // ranks)


def feed_forward_class() -> type:
    """Megatron's MLP with the forward pass of this module; parameters and names are Megatron's."""
    from megatron.core.transformer.mlp import MLP

    class SPFeedForward(MLP):  # type: ignore[misc]
        """MLP of all rows, or of this SP rank's slice for the rows of all."""

        def use(self, groups: ParallelGroups, rows: StepRows) -> None:
            """Name the groups and the step; called once, when the model is built."""
            self._groups, self._rows = groups, rows
            self._slices: list[_Slice] | None = None

        def pack(self) -> None:
            """Pack the weights by slices; the parameters keep their shapes without values."""
            ranks = self._groups.sp.size
            inner = self.linear_fc2.weight.shape[1]
            self._slices = [
                _slice(self, share(inner, rank, ranks), pack=True) for rank in range(ranks)
            ]
            drop_values(self.linear_fc1)
            drop_values(self.linear_fc2)

        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Any]:
            """(output [T, 1, C], bias of the second product, which the caller adds)."""
            sp, counts = self._groups.sp, self._rows.by_rank
            if counts is None:
                output = self._whole(hidden_states)
            else:
                own_TC = hidden_states[: counts[sp.rank], 0]
                rows_RC = all_gather_rows(own_TC, counts, sp)
                partial_RC = self._compute(rows_RC, self._own_slice())
                own_TC = reduce_scatter_rows(partial_RC, counts, sp)
                # A rank without rows has a placeholder, whose values nobody reads.
                output = own_TC[:, None] if len(own_TC) else torch.zeros_like(hidden_states)
            if self._groups.tp.size > 1:
                dist.all_reduce(output, group=self._groups.tp.handle)
            return output, self.linear_fc2.bias

        def _whole(self, x: Tensor) -> Tensor:
            if self._slices is None:
                inner = self.linear_fc2.weight.shape[1]
                return self._compute(x, _slice(self, range(inner), pack=False))
            first, *others = self._slices
            output = self._compute(x, first)
            if len(others) > 1:
                output = output.float()  # more than one rounding to 16 bits would add up
            for each in others:
                output += self._compute(x, each)
            return output.to(x.dtype)

        def _own_slice(self) -> _Slice:
            sp = self._groups.sp
            if self._slices is not None:
                return self._slices[sp.rank]
            inner = self.linear_fc2.weight.shape[1]
            return _slice(self, share(inner, sp.rank, sp.size), pack=False)

        def _compute(self, x: Tensor, part: _Slice) -> Tensor:
            inner = part.up(x)
            if part.bias is not None:
                inner = inner + part.bias
            return part.down(_activated(inner, self.config))

    return SPFeedForward


def _activated(x: Tensor, config: Any) -> Tensor:
    """Activation as Megatron's unfused MLP has it."""
    if not config.gated_linear_unit:
        activated: Tensor = config.activation_func(x)
        return activated
    gate, up = x.chunk(2, dim=-1)
    if config.activation_func_clamp_value is not None:
        limit = config.activation_func_clamp_value
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if config.glu_linear_offset:
        up = up + config.glu_linear_offset
    product: Tensor = config.activation_func(gate) * up
    return product


def _slice(mlp: Any, part: range, *, pack: bool) -> _Slice:
    """Products of an MLP with a part of its inner dimension."""
    first, second, bias = mlp.linear_fc1.weight, mlp.linear_fc2.weight, mlp.linear_fc1.bias
    inner = second.shape[1]
    whole = len(part) == inner
    # Rows of the gate come before those of the other half.
    begins = (0, inner) if mlp.config.gated_linear_unit else (0,)
    rows = [slice(begin + part.start, begin + part.stop) for begin in begins]

    def cut(x: Tensor) -> Tensor:
        return x if whole else torch.cat([x[each] for each in rows])

    bias = None if bias is None else cut(bias)
    columns = second[:, part.start : part.stop]
    if pack:
        return _Slice(PackedWeight(cut(first)), bias, PackedWeight(columns.contiguous()))
    if whole:
        return _Slice(lambda x: F.linear(x, first), bias, lambda x: F.linear(x, second))
    # Views: no copy of the weights is made.
    if len(rows) == 1:
        upper = first[rows[0]]
        return _Slice(lambda x: F.linear(x, upper), bias, lambda x: F.linear(x, columns))
    gate, upper = (first[each] for each in rows)
    return _Slice(
        lambda x: torch.cat([F.linear(x, gate), F.linear(x, upper)], -1),
        bias,
        lambda x: F.linear(x, columns),
    )
