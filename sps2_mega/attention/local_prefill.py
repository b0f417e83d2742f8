"""Steps in which every prompt lies whole on one sp rank: each rank attends to its own ones, and
nothing moves.

Decides whether a step is one, and what of it is a rank's own; a rank then does what a job of one
rank would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sps2_mega.attention.layout.token_layout import PrefillLayout, Run, TokenLayout
from sps2_mega.attention.softmax_params import SoftmaxParams


@dataclass(frozen=True, slots=True)
class OwnPart:
    """`layout` has one rank and the sequences numbered `sequences` in the step's layout; it may
    have none."""

    layout: PrefillLayout
    sequences: tuple[int, ...]


def own_part(layout: PrefillLayout, rank: int) -> OwnPart | None:
    """What sp rank `rank` does alone; None where a prompt lies on several ranks, cached tokens
    included. All ranks get None, or none does."""
    holders: dict[int, int] = {}
    for run in layout.keys.runs:
        if holders.setdefault(run.sequence, run.rank) != run.rank:
            return None
    own = tuple(sorted(s for s, holder in holders.items() if holder == rank))
    keys = _only(layout.keys, own, rank)
    if layout.queries is layout.keys:
        return OwnPart(PrefillLayout(keys, keys), own)
    return OwnPart(PrefillLayout(_only(layout.queries, own, rank), keys), own)


class NoPrompts:
    """Attention of a rank that has no prompt in such a step."""

    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: SoftmaxParams
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
