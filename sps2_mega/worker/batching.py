"""A StepPlan as this rank's input tensors and attention: index work in numpy, once per step.

prefill   a rank gets the tokens of the blocks placed on it; the last token of a sequence is sampled
          on the rank that holds it
decode    a rank gets the sequences whose last block it holds
hybrid    a rank gets its tokens of both kinds, those of prefill first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.build import PrefillSetup
from sps2_mega.attention.decode import DecodeAttention, DenseKeys, LocalKeys, SparseKeys
from sps2_mega.attention.hybrid import HybridAttention
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.prefill import PrefillAttention
from sps2_mega.attention.step import AttentionKind, StepAttention
from sps2_mega.kernels.host_to_device import array_to_device
from sps2_mega.kernels.paged_decode.dispatch import prepare
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import Group
from sps2_mega.types import DecodeItem, PrefillItem
from sps2_mega.worker.device_tables import DeviceTables
from sps2_mega.worker.local_tables import LocalTables
from sps2_mega.worker.sparse_tables import SparseTables


@dataclass(frozen=True, slots=True)
class StepInput:
    """Input of the model on one rank.

    `rows_R` are the local tokens to sample after. `tokens_by_rank` are the numbers of tokens of all
    SP ranks, for layers that share the work. `items_by_rank[r]` says which entries of
    `StepPlan.sampled` are sampled on SP rank r, in the order of its rows.
    """

    tokens_T: Tensor
    positions_T: Tensor
    rows_R: Tensor
    attention: StepAttention
    tokens_by_rank: list[int]
    items_by_rank: list[list[int]]


def prefill_input(
    items: Sequence[PrefillItem],
    tables: LocalTables,
    pool: KVPool,
    group: Group,
    setup: PrefillSetup,
    *,
    device: torch.device,
    chunked: bool = False,
) -> StepInput:
    """Enter the items' sequences into `tables` and lay out their tokens.

    Args:
        items: Prompts of the step, one where it is `chunked`.
        tables: This rank's block tables.
        pool: KV cache of this rank.
        group: SP group.
        setup: Attention of prefill in this job.
        device: Device of the tensors.
        chunked: The prompt goes through each layer chunk by chunk.
    """
    layout = build_layout(
        [item.block_ranks for item in items],
        [item.end for item in items],
        starts=[item.start for item in items],
        block_size=pool.block_size,
        sp_size=group.size,
    )
    tokens, positions, slots, cached_slots = [], [], [], []
    block_ids = [np.asarray(item.block_ids) for item in items]
    for run in layout.queries.local_runs(group.rank):
        token_ids = items[run.sequence].token_ids[run.start : run.end]
        tokens.append(np.asarray(token_ids, dtype=np.int64))
        positions.append(np.arange(run.start, run.end))
        slots.append(_slots(block_ids[run.sequence], positions[-1], pool.block_size))
    for run in layout.keys.local_runs(group.rank):
        if run.end <= items[run.sequence].start:
            cached = np.arange(run.start, run.end)
            cached_slots.append(_slots(block_ids[run.sequence], cached, pool.block_size))
    items_by_rank: list[list[int]] = [[] for _ in range(group.size)]
    tokens_by_rank = [0] * group.size
    rows = []
    num_sampled = 0
    for run in layout.queries.runs:
        tokens_by_rank[run.rank] += run.end - run.start
        if run.end == len(items[run.sequence].token_ids):
            items_by_rank[run.rank].append(num_sampled)
            num_sampled += 1
            if run.rank == group.rank:
                rows.append(run.local.stop - 1)
    new, before = _join(slots, device), _join(cached_slots, device)
    kind: AttentionKind
    if chunked:
        (item,) = items
        kind = setup.chunked(layout, item, pool, before, group)
    else:
        kind = PrefillAttention(pool, before, setup.transport_over(layout, items, group, device))
    for item in items:
        # A table is read only once its sequence decodes, when all of its tokens are there.
        if item.samples:
            tables.add(item.seq_id, item.block_ranks, item.block_ids, len(item.token_ids))
    return StepInput(
        tokens_T=_join(tokens, device),
        positions_T=_join(positions, device),
        rows_R=_tensor(rows, device),
        attention=StepAttention(pool, new, kind),
        tokens_by_rank=tokens_by_rank,
        items_by_rank=items_by_rank,
    )


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    """New tokens of this rank in a decode step, and all sequences of the step.

    `items` has the sequences rank by rank, as attention orders them; `items_by_rank[r]` are indices
    of the plan's decodes.
    """

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    items: list[DecodeItem]
    items_by_rank: list[list[int]]

    def visible(
        self, tables: LocalTables, window: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (block ids [B, M], start [B], end [B]) of what `items` see here without CSA."""
        return tables.view([item.seq_id for item in self.items], self._first_visible(window))

    def ranges(
        self, tables: LocalTables, window: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (rows of `tables` [B], start [B], end [B]) of what `items` see here."""
        rows_B = tables.rows([item.seq_id for item in self.items])
        return rows_B, *tables.ranges(rows_B, self._first_visible(window))

    def _first_visible(self, window: int | None) -> np.ndarray | None:
        if window is None:
            return None
        return np.array([max(0, item.position - window + 1) for item in self.items], dtype=np.int64)


def decode_tokens(
    items: Sequence[DecodeItem], tables: LocalTables, group: Group, *, block_size: int
) -> DecodeTokens:
    """Advance the items' sequences in `tables` by one token."""
    items_by_rank: list[list[int]] = [[] for _ in range(group.size)]
    tokens, positions, slots = [], [], []
    for index, item in enumerate(items):
        if item.new_block is not None:
            rank, block_id = item.new_block
            tables.add_block(item.seq_id, rank, block_id, item.position // block_size)
        owner = tables.last_rank(item.seq_id)
        items_by_rank[owner].append(index)
        if owner == group.rank:
            tokens.append(item.token_id)
            positions.append(item.position)
            slots.append(tables.append_token(item.seq_id, item.position))
    ordered = [items[index] for indices in items_by_rank for index in indices]
    return DecodeTokens(tokens, positions, slots, ordered, items_by_rank)


def decode_input(
    items: Sequence[DecodeItem],
    tables: LocalTables,
    pool: KVPool,
    group: Group,
    *,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    sparse_tables: SparseTables | None = None,
    device_tables: DeviceTables | None = None,
) -> StepInput:
    """Advance the items' sequences in `tables` by one token and lay out the step.

    Args:
        items: Sequences of the step.
        tables: This rank's block tables.
        pool: KV cache of this rank.
        group: SP group.
        window: Sliding window in tokens, or None.
        dtype: Type of queries.
        device: Device of the tensors.
        sparse_tables: Keys that CSA shows; without it new tokens see all keys.
        device_tables: `tables` as our own decode kernel reads them; without it torch decodes.
    """
    new = decode_tokens(items, tables, group, block_size=pool.block_size)
    keys: LocalKeys
    if device_tables is not None:
        keys = DenseKeys(device_tables.visible(*new.ranges(tables, window)))
    elif sparse_tables is None:
        rows = new.visible(tables, window)
        keys = DenseKeys(prepare(*rows, block_size=pool.block_size, dtype=dtype, device=device))
    else:
        step = sparse_tables.step(
            [item.seq_id for item in new.items], [item.position for item in new.items]
        )
        keys = SparseKeys(step.layer_slots, step.num_classes)
    # One copy to the device instead of three.
    tokens_T, positions_T, slots_T = array_to_device(
        np.array([new.tokens, new.positions, new.slots], dtype=np.int64), device
    )
    counts = [len(indices) for indices in new.items_by_rank]
    return StepInput(
        tokens_T=tokens_T,
        positions_T=positions_T,
        rows_R=torch.arange(len(new.tokens), device=device),
        attention=StepAttention(pool, slots_T, DecodeAttention(pool, keys, counts, group)),
        tokens_by_rank=counts,
        items_by_rank=new.items_by_rank,
    )


def hybrid_input(prefill: StepInput, decode: StepInput) -> StepInput:
    """Join both in one pass through the model; their sequences differ, as in one StepPlan."""
    num_prefill_tokens = len(prefill.tokens_T)
    kind = HybridAttention(prefill.attention.kind, decode.attention.kind, num_prefill_tokens)
    slots_T = torch.cat([prefill.attention.slots_T, decode.attention.slots_T])
    num_sampled = sum(map(len, prefill.items_by_rank))
    return StepInput(
        tokens_T=torch.cat([prefill.tokens_T, decode.tokens_T]),
        positions_T=torch.cat([prefill.positions_T, decode.positions_T]),
        rows_R=torch.cat([prefill.rows_R, decode.rows_R + num_prefill_tokens]),
        attention=StepAttention(prefill.attention.pool, slots_T, kind),
        tokens_by_rank=[
            sum(both) for both in zip(prefill.tokens_by_rank, decode.tokens_by_rank, strict=True)
        ],
        items_by_rank=[
            first + [num_sampled + index for index in second]
            for first, second in zip(prefill.items_by_rank, decode.items_by_rank, strict=True)
        ],
    )


def _slots(block_ids: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Return the cache slot of each token position of a sequence, on the rank that holds it."""
    return block_ids[positions // block_size] * block_size + positions % block_size


def _join(pieces: list[np.ndarray], device: torch.device) -> Tensor:
    if not pieces:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.from_numpy(np.concatenate(pieces)).to(device)


def _tensor(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
