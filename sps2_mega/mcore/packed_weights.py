"""Weights of linear layers in the order in which the CPU's matrix products read them.

A product of few rows takes as long as its weight takes to be read, and oneDNN reads a weight that
it has packed (in blocks of its registers' width) up to three times as fast as a row-major one. The
packed form replaces the weight: nothing is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN chooses blocks for a number of rows. Those for 16 were as fast as any, or faster, from 1 to
# 2048 rows.
_ROWS = 16
# Fewer rows take longer than four do: oneDNN's kernels for packed weights work on several at once.
_FEWEST_ROWS = 4


class PackedWeight:
    """A packed weight [outputs, inputs] and its product with rows."""

    def __init__(self, weight: Tensor) -> None:
        self._outputs = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def __call__(
        self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Product [.., outputs] of `input` [.., inputs], as Megatron's linear layers ask for it.

        `weight` is ignored: it is the layer's parameter, which keeps no values.
        """
        rows = input.reshape(-1, input.shape[-1])
        shape = (*input.shape[:-1], self._outputs)
        if not len(rows):
            return input.new_empty(shape)
        if len(rows) < _FEWEST_ROWS:
            rows = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - len(rows)))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows.contiguous(), self._packed, bias, "none", [], ""
        )
        return product[: math.prod(shape[:-1])].view(shape)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN packs weights of this type on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@torch.inference_mode()
def pack_weights(decoder: nn.Module) -> None:
    """Pack the weights of all linear layers that are not packed yet.

    The parameters keep their names and shapes, without values (on the meta device).
    """
    for linear in _linear_layers(decoder):
        weight = linear.weight
        if weight.is_meta:
            continue
        # The method that multiplies, of both of Megatron's linear layers.
        linear._forward_impl = PackedWeight(weight.detach())
        drop_values(linear)


def drop_values(linear: Any) -> None:
    """Leave name and shape of a layer's weight, which is packed now, and free its values."""
    empty = torch.empty_like(linear.weight, device="meta")
    linear.weight = nn.Parameter(empty, requires_grad=False)


def _linear_layers(decoder: nn.Module) -> Iterator[Any]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for module in decoder.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            yield module
