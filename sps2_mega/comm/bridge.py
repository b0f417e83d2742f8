"""Point-to-point channels between any two ranks of a job, across its rank pools.

The bridge is a gloo group over all ranks of the job, beside torch's default group, which each pool
has for itself. It carries CPU tensors; senders and receivers stage data of other devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from sps2_mega.comm.channel import Channel, OnMessage, PointToPoint
from sps2_mega.errors import RankFailure

# A rank waits for messages without limit; dead peers are left to the watchdog.
_TIMEOUT = timedelta(days=30)
_CLOSING_S = 30.0
_POLL_S = 0.005


class Bridge:
    """Gloo group over the whole job.

    All ranks open and close it together, and number its channels alike.
    """

    @classmethod
    def open(cls, store: dist.Store, rank: int, world_size: int) -> Bridge:
        """Connect this rank with all other ranks of the job through `store`."""
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
        """Open the next channel; all ranks open the same ones in the same order (see `Channel`)."""
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
        """Leave together with all other ranks, once no rank has anything left to send.

        Safe to call twice.

        Raises:
            RankFailure: some ranks did not arrive in time.
        """
        if self._group is None:
            return
        # Receivers must stay until the last message of every rank has arrived.
        for channel in self._channels:
            channel.flush()
        self._meet("silent")
        for channel in self._channels:
            channel.finish((self.rank + 1) % self.world_size)
        # The first rank to leave breaks connections, which a rank that still
        # waits for its last message would notice.
        self._meet("closed")
        self._group = None

    def _meet(self, name: str) -> None:
        self._store.add(name, 1)
        deadline = time.monotonic() + _CLOSING_S
        while (arrived := self._store.add(name, 0)) < self.world_size:
            if time.monotonic() > deadline:
                raise RankFailure(
                    f"only {arrived} of {self.world_size} ranks reached the end of the job"
                )
            time.sleep(_POLL_S)
