"""Prompts that go through the model together, pass by pass and layer by layer.

A pass is all layers for some tokens of each prompt: all of them, or, of a long prompt that goes alone, one chunk.
Decides nothing; which group goes on and how far is `prefill_queue`'s.

    group of short prompts    pass 7: layers 0-5 | decode | layers 5-12
    group of one long prompt  pass 8: chunk 0, layers 0-3 | decode | layers 3-6 | ...    pass 9: chunk 1, ...
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sps2_mega.engine.layer_work import LayerWork
from sps2_mega.types import PrefillItem, Sequence


@dataclass(slots=True, kw_only=True)
class PrefillGroup:
    """`members` were admitted together; some may have ended since. `quantum`: chunks are multiples of so many tokens;
    None: whole prompts. Between two passes `items` is empty, `next_layer` 0.

    `pass_id` is what ranks call the pass under way; `layer_s` are the seconds that one of its layers took last.
    """

    members: list[Sequence]
    quantum: int | None = None
    items: list[PrefillItem] = field(default_factory=list)
    pass_id: int = 0
    next_layer: int = 0
    layer_s: float | None = None

    @property
    def arrival_time(self) -> float:
        """The oldest member's."""
        return min(sequence.arrival_time for sequence in self.members)

    @property
    def seq_ids(self) -> list[int]:
        return [sequence.seq_id for sequence in self.members]

    def begin_pass(self, pass_id: int, items: list[PrefillItem]) -> None:
        assert not self.items, f"pass {self.pass_id} is under way"
        self.items, self.pass_id = items, pass_id
        self.next_layer, self.layer_s = 0, None

    def end_pass(self) -> None:
        self.items, self.next_layer = [], 0

    def layer_flops(self, work: LayerWork) -> int:
        """FLOPs of one layer of the pass under way."""
        return sum(work.flops(item.start, item.end) for item in self.items)
