"""Between the two sides of a job: point to point between any two ranks, whatever groups they are in
otherwise.

A gloo group over all ranks of the job beside torch's default group, which is each side's own. It
carries CPU tensors; data of other devices is staged by those who send and receive.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from sps2_mega.comm.channel import Channel, OnMessage, PointToPoint
from sps2_mega.errors import RankFailure

# A rank waits for messages as long as it takes; a dead peer is the watchdog's business.
_TIMEOUT = timedelta(days=30)
_CLOSING_S = 30.0
_POLL_S = 0.005


class Bridge:
    """All ranks open it together and close it together; channels are numbered alike on all of
    them."""

    @classmethod
    def open(cls, store: dist.Store, rank: int, world_size: int) -> Bridge:
        """Connects this rank with all others of the job, through `store`."""
        own = dist.PrefixStore("sps2/bridge", store)
        group = dist.ProcessGroupGloo(own, rank, world_size, _TIMEOUT)
        return cls(cast(PointToPoint, group), own, rank, world_size)

    def __init__(self, group: PointToPoint, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._group: PointToPoint | None = group
        self._store = store
        self._channels: list[Channel] = []

    def channel(
        self,
        *,
        on_message: OnMessage,
        on_error: Callable[[BaseException], None],
        max_batches: int = 0,
    ) -> Channel:
        """The next channel; every rank makes the same ones in the same order (see `Channel`)."""
        assert self._group is not None, "the bridge is closed"
        channel = Channel(
            self._group,
            len(self._channels),
            on_message=on_message,
            on_error=on_error,
            max_batches=max_batches,
        )
        self._channels.append(channel)
        return channel

    def close(self) -> None:
        """Leaves together with all other ranks, when nobody has anything to send any more. Safe to
        call twice.

        Raises:
            RankFailure: not all ranks came in time.
        """
        if self._group is None:
            return
        # Receivers must be there until the last message of any rank has come.
        for channel in self._channels:
            channel.flush()
        self._meet("silent")
        for channel in self._channels:
            channel.finish((self.rank + 1) % self.world_size)
        # The first to leave breaks connections, which those still waiting for their last message
        # would notice.
        self._meet("closed")
        self._group = None

    def _meet(self, name: str) -> None:
        self._store.add(name, 1)
        deadline = time.monotonic() + _CLOSING_S
        while (came := self._store.add(name, 0)) < self.world_size:
            if time.monotonic() > deadline:
                raise RankFailure(
                    f"only {came} of {self.world_size} ranks came to the end of the job"
                )
            time.sleep(_POLL_S)
