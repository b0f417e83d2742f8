"""One-token attention over a block table, in the form that suits the device.

On CUDA our own kernel reads the cache in place, for any lengths, straight from the block table;
torch's operations need rows gathered into buckets of similar length. Either layout is prepared
once per step, from numpy, and used by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.paged_decode import sdpa


@dataclass(frozen=True, slots=True)
class TableRows:
    """Row b sees tokens [start, end) of its blocks: int32 on the device, [B, M], [B] and [B]."""

    block_table_BM: Tensor
    starts_B: Tensor
    ends_B: Tensor


DecodeRows = TableRows | Sequence[sdpa.Bucket]


def prepare(
    block_table_BM: np.ndarray,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend | None = None,
) -> DecodeRows:
    """Prepare a step's rows for `paged_decode` (numpy in, device tensors out).

    Args:
        block_table_BM: [B, M] block ids.
        starts_B, ends_B: [B]; row b sees tokens [start, end) of its blocks.
        block_size: tokens of a block.
        dtype: type of the queries.
        device: device of the tensors.
        backend: form to use; None lets the device decide.
    """
    if choose(device, backend) is Backend.TRITON:
        return _table_rows(block_table_BM, starts_B, ends_B, device)
    return sdpa.prepare(
        block_table_BM, starts_B, ends_B, block_size=block_size, dtype=dtype, device=device
    )


def paged_decode(
    q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, rows: DecodeRows, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One-token attention over rows from `prepare`, as `reference.paged_decode`."""
    if isinstance(rows, TableRows):
        from sps2_mega.kernels.paged_decode import triton

        return triton.paged_decode(
            q_BNH,
            k_cache,
            v_cache,
            block_table_BM=rows.block_table_BM,
            starts_B=rows.starts_B,
            ends_B=rows.ends_B,
            scale=scale,
        )
    return sdpa.paged_decode(q_BNH, k_cache, v_cache, rows, scale=scale)


def range_stride(rows: int) -> int:
    """Entries of the starts, and of the ends, in a packed table: padded to whole 16 bytes.

    The kernel would otherwise be compiled once more for each alignment that occurs.
    """
    return -(-rows // 4) * 4


def table_rows(packed: Tensor, rows: int, columns: int) -> TableRows:
    """Views of a packed table (int32): starts, ends, then the block table [rows, columns]."""
    stride = range_stride(rows)
    return TableRows(
        block_table_BM=packed[2 * stride :].view(rows, columns),
        starts_B=packed[:rows],
        ends_B=packed[stride : stride + rows],
    )


def _table_rows(
    block_table_BM: np.ndarray, starts_B: np.ndarray, ends_B: np.ndarray, device: torch.device
) -> TableRows:
    """Copy the three tables to the device as one."""
    rows, columns = block_table_BM.shape
    padded = np.zeros((2, range_stride(rows)), dtype=np.int32)
    padded[:, :rows] = starts_B, ends_B
    packed = np.concatenate(
        [padded.ravel(), block_table_BM.ravel()], dtype=np.int32, casting="same_kind"
    )
    return table_rows(torch.from_numpy(packed).to(device), rows, columns)
