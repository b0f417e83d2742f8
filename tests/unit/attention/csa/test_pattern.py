from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.attention.csa.pattern import CSAPattern, residue, topology_spans
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.planner.sparse_volume import (
    flops_ratio,
    long_flops_ratio,
    visible_keys,
    visible_pairs,
)
from sps2_mega.errors import ConfigError


def csa(degrees=(1, 4), spans=(8,), sinks=0, halo=0, tail=0, sample_queries=False, block=1):
    return CSAPattern(
        degrees=degrees,
        spans=spans,
        sinks=sinks,
        halo=halo,
        tail=tail,
        sample_queries=sample_queries,
        block=block,
    )


@st.composite
def patterns(draw):
    degrees = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    spans = draw(st.lists(st.integers(1, 25), min_size=len(degrees) - 1, max_size=len(degrees) - 1))
    block = draw(st.integers(1, 7))
    if block > 1:
        degrees[0] = 1
    return csa(
        tuple(degrees),
        tuple(sorted(spans)),
        sinks=draw(st.integers(0, 12)),
        halo=draw(st.integers(0, 30)),
        tail=draw(st.integers(0, 9)),
        sample_queries=draw(st.booleans()) if block == 1 else False,
        block=block,
    )


@st.composite
def runs(draw, longest=61):
    """Prompt length, queries, keys, KV heads and layer, none of them aligned to anything."""
    length = draw(st.integers(1, longest))
    start, stop = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    low, high = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    first = draw(st.integers(0, 5))
    heads = range(first, first + draw(st.integers(1, 7)))
    return length, range(start, stop), range(low, high), heads, draw(st.integers(0, 9))


def pairs_of(piece):
    for t, i in enumerate(piece.queries):
        keys = list(piece.keys)
        for j in keys[: t + 1] if piece.causal else keys:
            for head in piece.kv_heads:
                yield i, j, head


def brute_force(pattern, length, queries, keys, heads, layer):
    return {
        (i, j, number)
        for i in queries
        for j in keys
        for number, head in enumerate(heads)
        if pattern.sees(i, j, kv_head=head, layer=layer, prompt_len=length)
    }


@settings(max_examples=300, deadline=None)
@given(patterns(), runs())
def test_every_visible_pair_is_in_exactly_one_piece(pattern, run):
    length, queries, keys, heads, layer = run
    pieces = csa_pieces(
        pattern, prompt_len=length, queries=queries, keys=keys, kv_heads=heads, layer=layer
    )
    counted = Counter(pair for piece in pieces for pair in pairs_of(piece))
    expected = brute_force(pattern, length, queries, keys, heads, layer)
    assert set(counted) == expected
    assert set(counted.values()) <= {1}
    assert len(expected) == visible_pairs(
        pattern, prompt_len=length, queries=queries, keys=keys, kv_heads=heads, layer=layer
    )
    for piece in pieces:
        assert piece.queries and piece.keys and piece.kv_heads
        if piece.causal:
            assert len(piece.queries) == len(piece.keys)
            assert piece.queries.step == piece.keys.step


@settings(max_examples=300, deadline=None)
@given(patterns(), runs())
def test_exactly_the_visible_keys_travel(pattern, run):
    length, queries, keys, heads, layer = run
    slices = visible_keys(
        pattern, prompt_len=length, queries=queries, keys=keys, kv_heads=heads, layer=layer
    )
    rows = [(j, head) for part in slices for j in part.keys for head in part.kv_heads]
    pairs = brute_force(pattern, length, queries, keys, heads, layer)
    assert sorted(rows) == sorted({(j, head) for _, j, head in pairs})
    assert len(rows) == sum(part.num_rows for part in slices)


@settings(deadline=None)
@given(patterns(), runs())
def test_a_key_range_and_a_query_range_can_be_cut_anywhere(pattern, run):
    length, queries, keys, heads, layer = run
    common = dict(prompt_len=length, kv_heads=heads, layer=layer)
    whole = visible_pairs(pattern, queries=queries, keys=keys, **common)
    half, third = len(keys) // 2, len(queries) // 3
    assert whole == sum(
        visible_pairs(pattern, queries=q, keys=k, **common)
        for q in (queries[:third], queries[third:])
        for k in (keys[:half], keys[half:])
    )


@settings(deadline=None)
@given(patterns(), runs(longest=40))
def test_without_query_sampling_no_position_is_hidden_from_all_heads_and_layers(pattern, run):
    length, queries, *_ = run
    pattern = replace(pattern, sample_queries=False)
    for i in queries:
        for j in range(i + 1):
            assert any(
                pattern.sees(i, j, kv_head=0, layer=layer, prompt_len=length)
                for layer in range(max(pattern.degrees))
            )


def test_levels_are_the_smallest_cell_that_holds_both():
    pattern = csa((1, 2, 4), (8, 24))
    assert [pattern.level(30, j) for j in (30, 24, 23, 0)] == [0, 0, 2, 2]
    assert [pattern.level(47, j) for j in (40, 39, 24, 23)] == [0, 1, 1, 2]
    assert csa((1,), ()).level(10**6, 0) == 0


def test_the_residue_rotates_with_the_layer():
    assert [residue(head, 0, 4) for head in range(5)] == [0, 1, 2, 3, 0]
    assert [residue(1, layer, 3) for layer in range(4)] == [1, 2, 0, 1]


def test_sinks_halo_and_tail_are_seen_where_the_stride_hides():
    pattern = csa((1, 4), (8,), sinks=2, halo=3, tail=1)
    seen = [j for j in range(20) if pattern.sees(19, j, kv_head=2, layer=0, prompt_len=64)]
    assert seen == [0, 1, 2, 6, 10, 13, 14, 15, 16, 17, 18, 19]
    last = [j for j in range(64) if pattern.sees(63, j, kv_head=2, layer=0, prompt_len=64)]
    assert last == list(range(64))


def test_few_pieces_do_a_long_prompt():
    """8 cells: a triangle each; far keys per residue, halo and sinks."""
    pattern = csa((1, 4), (2048,), sinks=16, halo=128)
    pieces = csa_pieces(pattern, prompt_len=16384, queries=range(16384), kv_heads=range(8), layer=3)
    assert sum(piece.causal for piece in pieces) == 8
    assert sum(piece.keys.step == 4 for piece in pieces) == 7 * 4
    halos = [p for p in pieces if len(p.keys) == 128]
    assert [p.queries for p in halos] == [range(b, b + 2048) for b in range(2048, 16384, 2048)]
    sinks = [p for p in pieces if p.keys == range(16)]
    assert [p.queries for p in sinks] == [range(2048, 16384)]
    assert len(pieces) == 8 + 28 + 7 + 1


def test_exact_attention_is_one_triangle_and_one_rectangle():
    pattern = csa((1, 1, 1), (7, 21), sinks=3, halo=5, tail=4)
    pieces = csa_pieces(pattern, prompt_len=100, queries=range(40, 100), kv_heads=range(2), layer=0)
    assert [(p.queries, p.keys, p.causal) for p in pieces] == [
        (range(40, 100), range(40), False),
        (range(40, 100), range(40, 100), True),
    ]
    assert flops_ratio(pattern, prompt_len=100, kv_heads=range(2), layer=0) == 1.0


@pytest.mark.parametrize("sample_queries", [False, True])
def test_flops_tend_to_the_closed_form(sample_queries):
    pattern = csa((1, 2, 4), topology_spans(1536, (1, 2, 8)), sample_queries=sample_queries)
    ratio = flops_ratio(pattern, prompt_len=8 * 1536, kv_heads=range(8), layer=1)
    limit = long_flops_ratio((1, 2, 8), (1, 2, 4), sample_queries=sample_queries)
    assert ratio == pytest.approx(limit, rel=0.02)
    if not sample_queries:
        assert limit == (1 + 1 / 2 + 6 / 4) / 8


def test_a_far_shard_sends_its_share_and_a_neighbour_the_halo_too():
    pattern = csa((1, 4), (1000,), sinks=16, halo=128)
    common = dict(prompt_len=4000, kv_heads=range(8), layer=0)

    def rows(queries, keys):
        slices = visible_keys(pattern, queries=queries, keys=keys, **common)
        return sum(part.num_rows for part in slices)

    shards = [range(n, n + 1000) for n in range(0, 4000, 1000)]
    assert rows(shards[3], shards[1]) == 1000 * 8 // 4
    assert rows(shards[3], shards[2]) == (1000 - 128) * 8 // 4 + 128 * 8
    assert rows(shards[3], shards[0]) == (1000 - 16) * 8 // 4 + 16 * 8
    assert rows(shards[0], shards[1]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(degrees=()), "degrees must be one number >= 1 per level, got none"),
        (dict(degrees=(1, 0)), "got 1,0"),
        (dict(degrees=(1, 10**9)), "at most 65536, got 1,1000000000"),
        (dict(degrees=(1, 2, 4)), "1,2,4 are 3 levels and need 2 spans .* got 1: 8"),
        (dict(spans=(0,)), "spans must be >= 1 .* got 0"),
        (dict(degrees=(1, 2, 4), spans=(16, 8)), "not decrease .* got 16,8"),
        (dict(sinks=-1), "sinks must be >= 0 tokens, got -1"),
        (dict(halo=-2), "halo must be >= 0 tokens, got -2"),
        (dict(tail=-3), "tail must be >= 0 tokens, got -3"),
        (dict(block=0), "block must be >= 1 token, got 0"),
        (dict(degrees=(2, 4), block=16), "block 16 .* degree 1 in the own cell, got degrees 2,4"),
        (dict(block=2, sample_queries=True), "block 2 .* no sampled queries"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(changes, message):
    with pytest.raises(ConfigError, match=message):
        csa(**changes)


def test_spans_from_the_topology():
    assert topology_spans(777, (1, 4, 8)) == (777, 3108)
    with pytest.raises(ConfigError, match="got 0"):
        topology_spans(0, (1, 2))
