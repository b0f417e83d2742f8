"""Sender of keys and values on a prefill rank: one batch of messages per layer.

Rows are copied out of the cache, so blocks may be reused at once; a thread of the channel sends the
copies while the next layer computes. At most `MAX_BATCHES` layers wait to be sent: a slow network
then slows prefill down instead of filling memory. From CUDA, rows are gathered on the device and
staged through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_mega.comm.channel import Channel, Message
from sps2_mega.engine.disaggregated.kv_transfer import KVTransfer
from sps2_mega.kv_cache.pool import KVPool

# Kinds of messages and their detail. Each rank numbers its transfers by the pass.
#   MANIFEST  transfer
#   LAYER     transfer * number of layers + layer
#   CUT       handoff
MANIFEST, LAYER, CUT = 0, 1, 2
MAX_BATCHES = 4


@dataclass(frozen=True, slots=True)
class _Load:
    dst: int
    slots_T: Tensor
    heads: slice


class KVSender:
    """Sender of each pass's transfers, layer by layer; several passes may be in flight."""

    def __init__(self, channel: Channel, pool: KVPool, *, num_layers: int) -> None:
        self._channel, self._pool, self._num_layers = channel, pool, num_layers
        self._num_passes = 0

    def begin(self, transfers: Sequence[KVTransfer]) -> KVTransfersInFlight:
        """Send the manifests of a pass; `layer_done` of the result then sends its layers."""
        number = self._num_passes
        self._num_passes += 1
        if transfers:
            manifests = [(s.dst, _as_tensor(s.manifest.encode())) for s in transfers]
            self._channel.post([Message(dst, MANIFEST, number, m) for dst, m in manifests])
        return KVTransfersInFlight(
            self._channel, self._pool, transfers, first_detail=number * self._num_layers
        )

    def cut(self, handoff: int, ranks: Sequence[int]) -> None:
        """Tell `ranks`, which a handoff reaches, that this rank sends no more of it.

        Transfers of passes in flight count, too.
        """
        self._channel.post([Message(rank, CUT, handoff) for rank in ranks])


class KVTransfersInFlight:
    """Transfers of one pass, none on a rank that has nothing to send."""

    def __init__(
        self, channel: Channel, pool: KVPool, transfers: Sequence[KVTransfer], *, first_detail: int
    ) -> None:
        self._channel, self._pool, self._first_detail = channel, pool, first_detail
        device = pool.layer(0)[0].device
        self._loads = [
            _Load(
                s.dst,
                torch.from_numpy(s.slots).to(device),
                slice(s.first_head, s.first_head + s.manifest.num_heads),
            )
            for s in transfers
        ]

    def layer_done(self, layer: int) -> None:
        """Send this layer's rows: the cache holds its keys and values of all tokens of the pass."""
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
                torch.empty(r.shape, dtype=r.dtype, pin_memory=True).copy_(r, non_blocking=True)
                for r in rows
            ]
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            ready = copied.synchronize
        self._channel.post(
            [
                Message(load.dst, LAYER, self._first_detail + layer, r.view(-1).view(torch.uint8))
                for load, r in zip(self._loads, rows, strict=True)
            ],
            ready=ready,
        )


def _as_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)
