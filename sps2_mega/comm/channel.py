"""Ordered messages between any two ranks; receivers need not expect them.

A message is a header of four integers and a payload of bytes. Each rank has two
threads per channel: one receives from all ranks and delivers, one sends. Neither end
of a conversation waits for the other's steps.

    post([Message(dst, kind, detail, payload), ..])    one batch; its messages are sent concurrently
    on_message(src, kind, detail, payload)             in the receiving thread, one after another
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_CLOSE = -1  # the kind of a channel's last message
EMPTY = torch.empty(0, dtype=torch.uint8)


class PointToPoint(Protocol):
    """The part of torch's gloo group that a channel uses, which torch's stubs omit.

    All methods return torch's `Work`.
    """

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any: ...

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Message:
    """A message to rank `dst`.

    Sender and receiver agree on the meaning of `kind` (>= 0) and `detail`. `payload` is a
    contiguous CPU tensor of bytes, which must not change until it is sent.
    """

    dst: int
    kind: int
    detail: int = 0
    payload: Tensor = EMPTY


@dataclass(frozen=True, slots=True)
class _Batch:
    messages: Sequence[Message]
    ready: Callable[[], None] | None


OnMessage = Callable[[int, int, int, Tensor], None]


class Channel:
    """Complete, ordered delivery between ranks; `number` identifies the channel in its group."""

    def __init__(
        self,
        group: PointToPoint,
        number: int,
        *,
        on_message: OnMessage,
        on_error: Callable[[BaseException], None],
        max_batches: int = 0,
    ) -> None:
        """Start the two threads of the channel, which run both callbacks.

        `on_message` is called with (sender, kind, detail, payload), `on_error`
        with the exception that ended a thread. With `max_batches` > 0, `post`
        blocks while that many batches are unsent.
        """
        self._group, self._header_tag, self._payload_tag = group, 2 * number, 2 * number + 1
        self._on_message, self._on_error = on_message, on_error
        self._queue: queue.Queue[_Batch | None] = queue.Queue(max_batches)
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"sps2-{name}", daemon=True)
            for loop, name in ((self._send_all, "send"), (self._receive_all, "receive"))
        ]
        for thread in self._threads:
            thread.start()

    def post(self, messages: Sequence[Message], *, ready: Callable[[], None] | None = None) -> None:
        """Send a batch after all earlier ones. `ready` blocks until the payloads are filled."""
        self._queue.put(_Batch(messages, ready))

    def flush(self) -> None:
        """Wait until all posted batches have been received."""
        self._queue.join()

    def finish(self, neighbour: int) -> None:
        """End both threads, on all ranks together and after the last message.

        Each rank releases the receiving thread of another one; the
        neighbours form a permutation of ranks.
        """
        self.post([Message(neighbour, _CLOSE)])
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _send_all(self) -> None:
        while (batch := self._queue.get()) is not None:
            if batch.ready is not None:
                batch.ready()
            sends = []
            for message in batch.messages:
                size = message.payload.numel()
                header = torch.tensor([message.kind, message.detail, size, 0])
                sends.append((self._group.send([header], message.dst, self._header_tag), header))
                if size:
                    payload = message.payload
                    sends.append(
                        (self._group.send([payload], message.dst, self._payload_tag), payload)
                    )
            for work, _ in sends:  # tensors stay alive until they are sent
                work.wait()
            self._queue.task_done()

    def _receive_all(self) -> None:
        while True:
            header = torch.empty(4, dtype=torch.int64)
            work = self._group.recv_anysource([header], self._header_tag)
            work.wait()
            source = work._source_rank()
            kind, detail, size, _ = header.tolist()
            if kind == _CLOSE:
                return
            payload = torch.empty(size, dtype=torch.uint8)
            if size:
                self._group.recv([payload], source, self._payload_tag).wait()
            self._on_message(source, kind, detail, payload)

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        # The edge of a thread: errors are reported to the job, never swallowed.
        except Exception as error:  # noqa: BLE001
            self._on_error(error)
