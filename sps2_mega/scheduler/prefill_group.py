"""Prompts that run through the model together, layer by layer; a long one alone and in chunks.

    group of short prompts    pass 7: layers 0-5 | decode | layers 5-12
    group of one long prompt  pass 8: layer 0, tokens 0-800 | decode | its tokens 800-1200, layer 1,
        tokens 0-400 | ...

Decides nothing; `prefill_queue` chooses which group goes on, and how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sps2_mega import types
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.types import LayerSlice, PrefillItem


@dataclass(slots=True, kw_only=True)
class PrefillGroup:
    """Sequences that were admitted together; some may have ended since.

    `cuts` are positions, the last one the end, at which the layers of its only prompt may be cut;
    None: nowhere. `items` is empty until its pass begins.

    Ranks know the pass as `pass_id`. It stands in `next_layer`, before token `next_token` (0: at
    the layer's beginning); `layer_s` are the seconds that one of its layers took last.
    """

    members: list[types.Sequence]
    cuts: Sequence[int] | None = None
    items: list[PrefillItem] = field(default_factory=list)
    pass_id: int = 0
    next_layer: int = 0
    next_token: int = 0
    layer_s: float | None = None

    @property
    def arrival_time(self) -> float:
        """Arrival of the oldest member."""
        return min(sequence.arrival_time for sequence in self.members)

    @property
    def seq_ids(self) -> list[int]:
        return [sequence.seq_id for sequence in self.members]

    @property
    def is_under_way(self) -> bool:
        """Whether a slice of the pass has been planned."""
        return self.next_layer > 0 or self.next_token > 0

    def begin_pass(self, pass_id: int, items: list[PrefillItem]) -> None:
        """Set the items of the pass, which has no slice yet."""
        assert not self.items, f"pass {self.pass_id} is under way"
        self.items, self.pass_id = items, pass_id

    def slice_to(self, layer: int, token: int = 0) -> LayerSlice:
        """Slice from where the pass stands, without sequences to sample."""
        return LayerSlice(
            self.pass_id,
            self.next_layer,
            layer,
            chunked=self.cuts is not None,
            first_token=self.next_token,
            end_token=token,
        )

    def flops(self, layer_flops: LayerFlops) -> int:
        """FLOPs of one layer of the pass."""
        return sum(layer_flops.flops(item.start, item.end) for item in self.items)
