"""Ranks as threads of one process, for tests that try very many shapes: exchanges go through
queues.

Only what the transports post is replaced (`comm.exchange.post_all_to_all`); sums of bytes are
counted as there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sps2_mega.parallel.groups import Group

_TIMEOUT_S = 10


class _Pending:
    def __init__(self, boxes: list[queue.Queue], like: torch.Tensor, sizes: Sequence[int]) -> None:
        self.posted_at, self.finished_at = time.perf_counter(), None
        self._boxes, self._like, self._sizes = boxes, like, sizes

    def wait(self) -> torch.Tensor:
        pieces = [box.get(timeout=_TIMEOUT_S) for box in self._boxes]
        assert [len(piece) for piece in pieces] == list(self._sizes), "ranks disagree on sizes"
        self.finished_at = time.perf_counter()
        return torch.cat([self._like.new_empty(0), *pieces])


class RankThreads:
    """`run(fn, size)` calls fn(group) for all ranks at once; they post by `post_all_to_all`."""

    def __init__(self, size: int) -> None:
        self.size = size
        # The n-th exchange that a rank posts meets the n-th of the others, in whatever order they
        # are waited for.
        self._posted = [0] * size
        self._boxes: dict[tuple[int, int, int], queue.Queue] = {}
        self._lock = threading.Lock()

    def run(self, fn: Callable[[Group], Any]) -> list[Any]:
        groups = [Group(rank=rank, size=self.size) for rank in range(self.size)]
        with ThreadPoolExecutor(self.size) as pool:
            return [done.result() for done in [pool.submit(fn, group) for group in groups]]

    def post_all_to_all(
        self,
        x: torch.Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        group: Group,
    ) -> _Pending:
        number = self._posted[group.rank]
        self._posted[group.rank] += 1
        for target, piece in enumerate(x.split(list(send_sizes))):
            self._box(group.rank, target, number).put(piece)
            if target != group.rank:
                group.traffic.bytes_sent += piece.nbytes
        boxes = [self._box(source, group.rank, number) for source in range(self.size)]
        return _Pending(boxes, x, receive_sizes)

    def _box(self, source: int, target: int, number: int) -> queue.Queue:
        with self._lock:
            return self._boxes.setdefault((source, target, number), queue.Queue())
