"""State of running sequences on one rank: block tables, CSA's slots, and sampling states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.config import ModelConfig
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import Group
from sps2_mega.types import PrefillItem, StepOutput, StepPlan
from sps2_mega.worker.device_tables import DeviceTables
from sps2_mega.worker.local_tables import LocalTables
from sps2_mega.worker.sampling.sampling_states import SamplingStates
from sps2_mega.worker.sparse_tables import SparseTables


class RunningSequences:
    """All tables have the same sequences: those whose prompts are computed, until forgotten.

    `sparse_tables` exist where new tokens attend by CSA's pattern, `device_tables` where kernels
    read block tables on the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        pool: KVPool,
        group: Group,
        *,
        sparse: SparsePrefill | None,
        on_device: bool,
        device: torch.device,
    ) -> None:
        """`group` are the SP ranks that share the sequences; `sparse` is CSA's pattern of new
        tokens, None where they see all keys."""
        self._pool = pool
        self.tables = LocalTables(rank=group.rank, block_size=pool.block_size)
        self.sparse_tables: SparseTables | None = None
        self.device_tables: DeviceTables | None = None
        if sparse is not None:
            self.sparse_tables = SparseTables(self.tables, sparse, block_size=pool.block_size)
        elif on_device:
            self.device_tables = DeviceTables(self.tables, device)
        self.sampling = SamplingStates(config, device)

    def add(self, item: PrefillItem, pattern_of: Callable[[PrefillItem], CSAPattern]) -> None:
        """Add a sequence whose prompt this step completes; the step's input adds its table."""
        self.sampling.add(item)
        if self.sparse_tables is not None:
            self.sparse_tables.add(item.seq_id, pattern_of(item))

    def enter(self, item: PrefillItem) -> None:
        """Add a sequence whose tokens other ranks have prefilled into its blocks."""
        assert self.sparse_tables is None, "only ranks that prefilled a sequence know its pattern"
        self.sampling.add(item)
        self.tables.add(item.seq_id, item.block_ranks, item.block_ids, len(item.token_ids))

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that are over, or that will be prefilled again."""
        for seq_id in seq_ids:
            self.tables.remove(seq_id)
            if self.sparse_tables is not None:
                self.sparse_tables.remove(seq_id)
            self.sampling.forget(seq_id)

    def clear_failed(
        self, plan: StepPlan, prefills: Sequence[PrefillItem], output: StepOutput
    ) -> None:
        """Clear the blocks of failed sequences: NaN must not reach the next owner of a block, as
        masked slots are multiplied by zero.

        Blocks that a failed sequence shares, or that gave finite logits before, have no NaN and may
        be in use.
        """
        first_own = {item.seq_id: item.num_shared_tokens for item in prefills}
        first_own |= {item.seq_id: item.position for item in plan.decodes}
        for seq_id, token_id in zip(plan.sampled, output.token_ids, strict=True):
            if token_id is None:
                first = first_own[seq_id] // self._pool.block_size
                self._pool.clear(self.tables.block_ids(seq_id, first=first))
