"""Plan of the transfers of a prefill pass: rows for each decode rank, and their manifest's bytes.

    transfer   everything that one prefill rank sends to one decode rank in one pass: a manifest,
               then one message per layer
    handoff    one sequence on its way to the decode ranks: all its rows, from all prefill ranks, in
               one or more passes

A pass is all layers for some tokens of each sequence in it, whole prompts or chunks. From the
manifest the receiver knows the slot of every row and the handoffs that rows belong to. A handoff is
complete on a rank when all its entries have arrived in all layers; an entry is one KV head of one
token.

Pure planning; `kv_sender` sends.
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
    """Blocks reserved on the decode ranks for one sequence's tokens from `first` on.

    `first` is a block's first token; tokens before it are cached there already. `handoff` is the
    number of this reservation.
    """

    handoff: int
    first: int
    placement: Placement


def repeated(handoff: int) -> int:
    """Number under which a handoff is sent once more, cleared, as its values were not finite."""
    return -1 - handoff


def original(handoff: int) -> int:
    """Number that a handoff, repeated or not, got with its reservation."""
    return handoff if handoff >= 0 else -1 - handoff


@dataclass(frozen=True, slots=True)
class Manifest:
    """Slots of a transfer's rows on the receiver, and the handoffs that they belong to.

    In each layer `slots` of the receiving rank's cache get the heads [first_head, first_head +
    num_heads). `handoffs` are (handoff, its entries in this transfer, all its entries for this
    rank).
    """

    slots: np.ndarray
    first_head: int
    num_heads: int
    handoffs: tuple[tuple[int, int, int], ...]

    def encode(self) -> bytes:
        slots = self.slots.astype(np.int64, copy=False).tobytes()
        return bytes(msgpack.packb((slots, self.first_head, self.num_heads, self.handoffs)))

    @classmethod
    def decode(cls, payload: bytes) -> Manifest:
        slots, first_head, num_heads, handoffs = msgpack.unpackb(payload, use_list=False)
        return cls(np.frombuffer(slots, dtype=np.int64), first_head, num_heads, handoffs)


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """Rows that one prefill rank sends to rank `dst` of the job in one pass: local heads
    [first_head, ..) of its cache slots `slots`."""

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
    """All transfers of one prefill rank in a pass over these items.

    Args:
        items: sequences of the pass, each with its destination.
        prefill: the rank pool of the sender.
        decode: the rank pool of the receivers.
        sp_rank: of the sender.
        tp_rank: of the sender.
        num_kv_heads: of the model, over all TP ranks.
        block_size: tokens per block, the same in both pools.
    """
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
    """Ranks of the job that a handoff of tokens up to `num_tokens` reaches."""
    blocks = range(destination.first // block_size, -(-num_tokens // block_size))
    return [
        decode.global_rank(tp_rank=tp_rank, sp_rank=sp_rank)
        for sp_rank in sorted({destination.placement.block_ranks[block] for block in blocks})
        for tp_rank in range(decode.tp)
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one handoff, and how many its receiver gets of it from all ranks in all passes."""

    handoff: int
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
            first = max(first, item.start)  # earlier chunks have sent what was cached
        sent = rows_from(
            sp_rank, source, placement, first=first, end=item.end, block_size=block_size
        )
        num_rows = rows_per_rank(
            placement, first=destination.first, end=len(item.token_ids), block_size=block_size
        )
        for receiver, rows in sent.items():
            part = _Part(destination.handoff, rows, num_rows[receiver])
            parts.setdefault(receiver, []).append(part)
    return parts


def _manifest(parts: Sequence[_Part], cut: HeadCut, num_heads: int) -> Manifest:
    """`num_heads` are all that the receiver has."""
    return Manifest(
        np.concatenate([part.rows.dst_slots for part in parts]),
        cut.dst_start,
        cut.count,
        tuple(
            (part.handoff, len(part.rows.dst_slots) * cut.count, part.num_rows * num_heads)
            for part in parts
        ),
    )
