"""Queries and heads are cut without loss, evenly, and alike on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.layout.heads import head_groups, split_heads
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.pipeline.micro_batches import (
    MAX_AUTO,
    SmallestPart,
    cut_by_heads_and_queries,
    num_micro_batches,
)
from sps2_mega.attention.pipeline.parts import cut_queries, seen_keys
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.errors import ConfigError

BLOCK = 4


@st.composite
def layouts(draw):
    sp = draw(st.integers(1, 4))
    ends = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    starts = [draw(st.integers(0, end - 1)) for end in ends]
    ranks = [[draw(st.integers(0, sp - 1)) for _ in range(-(-end // BLOCK))] for end in ends]
    return build_layout(ranks, ends, block_size=BLOCK, sp_size=sp, starts=starts).queries


@given(layouts(), st.integers(1, 12), st.sampled_from([None, 1, 5]))
def test_parts_hold_each_query_once_and_find_it(queries, num_parts, window):
    parts = cut_queries(queries, num_parts, window=window)
    assert len(parts) == num_parts
    for rank, count in enumerate(queries.counts):
        assert [i for part in parts for i in range(count)[part.local[rank]]] == list(range(count))
    position = {  # (rank, local token) -> (sequence, position)
        (run.rank, run.local_start + i): (run.sequence, run.start + i)
        for run in queries.runs
        for i in range(run.num_tokens)
    }
    for part in parts:
        arriving = [
            position[rank, i]
            for rank, local in enumerate(part.local)
            for i in range(local.start, local.stop)
        ]
        index = np.arange(len(arriving)) if part.index is None else part.index
        ordered = [arriving[i] for i in index]
        assert len(ordered) == sum(part.counts)
        named = [(run.sequence, p) for run in part.runs for p in range(run.start, run.end)]
        assert ordered == named
        assert [run.row for run in part.runs] == [
            sum(other.end - other.start for other in part.runs[:i]) for i in range(len(part.runs))
        ]
    assert seen_keys(queries, window=window) == sum(
        min(p + 1, window or p + 1) for _, p in position.values()
    )


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_parts_of_a_long_prompt_cost_about_the_same(num_parts):
    sp, blocks = 4, 256
    ranks = [[b * sp // blocks for b in range(blocks)]]
    queries = build_layout(ranks, [blocks * BLOCK - 1], block_size=BLOCK, sp_size=sp).queries
    costs = [
        sum(sum(range(run.start + 1, run.end + 1)) for run in part.runs)
        for part in cut_queries(queries, num_parts)
    ]
    assert sum(costs) == seen_keys(queries)
    assert max(costs) < 1.15 * sum(costs) / num_parts
    counts = [part.counts for part in cut_queries(queries, num_parts)]
    # Every rank gives about the same share, so no link idles, and later parts are smaller.
    assert all(max(c) - min(c) <= 1 for c in counts)
    assert counts[0][0] > counts[-1][0]


def test_uncut_contiguous_queries_are_one_run_per_sequence():
    layout = build_layout([[0, 0, 1, 1], [0, 1]], [15, 6], block_size=BLOCK, sp_size=2)
    (part,) = cut_queries(layout.queries, 1)
    assert [(run.sequence, run.start, run.end) for run in part.runs] == [(0, 0, 15), (1, 0, 6)]


@given(
    st.sampled_from([(1, 1), (4, 1), (8, 4), (6, 6), (12, 3)]),
    st.integers(1, 8),
    st.integers(1, 9),
)
def test_head_groups_hold_the_heads_of_each_rank_once(heads, num_ranks, num_groups):
    groups = head_groups(*heads, num_ranks, num_groups)
    assert len(groups) == num_groups
    for rank, (query_heads, kv_heads) in enumerate(split_heads(*heads, num_ranks)):
        own = [group[rank] for group in groups]
        assert [h for q, _ in own for h in q] == list(query_heads)
        if query_heads:
            assert [h for _, kv in own for h in kv] == list(kv_heads)  # none twice: same bytes


SMALLEST = SmallestPart(num_bytes=1000, flops=100)


def automatic(num_bytes, flops, **settings):
    return num_micro_batches(
        PipelineSettings(**settings), num_bytes=num_bytes, flops=flops, smallest=SMALLEST
    )


def test_micro_batches_need_bytes_and_work():
    assert automatic(1_000_000, 1_000_000) == MAX_AUTO
    assert automatic(3_500, 1_000_000) == 3
    assert automatic(1_000_000, 450) == 4
    assert automatic(10, 10) == 1
    assert automatic(0, 1_000_000) == automatic(0, 1_000_000, mode="on") == 1
    assert automatic(10, 10, mode="on") == 2
    assert automatic(1_000_000, 1_000_000, mode="off") == 1
    assert automatic(0, 0, micro_batches=5) == 5


def test_heads_are_cut_before_queries():
    def cut(*args):
        found = cut_by_heads_and_queries(args[0], kv_heads=args[1], query_tokens=args[2])
        return found.head_groups, found.query_parts

    assert cut(8, 2, 1000) == (2, 4)
    assert cut(8, 32, 1000) == (8, 1)
    assert cut(8, 3, 1000) == (3, 3)
    assert cut(8, 1, 3) == (1, 3)
    assert cut(1, 4, 0) == (1, 1)
    assert cut(100, 2, 0) == (2, 1)


def test_contradictory_settings_are_refused():
    with pytest.raises(ConfigError, match="micro_batches must be at least 1, got 0"):
        PipelineSettings(micro_batches=0)
    with pytest.raises(ConfigError, match="micro_batches=3"):
        PipelineSettings(mode="off", micro_batches=3)
