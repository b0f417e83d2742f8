"""What a layer does with its new queries, keys and values before it attends: rotate them, and keep
k and v.

Megatron's layers rotate on their own, or leave it to the step's attention (`mcore.gpt` decides),
which then does it in the same pass over k that writes the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sps2_mega.kernels.paged_kv.dispatch import append
from sps2_mega.kernels.rotary_append.dispatch import rotate_and_append


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of a step's tokens, in the type of the heads: pair r of a head is its elements r
    and R + r."""

    cos_TR: Tensor
    sin_TR: Tensor

    def rows(self, part: slice) -> Rotation:
        """Those of some of the tokens."""
        return Rotation(self.cos_TR[part], self.sin_TR[part])


def keep(
    cache: tuple[Tensor, Tensor],
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    slots_T: Tensor,
    rotation: Rotation | None,
) -> None:
    """Writes k and v to their slots of `cache` (keys, values of a layer); with `rotation` q and k
    are rotated first, in place."""
    if rotation is None:
        append(*cache, k_TKH, v_TKH, slots_T)
        return
    rotate_and_append(
        q_TNH, k_TKH, v_TKH, *cache, slots_T, cos_TR=rotation.cos_TR, sin_TR=rotation.sin_TR
    )
