"""Point-to-point messages between CPUs that overlap with computation, and their completion times.

    messages = post_messages(sends, receives, group)     # [(group rank, flat tensor), ..] both ways
    ... compute ...
    messages.wait()

Receives are posted before sends. A gloo all-to-all does not do that: two ranks that exchange one
large message each over a slow link need up to twice the link's time with it, and the link's time
here. Messages between two ranks of a group match in the order in which they were posted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from sps2_mega.parallel.groups import Group

Addressed = Sequence[tuple[int, Tensor]]


class Messages:
    """Handle of posted messages, with the interface of torch's `Work`.

    Tensors must stay referenced until `wait` returns.
    """

    def __init__(self, receives: list[Any], sends: list[Any]) -> None:
        self._posted = receives + sends
        self._complete: torch.futures.Future[None] = torch.futures.Future()

    def get_future(self) -> torch.futures.Future[None]:
        """Future that completes when everything is received and sent."""
        return self._complete

    def wait(self) -> None:
        """Wait for completion; raise on failure: a dead peer, or the group's timeout."""
        self._complete.wait()

    def follow(self) -> None:
        """Wait on behalf of all other waiters: a message may be waited for only once."""
        try:
            for work in self._posted:
                work.wait()
        except BaseException as error:  # noqa: BLE001  every waiter must see any error
            self._complete.set_exception(error)  # type: ignore[arg-type]
        else:
            self._complete.set_result(None)


def post_messages(sends: Addressed, receives: Addressed, group: Group) -> Messages:
    """Post contiguous CPU tensors to and from ranks of the group; both ends skip empty ones."""
    receiving = [
        dist.irecv(tensor, group=group.handle, group_src=rank)
        for rank, tensor in receives
        if tensor.numel()
    ]
    sending = [
        dist.isend(tensor, group=group.handle, group_dst=rank)
        for rank, tensor in sends
        if tensor.numel()
    ]
    messages = Messages(receiving, sending)
    _follower(group)(messages.follow)
    return messages


def _follower(group: Group) -> Callable[[Callable[[], None] | None], None]:
    """Return the function that queues calls for the group's thread; None ends it.

    gloo moves bytes by itself but reports completion only to a waiter.
    """
    key = id(group.handle)
    queue = _queues.get(key)
    if queue is None:
        queue = _queues[key] = SimpleQueue()
        threading.Thread(target=_run, args=(queue,), name="sps2-messages", daemon=True).start()
        # The thread ends with the group.
        weakref.finalize(group.handle, _forget, key).atexit = False
    return queue.put


def _run(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := queue.get()) is not None:
        call()
        del call  # it refers to the group, through the messages that it follows


def _forget(key: int) -> None:
    _queues.pop(key).put(None)


_queues: dict[int, SimpleQueue[Callable[[], None] | None]] = {}
