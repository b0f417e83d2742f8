"""Block tables of running sequences on the device; only new entries are sent.

A table of a long context has thousands of entries, of which a decode step adds one every
`block_size` tokens. Rows are those of `LocalTables`; its rows are compared with what was sent of
them, so nothing has to report changes:

    LocalTables   row 3: blocks 7 9 4 5      sent of row 3: 7 9 4   ->  one entry travels

Where a row was given to another sequence since, all of it is sent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sps2_mega.kernels.host_to_device import array_to_device
from sps2_mega.kernels.paged_decode.dispatch import TableRows, range_stride
from sps2_mega.worker.local_tables import LocalTables

_FIRST_ROWS = 64
_FIRST_COLUMNS = 1024  # 16K tokens in blocks of 16


class DeviceTables:
    """Copy of `tables` on the device; allocated when first used."""

    def __init__(self, tables: LocalTables, device: torch.device) -> None:
        self._tables, self._device = tables, device
        self._table_RM = torch.empty((0, 0), dtype=torch.int32, device=device)
        self._sent = np.zeros(0, dtype=np.int64)  # entries of each row that the device has
        self._tenancies = np.zeros(0, dtype=np.int64)  # tenancy of the row when they were sent

    def table(self, rows_B: np.ndarray) -> Tensor:
        """Table [rows, columns], int32, in which the given rows equal those of `LocalTables` now.

        It stays the same tensor until it gets too small.
        """
        tenancies, filled = self._tables.fill(rows_B)
        self._make_room(int(rows_B.max(initial=0)) + 1, int(filled.max(initial=0)))
        known = np.where(self._tenancies[rows_B] == tenancies, self._sent[rows_B], 0)
        behind = np.flatnonzero(known < filled)
        if len(behind):
            places, block_ids = [], []
            for row, first, end in zip(
                rows_B[behind].tolist(),
                known[behind].tolist(),
                filled[behind].tolist(),
                strict=True,
            ):
                places.append(np.arange(first, end) + row * self._table_RM.shape[1])
                block_ids.append(self._tables.row(row)[first:end])
            news = array_to_device(
                np.stack([np.concatenate(places), np.concatenate(block_ids)]), self._device
            )
            self._table_RM.view(-1).index_copy_(0, news[0], news[1].int())
        self._sent[rows_B], self._tenancies[rows_B] = filled, tenancies
        return self._table_RM

    def visible(self, rows_B: np.ndarray, starts_B: np.ndarray, ends_B: np.ndarray) -> TableRows:
        """Rows of a step's sequences; number b sees local tokens [start, end) of row rows[b]."""
        table_RM = self.table(rows_B)[:, : self._tables.longest(rows_B)]
        numbers = np.zeros((3, range_stride(len(rows_B))), dtype=np.int32)
        numbers[:, : len(rows_B)] = rows_B, starts_B, ends_B
        sent = array_to_device(numbers, self._device)[:, : len(rows_B)]
        return TableRows(table_RM.index_select(0, sent[0]), sent[1], sent[2])

    def _make_room(self, num_rows: int, num_columns: int) -> None:
        rows, columns = self._table_RM.shape
        if num_rows <= rows and num_columns <= columns:
            return
        # All entries are sent again with the next use of their rows: once per doubling.
        rows = max(_FIRST_ROWS, rows, 1 << (num_rows - 1).bit_length())
        columns = max(_FIRST_COLUMNS, columns, 1 << max(0, num_columns - 1).bit_length())
        self._table_RM = torch.zeros((rows, columns), dtype=torch.int32, device=self._device)
        self._sent = np.zeros(rows, dtype=np.int64)
        self._tenancies = np.full(rows, -1, dtype=np.int64)
