"""`--transport auto`: the transport of each prefill step, from its layout and the machine's numbers.

Every rank decides for itself and alike: the layout follows from the plan, the numbers were agreed at the start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from sps2_mega.attention.layout import PrefillLayout
from sps2_mega.attention.planner import choose
from sps2_mega.attention.step_shape import StepShape, step_shape
from sps2_mega.parallel.machine import Machine

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class PrefillPlanner:
    """Chooses among `candidates`; with `log_choices` (one rank) each kind of step is logged once.

    Heads are those of one TP rank, `itemsize` is the bytes of a number of q, k and v.
    """

    machine: Machine
    candidates: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    window: int | None
    log_choices: bool
    _logged: set[tuple[str, int, int]] = field(default_factory=set)

    def transport(self, layout: PrefillLayout) -> str:
        """The transport of a step laid out so."""
        shape = step_shape(
            layout,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            itemsize=self.itemsize,
            window=self.window,
        )
        chosen = choose(shape, self.machine, self.candidates)
        kind = (chosen.transport, *_size_class(shape))
        if self.log_choices and kind not in self._logged:
            self._logged.add(kind)
            log.info(
                "prefill of %d new tokens behind %d cached ones: transport %s, %s",
                sum(shape.queries),
                sum(shape.keys) - sum(shape.queries),
                chosen.transport,
                chosen.reason,
            )
        return chosen.transport


def _size_class(shape: StepShape) -> tuple[int, int]:
    """(power of two of the new tokens, quarter of the cached share)."""
    return sum(shape.queries).bit_length(), int(shape.cached_share * 4)
