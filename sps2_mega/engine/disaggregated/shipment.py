"""What one prefill rank sends to one decode rank in one step: all its rows for that rank, layer by layer.

A shipment begins with its manifest, from which the receiver knows where every row goes and which transfers it is part
of; then comes one message per layer. A transfer is one sequence on its way: it is complete on a rank when all shipments
with rows of it are, and each says how many those are.

Pure planning, and the manifest's bytes; who sends is `kv_sender`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np

from sps2_mega.engine.disaggregated.kv_route import (
    HeadCut,
    Placement,
    head_cuts,
    num_row_sources,
    rows_from,
)
from sps2_mega.parallel.sides import Side
from sps2_mega.types import PrefillItem


@dataclass(frozen=True, slots=True)
class Destination:
    """Room that the decode side has made for one sequence: for its tokens from `first` on; what comes before it has
    already. `transfer` names this sequence's way across."""

    transfer: int
    first: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class Manifest:
    """`slots` of the receiving rank's cache get, in each layer, the heads [first_head, first_head + num_heads).
    `transfers` are (transfer, number of shipments with rows of it to this rank)."""

    slots: np.ndarray
    first_head: int
    num_heads: int
    transfers: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        slots = self.slots.astype(np.int64, copy=False).tobytes()
        return msgpack.packb((slots, self.first_head, self.num_heads, self.transfers))

    @classmethod
    def decode(cls, payload: bytes) -> Manifest:
        slots, first_head, num_heads, transfers = msgpack.unpackb(payload, use_list=False)
        return cls(np.frombuffer(slots, dtype=np.int64), first_head, num_heads, transfers)


@dataclass(frozen=True, slots=True)
class Shipment:
    """To rank `dst` of the job: local heads [first_head, ..) of cache slots `slots` of the sender."""

    dst: int
    slots: np.ndarray
    first_head: int
    manifest: Manifest


def plan_shipments(
    items: Sequence[tuple[PrefillItem, Destination]],
    *,
    prefill: Side,
    decode: Side,
    sp_rank: int,
    tp_rank: int,
    num_kv_heads: int,
    block_size: int,
) -> list[Shipment]:
    """All shipments of one prefill rank in a step that computes these items to their last token."""
    cuts = head_cuts(num_kv_heads, src_tp=prefill.tp, dst_tp=decode.tp)
    shipments = []
    for receiver, parts in sorted(_parts_by_receiver(items, sp_rank, block_size).items()):
        for cut in cuts:
            if cut.src != tp_rank:
                continue
            num_cuts = sum(other.dst == cut.dst for other in cuts)
            shipments.append(
                Shipment(
                    decode.global_rank(tp_rank=cut.dst, sp_rank=receiver),
                    np.concatenate([part.src_slots for part in parts]),
                    cut.src_start,
                    _manifest(parts, cut, num_cuts),
                )
            )
    return shipments


def receiving_ranks(
    destination: Destination, num_tokens: int, *, decode: Side, block_size: int
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
    """Rows of one transfer; `num_row_sources` SP ranks have some for the same receiver."""

    transfer: int
    src_slots: np.ndarray
    dst_slots: np.ndarray
    num_row_sources: int


def _parts_by_receiver(
    items: Sequence[tuple[PrefillItem, Destination]], sp_rank: int, block_size: int
) -> dict[int, list[_Part]]:
    parts: dict[int, list[_Part]] = {}
    for item, destination in items:
        assert item.samples, "a prompt moves with the step that completes it"
        source = Placement(item.block_ranks, item.block_ids)
        span = dict(first=destination.first, end=item.end, block_size=block_size)
        num_sources = num_row_sources(source, destination.placement, **span)
        for receiver, rows in rows_from(sp_rank, source, destination.placement, **span).items():
            parts.setdefault(receiver, []).append(
                _Part(destination.transfer, rows.src_slots, rows.dst_slots, num_sources[receiver])
            )
    return parts


def _manifest(parts: Sequence[_Part], cut: HeadCut, num_cuts: int) -> Manifest:
    return Manifest(
        np.concatenate([part.dst_slots for part in parts]),
        cut.dst_start,
        cut.count,
        tuple((part.transfer, part.num_row_sources * num_cuts) for part in parts),
    )
