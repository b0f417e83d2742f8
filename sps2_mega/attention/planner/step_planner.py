"""`--transport auto`: transports of each prefill step, from its layout and the measured machine.

Every rank decides for itself and alike: the layout follows from the plan, and all ranks agreed on
the machine's numbers at start-up.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from sps2_mega.attention.csa.pattern import CSAPattern, tail_starts
from sps2_mega.attention.layout.token_layout import PrefillLayout
from sps2_mega.attention.levels.kv_parts import num_kv_parts
from sps2_mega.attention.pipeline.micro_batches import CPU_PART, CUDA_PART
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner.by_level import choose_levels
from sps2_mega.attention.planner.exact import choose
from sps2_mega.attention.planner.step_shape import step_shape
from sps2_mega.attention.planner.visible_rows import visible_between
from sps2_mega.parallel.machine import Machine

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class PrefillPlanner:
    """Choice of a step's transport among `candidates`.

    Heads are those of one TP rank, `itemsize` is the bytes of a number of q, k and v. With
    `log_choices` (one rank) each kind of step is logged once.
    """

    machine: Machine
    candidates: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    window: int | None
    overlap: bool
    log_choices: bool
    _logged: set[tuple[str, int, int]] = field(default_factory=set)

    def transport(self, layout: PrefillLayout) -> str:
        """The transport of a step with exact attention."""
        shape = step_shape(
            layout,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            itemsize=self.itemsize,
            window=self.window,
        )
        chosen = choose(shape, self.machine, self.candidates, overlap=self.overlap)
        self._log(layout, chosen.transport, chosen.reason)
        return chosen.transport

    def level_transports(
        self,
        layout: PrefillLayout,
        patterns: Sequence[CSAPattern],
        prompt_lens: Sequence[int],
        kv_heads: range,
    ) -> tuple[str, ...]:
        """The transport of each SP level in a sparse step, innermost first."""
        parts = num_kv_parts(
            layout,
            patterns,
            PipelineSettings(),
            num_heads=self.num_heads,
            num_kv_heads=len(kv_heads),
            row_bytes=self.head_dim * self.itemsize,
            head_dim=self.head_dim,
            smallest=CPU_PART if self.machine.on_cpu else CUDA_PART,
        )
        chosen = choose_levels(
            visible_between(layout, patterns, tail_starts(patterns, prompt_lens), kv_heads),
            self.machine,
            num_heads=self.num_heads,
            num_kv_heads=len(kv_heads),
            head_dim=self.head_dim,
            itemsize=self.itemsize,
            parts=parts if self.overlap else None,
        )
        self._log(layout, ",".join(chosen.transports), chosen.reason)
        return chosen.transports

    def _log(self, layout: PrefillLayout, transport: str, reason: str) -> None:
        """Log once per choice, power of two of new tokens and quarter of the cached share."""
        new, keys = sum(layout.queries.counts), sum(layout.keys.counts)
        kind = transport, new.bit_length(), (keys - new) * 4 // max(1, keys)
        if self.log_choices and kind not in self._logged:
            self._logged.add(kind)
            log.info(
                "prefill of %d new tokens behind %d cached ones: transport %s, %s",
                new,
                keys - new,
                transport,
                reason,
            )
