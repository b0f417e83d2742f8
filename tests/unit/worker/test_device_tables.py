"""Block tables on the device equal those of `LocalTables`, and only new entries are sent."""

import random

import numpy as np
import pytest
import torch
from triton_device import DEVICES

from sps2_mega.kernels.backend import Backend
from sps2_mega.kernels.paged_decode.dispatch import prepare
from sps2_mega.parallel.groups import SINGLE
from sps2_mega.types import DecodeItem
from sps2_mega.worker import device_tables as module
from sps2_mega.worker.batching import decode_tokens
from sps2_mega.worker.device_tables import DeviceTables
from sps2_mega.worker.local_tables import LocalTables

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def sent(monkeypatch):
    """Shapes of what is uploaded from now on."""
    shapes = []

    def to_device(values, device):
        shapes.append(values.shape)
        return torch.from_numpy(values)

    monkeypatch.setattr(module, "array_to_device", to_device)
    return shapes


def test_any_history_gives_the_tables_that_would_be_made_anew(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_ROWS", 2)
    monkeypatch.setattr(module, "_FIRST_COLUMNS", 2)
    randomness = random.Random(3)
    tables = LocalTables(rank=0, block_size=BLOCK_SIZE)
    on_device = DeviceTables(tables, CPU)
    lengths: dict[int, int] = {}
    next_id = next_block = 0
    for _ in range(120):
        if lengths and randomness.random() < 0.2:
            gone = randomness.choice(list(lengths))
            tables.remove(gone)
            del lengths[gone]
        if randomness.random() < 0.3 or not lengths:
            tokens = randomness.randint(1, 40)
            blocks = range(next_block, next_block + -(-tokens // BLOCK_SIZE))
            # Some blocks are on another rank, and a sequence may have none here.
            ranks = [randomness.randint(0, 1) for _ in blocks]
            tables.add(next_id, ranks, list(blocks), tokens)
            next_block, lengths[next_id] = blocks.stop, tokens
            next_id += 1
        chosen = randomness.sample(list(lengths), randomness.randint(0, len(lengths)))
        for seq_id in chosen:
            if lengths[seq_id] % BLOCK_SIZE == 0:
                tables.add_block(seq_id, 0, next_block, lengths[seq_id] // BLOCK_SIZE)
                next_block += 1
            if tables.last_rank(seq_id) == 0:
                tables.append_token(seq_id, lengths[seq_id])
            lengths[seq_id] += 1
        table, starts, ends = tables.view(chosen, None)
        rows = on_device.visible(tables.rows(chosen), starts, ends)
        assert rows.block_table_BM.dtype == rows.starts_B.dtype == rows.ends_B.dtype == torch.int32
        assert rows.starts_B.tolist() == starts.tolist() and rows.ends_B.tolist() == ends.tolist()
        for row, blocks, end in zip(rows.block_table_BM.tolist(), table, ends, strict=True):
            count = -(-int(end) // BLOCK_SIZE)
            assert row[:count] == blocks[:count].tolist()


def test_a_step_sends_only_blocks_that_are_new(monkeypatch):
    tables = LocalTables(rank=0, block_size=BLOCK_SIZE)
    on_device = DeviceTables(tables, CPU)
    tables.add(7, [0] * 900, list(range(900)), 3600)
    tables.add(8, [0], [1000], 2)
    rows = tables.rows([7, 8])
    shapes = sent(monkeypatch)
    first = on_device.table(rows)
    assert shapes == [(2, 901)]
    assert on_device.table(rows) is first and len(shapes) == 1
    tables.add_block(7, 0, 1001, 900)
    assert on_device.table(rows) is first
    assert shapes[1:] == [(2, 1)]
    assert first[rows[0], 899:901].tolist() == [899, 1001]
    tables.remove(8)
    tables.add(9, [0, 0], [4, 3], 8)  # takes the row of 8
    assert tables.rows([9]) == rows[1:]
    assert on_device.table(tables.rows([9]))[rows[1], :2].tolist() == [4, 3]
    assert shapes[2:] == [(2, 2)]
    tables.add(10, [0] * 1025, list(range(1025)), 4100)  # more columns than there are
    grown = on_device.table(tables.rows([7, 9, 10]))
    assert grown is not first and grown[rows[0], :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_attention_over_it_equals_attention_over_a_table_made_for_the_step(device):
    kernels = pytest.importorskip("sps2_mega.kernels.paged_decode.triton")
    device = torch.device(device)
    tables = LocalTables(rank=0, block_size=BLOCK_SIZE)
    for seq_id, tokens in enumerate((1, 23, 4, 9)):
        count = -(-tokens // BLOCK_SIZE)
        tables.add(seq_id, [0] * count, [6 * (seq_id + 1) - i for i in range(count)], tokens)
    items = [DecodeItem(2, 5, 4, (0, 30)), DecodeItem(0, 5, 1, None), DecodeItem(1, 5, 23, None)]
    new = decode_tokens(items, tables, SINGLE, block_size=BLOCK_SIZE)
    cache = torch.randn(2, 31, BLOCK_SIZE, 2, 16, device=device)
    q = torch.randn(3, 8, 16, device=device)
    for window in (None, 6):
        anew = prepare(
            *new.visible(tables, window),
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=device,
            backend=Backend.TRITON,
        )
        kept = DeviceTables(tables, device).visible(*new.ranges(tables, window))
        results = [
            kernels.paged_decode(
                q,
                *cache,
                block_table_BM=rows.block_table_BM,
                starts_B=rows.starts_B,
                ends_B=rows.ends_B,
                scale=0.25,
            )
            for rows in (anew, kept)
        ]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_a_step_without_sequences():
    on_device = DeviceTables(LocalTables(rank=0, block_size=BLOCK_SIZE), CPU)
    nothing = np.zeros(0, dtype=np.int64)
    rows = on_device.visible(nothing, nothing, nothing)
    assert rows.block_table_BM.shape == (0, 0)
    assert len(rows.starts_B) == len(rows.ends_B) == 0
