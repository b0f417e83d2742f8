"""Contract of transports: ways to bring queries and keys together in prefill.

    Gather    keys and values go to every rank at once, queries stay
    Ring      keys and values go round, one rank further per step (pass-KV, arXiv 2310.01889)
    PassQ     queries go to every rank at once, keys and values stay
    Ulysses   heads are dealt to ranks by all-to-all, each rank sees every token (arXiv 2309.14509)

All give the result of one rank. `attention.build` makes a transport per step from the layout, so
indices are computed once and not in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SoftmaxParams:
    """Per-layer softmax scale and sliding window; scores are `scale * q @ k`.

    With a window of w, a query sees itself and the w - 1 tokens before it; None is no window.
    """

    scale: float
    window: int | None = None


class Transport(Protocol):
    """Attention of one prefill step over the tokens of all SP ranks."""

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        """Attend causally with this rank's queries over the keys of all ranks -> [T, N, H].

        Rows are in the rank's local order; C = T where nothing was cached before.
        """
        ...
