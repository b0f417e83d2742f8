"""A decode rank's end of the way of keys and values: writes what arrives into blocks that nobody reads yet.

Runs in the channel's receiving thread, while the rank decodes other sequences in other blocks. Knows nothing of plans:
manifests say where rows go. On CUDA it works on a stream of its own, and reports a transfer when that stream is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_mega.engine.disaggregated.kv_sender import LAYER, MANIFEST
from sps2_mega.engine.disaggregated.shipment import Manifest
from sps2_mega.kv_cache.pool import KVPool


@dataclass(slots=True)
class _Incoming:
    manifest: Manifest
    slots_T: Tensor
    layers_left: int


class KVReceiver:
    """From each rank one shipment at a time; calls `on_arrival(transfer)` once all of a transfer is in this rank's
    cache."""

    def __init__(self, pool: KVPool, *, num_layers: int, on_arrival: Callable[[int], None]) -> None:
        self._pool, self._num_layers, self._on_arrival = pool, num_layers, on_arrival
        keys, _ = pool.layer(0)
        self._device, self._dtype, self._head_dim = keys.device, keys.dtype, keys.shape[-1]
        self._stream: torch.cuda.Stream | None = None
        self._incoming: dict[int, _Incoming] = {}  # by sender
        self._num_complete: dict[int, int] = {}  # shipments, by transfer

    def receive(self, source: int, kind: int, layer: int, payload: Tensor) -> None:
        """A message of the channel; `payload` is this object's from now on."""
        if kind == MANIFEST:
            assert source not in self._incoming, f"rank {source} began anew before its last layer"
            manifest = Manifest.decode(payload.numpy().tobytes())
            slots = torch.from_numpy(manifest.slots.copy()).to(self._device)
            self._incoming[source] = _Incoming(manifest, slots, self._num_layers)
            return
        assert kind == LAYER, f"message of unknown kind {kind} from rank {source}"
        incoming = self._incoming[source]
        expected = self._num_layers - incoming.layers_left
        assert layer == expected, f"layer {layer} from rank {source} instead of {expected}"
        with self._on_own_stream():
            self._write(layer, incoming, payload)
        incoming.layers_left -= 1
        if incoming.layers_left == 0:
            del self._incoming[source]
            if self._stream is not None:
                self._stream.synchronize()
            for transfer, num_shipments in incoming.manifest.transfers:
                self._count(transfer, num_shipments)

    @torch.inference_mode()
    def _write(self, layer: int, incoming: _Incoming, payload: Tensor) -> None:
        manifest = incoming.manifest
        shape = (2, len(incoming.slots_T), manifest.num_heads, self._head_dim)
        rows = payload.view(self._dtype).view(shape).to(self._device)
        heads = slice(manifest.first_head, manifest.first_head + manifest.num_heads)
        for pages, new in zip(self._pool.layer(layer), rows, strict=True):
            pages.flatten(0, 1)[:, heads].index_copy_(0, incoming.slots_T, new)

    def _count(self, transfer: int, num_shipments: int) -> None:
        complete = self._num_complete.pop(transfer, 0) + 1
        if complete < num_shipments:
            self._num_complete[transfer] = complete
        else:
            self._on_arrival(transfer)

    def _on_own_stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            # In this thread: the current device is a thread's own.
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream()
        return torch.cuda.stream(self._stream)
