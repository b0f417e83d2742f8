"""Construction of a prefill step's attention: tensors and transports from what a job chose.

`planner.attention_choice` chooses once per job, `planner.step_planner` per step where the transport
is `auto`; both work on counts alone. Here their answers become objects with indices on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sps2_mega.attention.chunk_scores import ChunkScores, ExactChunks, SparseChunks
from sps2_mega.attention.chunked import ChunkedPrefill
from sps2_mega.attention.levels.transport import HierarchicalTransport
from sps2_mega.attention.local_prefill import LocalPart, NoPrompts, local_part
from sps2_mega.attention.pipeline.executor import Pipeline, plain_pipeline
from sps2_mega.attention.transports.gather import Gather
from sps2_mega.attention.transports.pass_q import PassQ
from sps2_mega.attention.transports.ring import Ring
from sps2_mega.attention.transports.ulysses import Ulysses
from sps2_mega.parallel.groups import SINGLE, Group

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sps2_mega.attention.csa.pattern import CSAPattern
    from sps2_mega.attention.csa.spans import SparsePrefill
    from sps2_mega.attention.layout.token_layout import PrefillLayout
    from sps2_mega.attention.planner.step_planner import PrefillPlanner
    from sps2_mega.attention.transports.base import Transport
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.types import PrefillItem


def make_transport(
    name: str,
    layout: PrefillLayout,
    group: Group,
    device: torch.device,
    pipeline: Pipeline | None = None,
) -> Transport:
    """Make the exact transport of one step; `name` is its name in the configuration.

    Without `pipeline` nothing overlaps.
    """
    pipeline = pipeline or plain_pipeline(device)
    match name:
        case "gather":
            return Gather(layout, group, device, pipeline)
        case "ring":
            return Ring(layout, group, device, pipeline)
        case "pass_q":
            return PassQ(layout, group, device, pipeline)
        case "ulysses":
            return Ulysses(layout, group, device, pipeline)
    raise AssertionError(f"unknown transport {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSetup:
    """Attention of prefill in this job.

    `transport` is the name for exact attention, `auto` where `planner` chooses step by step.
    `sparse` holds the pattern and transports of CSA, or of exact attention with a transport for
    each SP level, else None.
    """

    transport: str
    sparse: SparsePrefill | None = None
    planner: PrefillPlanner | None = None
    pipeline: Pipeline | None = None

    def transport_over(
        self,
        layout: PrefillLayout,
        items: Sequence[PrefillItem],
        group: Group,
        device: torch.device,
    ) -> Transport:
        """Make the transport of one step; every rank makes the same choice."""
        if self.transport == "auto" and group.size > 1:
            part = local_part(layout, group.rank)
            if part is not None:
                return self._local(part, items, device)
        patterns = [self.pattern_of(item) for item in items] if self.sparse is not None else []
        return self._over(layout, items, patterns, group, device)

    def chunked(
        self,
        layout: PrefillLayout,
        item: PrefillItem,
        pool: KVPool,
        cached_slots_C: Tensor,
        group: Group,
    ) -> ChunkedPrefill:
        """Make the attention of a prompt that goes through each layer in chunks.

        Keys are gathered once, whatever the transport of other prompts. `cached_slots_C` are the
        cache slots of this rank's cached tokens.
        """
        assert self.pipeline is not None, "the executor fills it in"
        scores: ChunkScores = ExactChunks()
        if self.sparse is not None:
            scores = SparseChunks(
                self.pattern_of(item), item.num_prompt_tokens, self.sparse.kv_heads
            )
        return ChunkedPrefill(
            pool,
            cached_slots_C,
            layout,
            scores,
            group,
            self.pipeline,
            whole_output=item.params.prompt_logprobs is not None,
        )

    def _over(
        self,
        layout: PrefillLayout,
        items: Sequence[PrefillItem],
        patterns: Sequence[CSAPattern],
        group: Group,
        device: torch.device,
    ) -> Transport:
        if self.sparse is None:
            name = self.transport
            if name == "auto" and self.planner is not None:
                name = self.planner.transport(layout)
            return make_transport(name, layout, group, device, self.pipeline)
        sparse = self.sparse
        prompt_lens = [item.num_prompt_tokens for item in items]
        transports = sparse.transports
        if transports == ("auto",):
            assert self.planner is not None, "transport auto on several ranks comes with a planner"
            transports = self.planner.level_transports(
                layout, patterns, prompt_lens, sparse.kv_heads
            )
        return HierarchicalTransport(
            layout,
            patterns,
            prompt_lens,
            transports,
            sparse.sp_levels,
            kv_heads=sparse.kv_heads,
            group=group,
            device=device,
            pipeline=self.pipeline or plain_pipeline(device),
        )

    def _local(
        self, part: LocalPart, items: Sequence[PrefillItem], device: torch.device
    ) -> Transport:
        """Make the transport of a local step, as in a job of this rank alone."""
        if not part.sequences:
            return NoPrompts()
        local = replace(self, transport="gather", planner=None, pipeline=None)
        if self.sparse is not None:
            local = replace(
                local, sparse=replace(self.sparse, transports=("gather",), sp_levels=(1,))
            )
        own = [items[index] for index in part.sequences]
        patterns = [self.pattern_of(item) for item in own] if self.sparse is not None else []
        return local._over(part.layout, own, patterns, SINGLE, device)

    def pattern_of(self, item: PrefillItem) -> CSAPattern:
        """Return the CSA pattern of a sequence.

        Its spans are recorded where it may share a prefix with prompts of other lengths.
        """
        assert self.sparse is not None, "exact attention has no pattern"
        pattern = self.sparse.pattern(item.num_prompt_tokens)
        return pattern if item.spans is None else replace(pattern, spans=item.spans)
