"""Receiver of keys and values on a decode rank: writes rows into blocks that are not read yet.

Runs in the channel's receiving thread, while the rank decodes other sequences in other blocks.
Knows no plans: manifests name the slots. On CUDA it works on a stream of its own, and reports a
handoff when that stream has finished.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_mega.engine.disaggregated.kv_sender import CUT, LAYER, MANIFEST
from sps2_mega.engine.disaggregated.kv_transfer import Manifest
from sps2_mega.kv_cache.pool import KVPool


@dataclass(slots=True)
class _Incoming:
    manifest: Manifest
    slots_T: Tensor
    next_layer: int = 0


class KVReceiver:
    """Receiver of handoffs; calls `on_arrival(handoff)` when one is complete or was cut short.

    Any number of transfers of each sender may be in flight.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        num_layers: int,
        num_senders: int,
        on_arrival: Callable[[int], None],
    ) -> None:
        self._pool, self._num_layers, self._num_senders = pool, num_layers, num_senders
        self._on_arrival = on_arrival
        keys, _ = pool.layer(0)
        self._device, self._dtype, self._head_dim = keys.device, keys.dtype, keys.shape[-1]
        self._stream: torch.cuda.Stream | None = None
        self._incoming: dict[tuple[int, int], _Incoming] = {}  # by sender and transfer
        self._num_entries: dict[int, int] = {}  # that have arrived, by handoff
        self._num_cuts: dict[int, int] = {}  # by handoff

    def receive(self, source: int, kind: int, detail: int, payload: Tensor) -> None:
        """Handle a message of the channel; `payload` belongs to this object from now on."""
        if kind == MANIFEST:
            manifest = Manifest.decode(payload.numpy().tobytes())
            slots = torch.from_numpy(manifest.slots.copy()).to(self._device)
            self._incoming[source, detail] = _Incoming(manifest, slots)
        elif kind == CUT:
            self._cut(source, detail)
        else:
            assert kind == LAYER, f"message of unknown kind {kind} from rank {source}"
            transfer, layer = divmod(detail, self._num_layers)
            self._take(self._incoming[source, transfer], layer, payload)
            if layer == self._num_layers - 1:
                self._complete(self._incoming.pop((source, transfer)))

    def _take(self, incoming: _Incoming, layer: int, payload: Tensor) -> None:
        assert layer == incoming.next_layer, f"layer {layer} instead of {incoming.next_layer}"
        incoming.next_layer += 1
        with self._on_own_stream():
            self._write(layer, incoming, payload)

    def _complete(self, incoming: _Incoming) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        for handoff, num_entries, total in incoming.manifest.handoffs:
            have = self._num_entries.pop(handoff, 0) + num_entries
            assert have <= total, f"{have} of {total} entries of handoff {handoff}"
            if have == total:
                self._on_arrival(handoff)
            else:
                self._num_entries[handoff] = have

    def _cut(self, source: int, handoff: int) -> None:
        """Report a handoff when all senders have cut it; for the second time if it was complete."""
        for key, incoming in list(self._incoming.items()):
            if key[0] == source and any(h == handoff for h, _, _ in incoming.manifest.handoffs):
                del self._incoming[key]
        num_cuts = self._num_cuts.pop(handoff, 0) + 1
        if num_cuts < self._num_senders:
            self._num_cuts[handoff] = num_cuts
            return
        self._num_entries.pop(handoff, None)
        if self._stream is not None:
            self._stream.synchronize()  # no late write into blocks that others get next
        self._on_arrival(handoff)

    @torch.inference_mode()
    def _write(self, layer: int, incoming: _Incoming, payload: Tensor) -> None:
        manifest = incoming.manifest
        shape = (2, len(incoming.slots_T), manifest.num_heads, self._head_dim)
        rows = payload.view(self._dtype).view(shape).to(self._device)
        heads = slice(manifest.first_head, manifest.first_head + manifest.num_heads)
        for pages, new in zip(self._pool.layer(layer), rows, strict=True):
            pages.flatten(0, 1)[:, heads].index_copy_(0, incoming.slots_T, new)

    def _on_own_stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            # In this thread: each thread has its own current device.
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)
