import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.worker.local_tables import LocalTables

BLOCK_SIZE = 4


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(1, 60),
)
def test_view_has_this_ranks_tokens_in_order(block_ranks, rank, unused, window):
    """Against a table of all positions, with and without a sliding window."""
    num_tokens = len(block_ranks) * BLOCK_SIZE - unused
    block_ids = [100 + index for index in range(len(block_ranks))]
    tables = LocalTables(rank=rank, block_size=BLOCK_SIZE)
    tables.add(5, block_ranks[:1], block_ids[:1], min(BLOCK_SIZE, num_tokens))
    for position in range(min(BLOCK_SIZE, num_tokens), num_tokens):
        index = position // BLOCK_SIZE
        if position % BLOCK_SIZE == 0:
            tables.add_block(5, block_ranks[index], block_ids[index], index)
        if tables.last_rank(5) == rank:
            slot = tables.append_token(5, position)
            assert slot == block_ids[index] * BLOCK_SIZE + position % BLOCK_SIZE
    whole = LocalTables(rank=rank, block_size=BLOCK_SIZE)
    whole.add(5, block_ranks, block_ids, num_tokens)

    first = max(0, num_tokens - window)
    for first_visible in (None, np.array([first])):
        expected = [
            block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for p in range(first if first_visible is not None else 0, num_tokens)
            if block_ranks[p // BLOCK_SIZE] == rank
        ]
        for table in (tables, whole):
            (ids,), (start,), (end,) = table.view([5], first_visible)
            slots = [int(i) * BLOCK_SIZE + offset for i in ids for offset in range(BLOCK_SIZE)]
            assert slots[start:end] == expected


def test_rows_are_reused_and_grow():
    tables = LocalTables(rank=0, block_size=BLOCK_SIZE)
    for seq_id in range(40):
        tables.add(seq_id, [0] * (seq_id + 1), list(range(seq_id + 1)), 4 * seq_id + 1)
    for seq_id in range(0, 40, 2):
        tables.remove(seq_id)
    for seq_id in range(100, 130):
        tables.add(seq_id, [1], [0], 3)
    assert len(tables) == 50
    ids, starts, ends = tables.view([39, 101, 1], None)
    assert ends.tolist() == [157, 0, 5]
    assert starts.tolist() == [0, 0, 0]
    assert ids[0].tolist() == list(range(40))
