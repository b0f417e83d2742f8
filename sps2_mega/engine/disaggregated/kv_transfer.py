"""What one prefill rank sends to one decode rank in one pass: all its rows for that rank, layer by
layer.

One pass is all layers for some tokens of each sequence in it, whole prompts or chunks. A transfer
begins with its manifest, from which the receiver knows where every row goes and which transfers it
is part of; then comes one message per layer. A transfer is one sequence on its way: it is complete
on a rank when so many cells have come in all layers as the rank's blocks of it have. A cell is one
KV head of one token.

Pure planning, and the manifest's bytes; who sends is `kv_sender`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np

from sps2_mega.engine.disaggregated.kv_transfer_plan import (
    HeadCut,
    Placement,
    Rows,
    head_cuts,
    rows_from,
    rows_per_rank,
)
from sps2_mega.parallel.rank_pools import RankPool
from sps2_mega.types import PrefillItem


@dataclass(frozen=True, slots=True)
class Destination:
    """Room that the decode pool has made for one sequence: for its tokens from `first` on, which
    is a block's first; what comes before it has already. `transfer` names this sequence's way
    across."""

    transfer: int
    first: int
    placement: Placement


def repeated(transfer: int) -> int:
    """The name of a transfer that comes once more, cleared, because its numbers were not finite."""
    return -1 - transfer


def original(transfer: int) -> int:
    """The name that a transfer had when there was room for it."""
    return transfer if transfer >= 0 else -1 - transfer


@dataclass(frozen=True, slots=True)
class Manifest:
    """`slots` of the receiving rank's cache get, in each layer, the heads [first_head, first_head +
    num_heads). `transfers` are (transfer, its cells in this transfer, all of its cells that come to
    this rank)."""

    slots: np.ndarray
    first_head: int
    num_heads: int
    transfers: tuple[tuple[int, int, int], ...]

    def encode(self) -> bytes:
        slots = self.slots.astype(np.int64, copy=False).tobytes()
        return bytes(msgpack.packb((slots, self.first_head, self.num_heads, self.transfers)))

    @classmethod
    def decode(cls, payload: bytes) -> Manifest:
        slots, first_head, num_heads, transfers = msgpack.unpackb(payload, use_list=False)
        return cls(np.frombuffer(slots, dtype=np.int64), first_head, num_heads, transfers)


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """To rank `dst` of the job: local heads [first_head, ..) of cache slots `slots` of the
    sender."""

    dst: int
    slots: np.ndarray
    first_head: int
    manifest: Manifest


def plan_kv_transfers(
    items: Sequence[tuple[PrefillItem, Destination]],
    *,
    prefill: RankPool,
    decode: RankPool,
    sp_rank: int,
    tp_rank: int,
    num_kv_heads: int,
    block_size: int,
) -> list[KVTransfer]:
    """All transfers of one prefill rank in a pass over these items."""
    cuts = head_cuts(num_kv_heads, src_tp=prefill.tp, dst_tp=decode.tp)
    transfers = []
    for receiver, parts in sorted(_parts_by_receiver(items, sp_rank, block_size).items()):
        for cut in cuts:
            if cut.src != tp_rank:
                continue
            num_heads = sum(other.count for other in cuts if other.dst == cut.dst)
            transfers.append(
                KVTransfer(
                    decode.global_rank(tp_rank=cut.dst, sp_rank=receiver),
                    np.concatenate([part.rows.src_slots for part in parts]),
                    cut.src_start,
                    _manifest(parts, cut, num_heads),
                )
            )
    return transfers


def receiving_ranks(
    destination: Destination, num_tokens: int, *, decode: RankPool, block_size: int
) -> list[int]:
    """Ranks of the job that a transfer of tokens up to `num_tokens` reaches."""
    blocks = range(destination.first // block_size, -(-num_tokens // block_size))
    return [
        decode.global_rank(tp_rank=tp_rank, sp_rank=sp_rank)
        for sp_rank in sorted({destination.placement.block_ranks[block] for block in blocks})
        for tp_rank in range(decode.tp)
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one transfer, and how many its receiver gets of it from all ranks in all passes."""

    transfer: int
    rows: Rows
    num_rows: int


def _parts_by_receiver(
    items: Sequence[tuple[PrefillItem, Destination]], sp_rank: int, block_size: int
) -> dict[int, list[_Part]]:
    parts: dict[int, list[_Part]] = {}
    for item, destination in items:
        source, placement = Placement(item.block_ranks, item.block_ids), destination.placement
        first = destination.first
        if item.start > item.num_shared_tokens:
            first = max(first, item.start)  # the chunks before have brought what was cached
        sent = rows_from(
            sp_rank, source, placement, first=first, end=item.end, block_size=block_size
        )
        num_rows = rows_per_rank(
            placement, first=destination.first, end=len(item.token_ids), block_size=block_size
        )
        for receiver, rows in sent.items():
            part = _Part(destination.transfer, rows, num_rows[receiver])
            parts.setdefault(receiver, []).append(part)
    return parts


def _manifest(parts: Sequence[_Part], cut: HeadCut, num_heads: int) -> Manifest:
    """`num_heads` are all that the receiver has."""
    return Manifest(
        np.concatenate([part.rows.dst_slots for part in parts]),
        cut.dst_start,
        cut.count,
        tuple(
            (part.transfer, len(part.rows.dst_slots) * cut.count, part.num_rows * num_heads)
            for part in parts
        ),
    )
