"""A prefill rank's end of the way of keys and values to the decode ranks: one batch of messages per layer.

Rows are copied out of the cache, so blocks may be reused at once; a thread of the channel sends the copies while the
next layer computes. At most `MAX_BATCHES` layers wait to be sent: a slow network then slows prefill down instead of filling
memory. From CUDA, rows are gathered on the device and staged through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_mega.comm.channel import Channel, Message
from sps2_mega.engine.disaggregated.shipment import Shipment
from sps2_mega.kv_cache.pool import KVPool

MANIFEST, LAYER = 0, 1  # kinds of messages
MAX_BATCHES = 4


@dataclass(frozen=True, slots=True)
class _Load:
    dst: int
    slots_T: Tensor
    heads: slice


class KVSender:
    """Sends what a step's shipments say, each layer once, in layer order."""

    def __init__(self, channel: Channel, pool: KVPool) -> None:
        self._channel, self._pool = channel, pool

    def begin(self, shipments: Sequence[Shipment]) -> ShipmentsUnderWay:
        """Tells receivers what comes; `layer_done` of the result then sends layers."""
        if shipments:
            self._channel.post(
                [Message(s.dst, MANIFEST, 0, _as_tensor(s.manifest.encode())) for s in shipments]
            )
        return ShipmentsUnderWay(self._channel, self._pool, shipments)


class ShipmentsUnderWay:
    """The shipments of one step; a rank with nothing to send has one without any."""

    def __init__(self, channel: Channel, pool: KVPool, shipments: Sequence[Shipment]) -> None:
        self._channel, self._pool = channel, pool
        device = pool.layer(0)[0].device
        self._loads = [
            _Load(
                s.dst,
                torch.from_numpy(s.slots).to(device),
                slice(s.first_head, s.first_head + s.manifest.num_heads),
            )
            for s in shipments
        ]

    def layer_done(self, layer: int) -> None:
        """The cache holds this layer's keys and values of all tokens of the step."""
        if not self._loads:
            return
        # [keys and values, tokens, heads, head_dim]
        rows = [
            torch.stack(
                [
                    pages.flatten(0, 1).index_select(0, load.slots_T)[:, load.heads]
                    for pages in self._pool.layer(layer)
                ]
            )
            for load in self._loads
        ]
        ready = None
        if rows[0].is_cuda:
            rows = [
                torch.empty_like(r, device="cpu", pin_memory=True).copy_(r, non_blocking=True)
                for r in rows
            ]
            copied = torch.cuda.Event()
            copied.record()
            ready = copied.synchronize
        self._channel.post(
            [
                Message(load.dst, LAYER, layer, r.view(-1).view(torch.uint8))
                for load, r in zip(self._loads, rows, strict=True)
            ],
            ready=ready,
        )


def _as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)
