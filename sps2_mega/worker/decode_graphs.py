"""Decode steps as replays of captured CUDA graphs: one launch for the whole model.

Without graphs a step launches some twenty kernels per layer. A graph is captured when a step first
needs its size (`batch_bucket`, `table_bucket`), from the code that other steps run. Numbers that
change from step to step lie in static buffers that are written before each replay:

    token | position | slot | row of the block table | start | end    of each sequence, [6, rows]

Rows of padding are token 0 at position 0, slot -1 (nowhere) and no keys. The block table is the
device's own (`device_tables`); a graph takes its rows from it, and is dropped when it moves.

Only for one rank with dense decode on our own kernels: exchanges between ranks are not captured.
Sampling stays outside, on the logits of the rows that are sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.decode import DecodeAttention, DenseKeys
from sps2_mega.attention.step import StepAttention
from sps2_mega.config import EngineConfig
from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.paged_decode.dispatch import TableRows, range_stride
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.groups import SINGLE, ParallelGroups

_NUMBERS = 6
_SLOT = 2
_SHORTEST_TABLE = 64  # blocks


class Recorder(Protocol):
    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Capture `work`; return its replay on the same memory, and the tensor it writes."""
        ...


class CudaRecorder:
    """Graphs of one device; only one runs at a time, so they share memory for intermediates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # A first run compiles kernels and lets libraries choose theirs, which a capture does not
        # allow.
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (server, watchdogs) may use the device meanwhile; only errors of this one
        # count.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass(frozen=True, slots=True)
class _Captured:
    """A captured graph; the host writes `staged`, pinned where the device reads it by itself."""

    staged_6B: Tensor
    static_6B: Tensor
    replay: Callable[[], object]
    logits_BV: Tensor


class DecodeGraphs:
    """Graphs by (rows, columns). Logits must have been used before the next call."""

    def __init__(self, model: GPT, pool: KVPool, recorder: Recorder, device: torch.device) -> None:
        self._model, self._pool = model, pool
        self._recorder, self._device = recorder, device
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._table_RM: Tensor | None = None

    def __len__(self) -> int:
        return len(self._captured)

    def logits(self, numbers_6B: np.ndarray, table_RM: Tensor, *, longest: int) -> Tensor:
        """Logits [B, vocab] float32 after one token of each sequence, whose key and value are
        written to its slot.

        `numbers_6B` are as above; sequence b sees tokens [start, end) of row rows[b] of `table_RM`
        (device, int32), in which no sequence has more than `longest` blocks.
        """
        if table_RM is not self._table_RM:
            self._captured.clear()
            self._table_RM = table_RM
        batch = numbers_6B.shape[1]
        size = batch_bucket(batch), min(table_bucket(longest), table_RM.shape[1])
        captured = self._captured.get(size)
        staged_6B = self._numbers(size[0], pinned=True) if captured is None else captured.staged_6B
        staged = staged_6B.numpy()
        staged[:] = 0
        staged[_SLOT] = -1
        staged[:, :batch] = numbers_6B
        if captured is None:
            captured = self._captured[size] = self._capture(size, staged_6B, table_RM)
        captured.static_6B.copy_(staged_6B, non_blocking=True)
        captured.replay()
        return captured.logits_BV[:batch]

    def _capture(self, size: tuple[int, int], staged_6B: Tensor, table_RM: Tensor) -> _Captured:
        """Capture a graph. Its first run is this step: it writes what the replay writes again."""
        rows, columns = size
        static_6B = self._numbers(rows, pinned=False)
        static_6B.copy_(staged_6B)
        tokens_T, positions_T, slots_T, rows_T = static_6B[:4, :rows]

        def work() -> Tensor:
            ranges_2B = static_6B[4:].int()[:, :rows]
            table_BM = table_RM[:, :columns].index_select(0, rows_T)
            keys = DenseKeys(TableRows(table_BM, *ranges_2B))
            kind = DecodeAttention(self._pool, keys, [rows], SINGLE)
            attention = StepAttention(self._pool, slots_T, kind)
            return self._model.logits(self._model.hidden(tokens_T, positions_T, attention))

        replay, logits_BV = self._recorder.capture(work)
        return _Captured(staged_6B, static_6B, replay, logits_BV)

    def _numbers(self, rows: int, *, pinned: bool) -> Tensor:
        """Buffer for the numbers of a bucket; each kind starts at a multiple of 16 bytes."""
        return torch.zeros(
            (_NUMBERS, range_stride(rows)),
            dtype=torch.int64,
            device=torch.device("cpu") if pinned else self._device,
            pin_memory=pinned and self._device.type == "cuda",
        )


def make_decode_graphs(
    config: EngineConfig, model: GPT, pool: KVPool, groups: ParallelGroups, device: torch.device
) -> DecodeGraphs | None:
    """Graphs of a rank; None where they are off, or where steps cannot be captured."""
    if config.cuda_graphs == "off" or device.type != "cuda" or groups.world_size > 1:
        return None
    if config.decode_attention != "dense" or choose(device, None) is not Backend.TRITON:
        return None
    return DecodeGraphs(model, pool, CudaRecorder(device), device)


def batch_bucket(batch: int) -> int:
    """Rows of the graph for `batch` sequences: 1, 2, 4, 8, then multiples of 8, from 64 on of 32.

    Close sizes waste little, far ones need few graphs: rows of padding see no keys, but they run
    through the products.
    """
    if batch <= 8:
        return 1 << (batch - 1).bit_length()
    step = 8 if batch <= 64 else 32
    return -(-batch // step) * step


def table_bucket(num_blocks: int) -> int:
    """Columns of the graph's block table for rows of `num_blocks` blocks: a power of two."""
    return max(_SHORTEST_TABLE, 1 << max(0, num_blocks - 1).bit_length())
