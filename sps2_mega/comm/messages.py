"""Point-to-point messages between CPUs that arrive while the caller computes, and when they did.

    messages = post_messages(sends, receives, group)     # [(group rank, flat tensor), ..] both ways
    ... compute ...
    messages.wait()

Receives are announced before anything is sent. A gloo all-to-all does not do that: two ranks that
send each other one large message over a slow line take up to twice as long with it as the line
needs, and as long as the line needs here. Messages between two ranks of a group match in the order
in which they were posted.
"""

from __future__ import annotations

import threading
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
    """Messages under way; what a process group calls a work. Tensors must stay referenced until
    `wait` returns."""

    def __init__(self, receives: list[Any], sends: list[Any]) -> None:
        self._works = receives + sends
        self._complete: torch.futures.Future[None] = torch.futures.Future()

    def get_future(self) -> torch.futures.Future[None]:
        """Complete when everything has come and gone."""
        return self._complete

    def wait(self) -> None:
        """Raises what went wrong: a peer that is gone, or the group's timeout."""
        self._complete.wait()

    def follow(self) -> None:
        """Waits on behalf of everybody else: a message may be waited for only once."""
        try:
            for work in self._works:
                work.wait()
        except BaseException as error:  # noqa: BLE001  whoever waits must hear of anything
            self._complete.set_exception(error)  # type: ignore[arg-type]
        else:
            self._complete.set_result(None)


def post_messages(sends: Addressed, receives: Addressed, group: Group) -> Messages:
    """Posts contiguous CPU tensors to and from ranks of the group; empty ones are left out at both
    ends."""
    coming = [
        dist.irecv(tensor, group=group.handle, group_src=rank)
        for rank, tensor in receives
        if tensor.numel()
    ]
    going = [
        dist.isend(tensor, group=group.handle, group_dst=rank)
        for rank, tensor in sends
        if tensor.numel()
    ]
    messages = Messages(coming, going)
    _follower(group)(messages.follow)
    return messages


def _follower(group: Group) -> Callable[[Callable[[], None]], None]:
    """Hands calls to the group's thread, one after another. gloo moves bytes by itself but tells
    only those who wait."""
    queue = _queues.get(id(group.handle))
    if queue is None:
        # The thread of a group that is gone sleeps; a new one at the same address may have it.
        queue = _queues[id(group.handle)] = SimpleQueue()
        threading.Thread(target=_run, args=(queue,), name="sps2-messages", daemon=True).start()
    return queue.put


def _run(queue: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        queue.get()()


_queues: dict[int, SimpleQueue[Callable[[], None]]] = {}
