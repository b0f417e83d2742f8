"""Block tables: location of positions and runs of each rank, with partly full last blocks."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.kv_cache.block_table import BlockTable


def table_of(block_size: int, *blocks: tuple[int, int]) -> BlockTable:
    table = BlockTable(block_size)
    table.extend([rank for rank, _ in blocks], [block_id for _, block_id in blocks])
    return table


def test_locates_positions_and_refuses_those_outside():
    table = table_of(4, (0, 7), (0, 2), (1, 9))
    assert [table.locate(p) for p in (0, 3, 4, 11)] == [(0, 7, 0), (0, 7, 3), (0, 2, 0), (1, 9, 3)]
    assert (table.num_blocks, table.capacity, table.last_rank) == (3, 12, 1)
    for position in (-1, 12):
        with pytest.raises(AssertionError, match=f"position {position} is outside the 12 tokens"):
            table.locate(position)


def test_local_views_follow_appends():
    table = table_of(4, (0, 7), (0, 2), (1, 9))
    assert list(table.local_blocks(0)) == [(0, 7), (1, 2)]
    assert list(table.local_blocks(5)) == []
    table.append(0, 3)
    assert list(table.local_blocks(0)) == [(0, 7), (1, 2), (3, 3)]
    assert table.local_runs(0, 14) == [(0, 8), (12, 14)]
    assert table.local_runs(1, 14) == [(8, 12)]
    assert table.local_runs(0, 12) == [(0, 8)]
    assert table.local_runs(0, 3) == [(0, 3)]
    assert table.local_runs(2, 14) == []
    with pytest.raises(AssertionError, match=r"num_tokens \(17\)"):
        table.local_runs(0, 17)


@settings(deadline=None)  # the machine may be busy
@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 3), max_size=20),
    st.data(),
)
def test_runs_equal_a_walk_over_all_positions(block_size, ranks, data):
    table = table_of(block_size, *[(rank, 100 + i) for i, rank in enumerate(ranks)])
    num_tokens = data.draw(st.integers(0, table.capacity))
    for rank in range(4):
        positions = [p for p in range(num_tokens) if table.locate(p)[0] == rank]
        runs = table.local_runs(rank, num_tokens)
        assert [p for start, end in runs for p in range(start, end)] == positions
        assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "neighbours not merged"
        assert table.num_local_tokens(rank, num_tokens) == len(positions)


def test_decode_steps_do_not_walk_a_long_table():
    table = BlockTable(16)
    for index in range(65536):
        table.append(index % 2, index // 2)

    def steps(num_steps: int) -> float:
        start = time.perf_counter()
        for step in range(num_steps):
            position = table.capacity
            table.append(step % 2, step)
            table.locate(position)
            table.local_blocks(0)
            table.num_local_tokens(1, position + 1)
        return (time.perf_counter() - start) / num_steps

    # A walk over 65536 entries takes milliseconds; these are a handful of list operations.
    assert min(steps(20) for _ in range(5)) < 2e-4
