"""Block tables: the order of blocks, and the blocks of each rank."""

import time

from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.kv_cache.block_table import BlockTable


def table_of(block_size: int, *blocks: tuple[int, int]) -> BlockTable:
    table = BlockTable(block_size)
    table.extend([rank for rank, _ in blocks], [block_id for _, block_id in blocks])
    return table


def test_a_table_knows_its_blocks_in_order():
    table = table_of(4, (0, 7), (0, 2), (1, 9))
    assert (list(table.ranks), list(table.block_ids)) == ([0, 0, 1], [7, 2, 9])
    assert (table.num_blocks, table.capacity, table.last_rank) == (3, 12, 1)


def test_local_views_follow_appends():
    table = table_of(4, (0, 7), (0, 2), (1, 9))
    assert list(table.local_blocks(0)) == [(0, 7), (1, 2)]
    assert list(table.local_blocks(5)) == []
    table.append(0, 3)
    assert list(table.local_blocks(0)) == [(0, 7), (1, 2), (3, 3)]


@given(st.lists(st.integers(0, 3), max_size=20))
def test_local_blocks_equal_a_walk_over_all_blocks(ranks):
    table = table_of(2, *[(rank, 100 + i) for i, rank in enumerate(ranks)])
    for rank in range(4):
        walked = [(i, 100 + i) for i, owner in enumerate(ranks) if owner == rank]
        assert list(table.local_blocks(rank)) == walked


def test_decode_steps_do_not_walk_a_long_table():
    table = BlockTable(16)
    for index in range(65536):
        table.append(index % 2, index // 2)

    def steps(num_steps: int) -> float:
        start = time.perf_counter()
        for step in range(num_steps):
            table.append(step % 2, step)
            table.local_blocks(0)
        return (time.perf_counter() - start) / num_steps

    # A walk over 65536 entries takes milliseconds; these are a handful of list operations.
    assert min(steps(20) for _ in range(5)) < 2e-4
