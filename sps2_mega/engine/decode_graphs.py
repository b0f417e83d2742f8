"""Decode steps as replays of captured CUDA graphs: one launch for the whole model instead of some twenty per layer.

A graph is captured when a step first needs its size (`decode_buckets`), from the same code that other steps run. What
changes from step to step lies in static buffers that are written before each replay:

    tokens | positions | slots   [3, rows]         rows of padding: token 0 at position 0, slot -1 (nowhere)
    starts | ends | block table  rows x columns    rows of padding: no keys

Only for one rank with dense decode on our own kernels: exchanges between ranks are not captured. Sampling stays
outside, on the logits of the rows that are sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.decode import DecodeAttention, DenseKeys
from sps2_mega.config import EngineConfig
from sps2_mega.engine.decode_buckets import batch_bucket, table_bucket
from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.paged_decode.dispatch import range_stride, table_rows
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.groups import SINGLE, ParallelGroups

_ROWS_OF_NUMBERS = 3


class Recorder(Protocol):
    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """How to do `work` again on the same memory, and the tensor that each replay writes its result to."""
        ...


class CudaRecorder:
    """Graphs of one device; they share memory for what is in between, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # Kernels are compiled and libraries choose theirs in a first run, which a capture cannot take.
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (server, watchdogs) may use the device meanwhile; only this one's mistakes count.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass(frozen=True, slots=True)
class _Captured:
    """`staged` are what the host writes; pinned where the device reads them by itself."""

    staged: tuple[Tensor, Tensor]
    static: tuple[Tensor, Tensor]
    replay: Callable[[], object]
    logits_BV: Tensor


class DecodeGraphs:
    """Graphs by (rows, columns). Between the call that returns logits and the next call these must have been used."""

    def __init__(self, model: GPT, pool: KVPool, recorder: Recorder, device: torch.device) -> None:
        self._model, self._pool = model, pool
        self._recorder, self._device = recorder, device
        self._captured: dict[tuple[int, int], _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def logits(
        self,
        tokens: list[int],
        positions: list[int],
        slots: list[int],
        block_table_BM: np.ndarray,
        starts_B: np.ndarray,
        ends_B: np.ndarray,
    ) -> Tensor:
        """Logits [B, vocab] float32 after one token of each sequence, whose key and value go to its slot."""
        batch, columns = block_table_BM.shape
        size = batch_bucket(batch), table_bucket(columns)
        captured = self._captured.get(size)
        staged = self._buffers(size, pinned=True) if captured is None else captured.staged
        numbers, table = (buffer.numpy() for buffer in staged)
        numbers[:2] = 0
        numbers[2] = -1
        numbers[:, :batch] = tokens, positions, slots
        stride = range_stride(size[0])
        table[: 2 * stride] = 0
        table[:batch], table[stride : stride + batch] = starts_B, ends_B
        # Entries past a row's end are never read, so what an earlier step left there may stay.
        table[2 * stride :].reshape(size)[:batch, :columns] = block_table_BM
        if captured is None:
            captured = self._captured[size] = self._capture(size, staged)
        for static, source in zip(captured.static, staged, strict=True):
            static.copy_(source, non_blocking=True)
        captured.replay()
        return captured.logits_BV[:batch]

    def _capture(self, size: tuple[int, int], staged: tuple[Tensor, Tensor]) -> _Captured:
        """Its first run is this step's own: it writes what the replay will write again."""
        static = self._buffers(size, pinned=False)
        for buffer, source in zip(static, staged, strict=True):
            buffer.copy_(source)
        numbers, table = static
        tokens_T, positions_T, slots_T = numbers
        keys = DenseKeys(table_rows(table, *size))
        attention = DecodeAttention(self._pool, slots_T, keys, [size[0]], SINGLE)

        def work() -> Tensor:
            return self._model.logits(self._model.hidden(tokens_T, positions_T, attention))

        replay, logits_BV = self._recorder.capture(work)
        return _Captured(staged, static, replay, logits_BV)

    def _buffers(self, size: tuple[int, int], *, pinned: bool) -> tuple[Tensor, Tensor]:
        rows, columns = size
        on_host = pinned and self._device.type == "cuda"
        device = torch.device("cpu") if pinned else self._device
        numbers = torch.zeros(
            _ROWS_OF_NUMBERS, rows, dtype=torch.int64, device=device, pin_memory=on_host
        )
        length = 2 * range_stride(rows) + rows * columns
        table = torch.zeros(length, dtype=torch.int32, device=device, pin_memory=on_host)
        return numbers, table


def make_decode_graphs(
    config: EngineConfig, model: GPT, pool: KVPool, groups: ParallelGroups, device: torch.device
) -> DecodeGraphs | None:
    """None where graphs are off, or steps are not of the kind that can be captured."""
    if config.cuda_graphs == "off" or device.type != "cuda" or groups.world_size > 1:
        return None
    if config.decode_attention != "dense" or choose(device, None) is not Backend.TRITON:
        return None
    return DecodeGraphs(model, pool, CudaRecorder(device), device)
