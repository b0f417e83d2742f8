"""StepPlan -> this rank's input tensors and attention: index work in numpy, once per step.

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
from sps2_mega.attention.chunked import ChunkedPrefill
from sps2_mega.attention.decode import DecodeAttention, DenseKeys, LocalKeys, SparseKeys
from sps2_mega.attention.hybrid import HybridAttention
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.prefill import PrefillAttention
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
    """What one rank feeds to the model. `rows_R` are the local tokens to sample after;
    `items_by_rank[r]` says which entries of `StepPlan.sampled` are sampled on sp rank r, in the
    order of its rows."""

    tokens_T: Tensor
    positions_T: Tensor
    rows_R: Tensor
    attention: PrefillAttention | ChunkedPrefill | DecodeAttention | HybridAttention
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
    """Enters the items' sequences into `tables` and lays out their tokens; `chunked`: of one item,
    which goes through each layer in chunks."""
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
    rows = []
    num_sampled = 0
    for run in layout.queries.runs:
        if run.end == len(items[run.sequence].token_ids):
            items_by_rank[run.rank].append(num_sampled)
            num_sampled += 1
            if run.rank == group.rank:
                rows.append(run.local.stop - 1)
    new, before = _join(slots, device), _join(cached_slots, device)
    attention: PrefillAttention | ChunkedPrefill
    if chunked:
        (item,) = items
        attention = setup.chunked(layout, item, pool, (new, before), group)
    else:
        transport = setup.transport_over(layout, items, group, device)
        attention = PrefillAttention(pool, new, before, transport)
    for item in items:
        # A table is asked for only once its sequence decodes, when all of its tokens are there.
        if item.samples:
            tables.add(item.seq_id, item.block_ranks, item.block_ids, len(item.token_ids))
    return StepInput(
        tokens_T=_join(tokens, device),
        positions_T=_join(positions, device),
        rows_R=_tensor(rows, device),
        attention=attention,
        items_by_rank=items_by_rank,
    )


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    """This rank's new tokens of a decode step, and in `items` the step's sequences rank by rank, as
    attention has them; `items_by_rank[r]` are indices of the plan's decodes."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    items: list[DecodeItem]
    items_by_rank: list[list[int]]

    def visible(
        self, tables: LocalTables, window: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block ids [B, M], start [B], end [B]) of what each of `items` sees on this rank without
        CSA."""
        return tables.view([item.seq_id for item in self.items], self._first_visible(window))

    def ranges(
        self, tables: LocalTables, window: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same with rows of `tables` [B] in place of their block ids."""
        rows_B = tables.rows([item.seq_id for item in self.items])
        return rows_B, *tables.ranges(rows_B, self._first_visible(window))

    def _first_visible(self, window: int | None) -> np.ndarray | None:
        if window is None:
            return None
        return np.array([max(0, item.position - window + 1) for item in self.items], dtype=np.int64)


def decode_tokens(
    items: Sequence[DecodeItem], tables: LocalTables, group: Group, *, block_size: int
) -> DecodeTokens:
    """Advances the items' sequences in `tables` by one token."""
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
    """Advances the items' sequences in `tables` by one token and lays out the step; with
    `sparse_tables` new tokens see what CSA shows them, else all keys. `device_tables`: `tables` as
    our own decode kernel reads it."""
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
        attention=DecodeAttention(pool, slots_T, keys, counts, group),
        items_by_rank=new.items_by_rank,
    )


def hybrid_input(prefill: StepInput, decode: StepInput) -> StepInput:
    """Both in one pass through the model; the two must be of different sequences, as in one
    StepPlan."""
    assert isinstance(prefill.attention, PrefillAttention)
    assert isinstance(decode.attention, DecodeAttention)
    num_prefill_tokens = len(prefill.tokens_T)
    num_sampled = sum(map(len, prefill.items_by_rank))
    return StepInput(
        tokens_T=torch.cat([prefill.tokens_T, decode.tokens_T]),
        positions_T=torch.cat([prefill.positions_T, decode.positions_T]),
        rows_R=torch.cat([prefill.rows_R, decode.rows_R + num_prefill_tokens]),
        attention=HybridAttention(prefill.attention, decode.attention, num_prefill_tokens),
        items_by_rank=[
            first + [num_sampled + index for index in second]
            for first, second in zip(prefill.items_by_rank, decode.items_by_rank, strict=True)
        ],
    )


def _slots(block_ids: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """The cache slot of each token position of a sequence, on the rank that holds it."""
    return block_ids[positions // block_size] * block_size + positions % block_size


def _join(pieces: list[np.ndarray], device: torch.device) -> Tensor:
    if not pieces:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.from_numpy(np.concatenate(pieces)).to(device)


def _tensor(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
