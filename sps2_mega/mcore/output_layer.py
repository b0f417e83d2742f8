"""Output layer whose weight may be read in slices of the vocabulary, one per SP rank.

As feed-forward layers (`feed_forward`), all SP ranks hold all of it. In a sliced step every rank
computes its slice for the sampled rows of all, and the columns travel to the rows' owners.

R rows of all ranks, T of this one, C hidden size, V vocabulary on this TP rank, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sps2_mega.comm.collectives import all_gather_rows, all_to_all_flat
from sps2_mega.mcore.feed_forward import share
from sps2_mega.mcore.packed_weights import PackedWeight, drop_values
from sps2_mega.parallel.groups import Group


class OutputLayer:
    """Product of hidden states with the output weight, whole or by slices."""

    def __init__(self, linear: nn.Module, shared: Tensor | None, group: Group) -> None:
        """`shared` is the embedding's weight where the model ties both; `group` the SP group."""
        self._linear, self._group = linear, group
        self._shared = shared
        self._packed: list[PackedWeight] | None = None

    def pack(self) -> None:
        """Pack the weight by slices, unless the embedding needs it as it is."""
        if self._shared is not None:
            return
        weight = self._weight()
        self._packed = [
            PackedWeight(weight[part.start : part.stop]) for part in self._slices(len(weight))
        ]
        drop_values(self._linear)

    def whole(self, hidden_TC: Tensor) -> Tensor:
        """Logits [T, V]; nothing is sent."""
        if self._packed is None:
            return F.linear(hidden_TC, self._weight())
        parts = [product(hidden_TC) for product in self._packed]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def sliced(self, hidden_TC: Tensor, counts: Sequence[int]) -> Tensor:
        """Logits [T, V] of this rank's rows; `counts` are the rows of each SP rank."""
        rank = self._group.rank
        slices = self._slices(len(self._weight()))
        rows_RC = all_gather_rows(hidden_TC, counts, self._group)
        if self._packed is None:
            part = F.linear(rows_RC, self._weight()[slices[rank].start : slices[rank].stop])
        else:
            part = self._packed[rank](rows_RC)
        send = [count * len(slices[rank]) for count in counts]
        receive = [counts[rank] * len(each) for each in slices]
        pieces = all_to_all_flat(part.reshape(-1), send, receive, self._group).split(receive)
        columns = [piece.view(counts[rank], -1) for piece in pieces if counts[rank]]
        return torch.cat(columns, -1) if columns else hidden_TC.new_empty(0, len(self._weight()))

    def _slices(self, size: int) -> list[range]:
        return [share(size, rank, self._group.size) for rank in range(self._group.size)]

    def _weight(self) -> Tensor:
        if self._shared is not None:
            return self._shared
        weight = self._linear.weight
        assert isinstance(weight, Tensor)
        return weight
