"""Local prefill: steps in which every prompt lies whole on one SP rank, so nothing moves.

Decides whether a step is local, and which part of it is a rank's own. The rank then attends as a
job of one rank would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from sps2_mega.attention.layout.token_layout import PrefillLayout, Run, TokenLayout

if TYPE_CHECKING:
    from sps2_mega.attention.transports.base import SoftmaxParams


@dataclass(frozen=True, slots=True)
class LocalPart:
    """One rank's part of a local step; it may have no sequences.

    `layout` has one rank, and `sequences` are the numbers of its sequences in the step's layout.
    """

    layout: PrefillLayout
    sequences: tuple[int, ...]


def local_part(layout: PrefillLayout, rank: int) -> LocalPart | None:
    """Return the part of SP rank `rank`, or None where a prompt lies on several ranks.

    Cached tokens count too. All ranks get None, or none does.
    """
    holders: dict[int, int] = {}
    for run in layout.keys.runs:
        if holders.setdefault(run.sequence, run.rank) != run.rank:
            return None
    own = tuple(sorted(s for s, holder in holders.items() if holder == rank))
    keys = _only(layout.keys, own, rank)
    if layout.queries is layout.keys:
        return LocalPart(PrefillLayout(keys, keys), own)
    return LocalPart(PrefillLayout(_only(layout.queries, own, rank), keys), own)


class NoPrompts:
    """Transport of a rank without a prompt in a local step."""

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        assert not len(q_TNH), f"{len(q_TNH)} tokens of no sequence"
        return q_TNH


def _only(layout: TokenLayout, sequences: Sequence[int], rank: int) -> TokenLayout:
    numbers = {sequence: number for number, sequence in enumerate(sequences)}
    runs: list[Run] = [
        replace(run, sequence=numbers[run.sequence], rank=0)
        for run in layout.runs
        if run.sequence in numbers
    ]
    return TokenLayout(
        tuple(layout.first[s] for s in sequences),
        tuple(layout.last[s] for s in sequences),
        (layout.counts[rank],),
        tuple(runs),
    )
