"""How prefill attends in a job, put together once at start: what a step's layout is then turned
into attention with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sps2_mega.attention.chunk_scores import ChunkScores, ExactChunks, SparseChunks
from sps2_mega.attention.chunked import ChunkedPrefill
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.layout.token_layout import PrefillLayout
from sps2_mega.attention.levels.transport import HierarchicalTransport
from sps2_mega.attention.local_prefill import NoPrompts, OwnPart, own_part
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.planner.step_planner import PrefillPlanner
from sps2_mega.attention.transports.base import Transport, make_transport
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import SINGLE, Group
from sps2_mega.types import PrefillItem


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSetup:
    """`transport` is the name for exact attention, `auto` where `planner` chooses step by step.
    `sparse` has the pattern and transports of CSA, or of exact attention with a transport for each
    SP level; None otherwise."""

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
        """The attention of one step: the same choice on every rank."""
        if self.transport == "auto" and group.size > 1:
            part = own_part(layout, group.rank)
            if part is not None:
                return self._apart(part, items, device)
        patterns = [self.pattern_of(item) for item in items] if self.sparse is not None else []
        return self._over(layout, items, patterns, group, device)

    def chunked(
        self,
        layout: PrefillLayout,
        item: PrefillItem,
        pool: KVPool,
        slots: tuple[Tensor, Tensor],
        group: Group,
    ) -> ChunkedPrefill:
        """The attention of a prompt that goes through each layer in chunks: keys come to every rank
        once, whatever the transport of other prompts. `slots` are this rank's cache slots of new
        and of cached tokens."""
        assert self.pipeline is not None, "the executor fills it in"
        scores: ChunkScores = ExactChunks()
        if self.sparse is not None:
            scores = SparseChunks(
                self.pattern_of(item), item.num_prompt_tokens, self.sparse.kv_heads
            )
        return ChunkedPrefill(
            pool,
            *slots,
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
            pipeline=self.pipeline,
        )

    def _apart(
        self, part: OwnPart, items: Sequence[PrefillItem], device: torch.device
    ) -> Transport:
        """Every prompt lies whole on one rank: as in a job of this rank alone."""
        if not part.sequences:
            return NoPrompts()
        alone = replace(self, transport="gather", planner=None, pipeline=None)
        if self.sparse is not None:
            alone = replace(
                alone, sparse=replace(self.sparse, transports=("gather",), sp_levels=(1,))
            )
        own = [items[index] for index in part.sequences]
        patterns = [self.pattern_of(item) for item in own] if self.sparse is not None else []
        return alone._over(part.layout, own, patterns, SINGLE, device)

    def pattern_of(self, item: PrefillItem) -> CSAPattern:
        """A sequence's CSA pattern: its spans are recorded where it may share a prefix with prompts
        of other lengths."""
        assert self.sparse is not None, "exact attention has no pattern"
        pattern = self.sparse.pattern(item.num_prompt_tokens)
        return pattern if item.spans is None else replace(pattern, spans=item.spans)
