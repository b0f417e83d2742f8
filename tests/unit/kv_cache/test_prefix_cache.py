"""Findable blocks: random histories of the ledger against a model; kept blocks of an allocator."""

import pytest

from sps2_mega.kv_cache.allocator import BlockAllocator
from sps2_mega.kv_cache.block_chain import extend_chain
from sps2_mega.kv_cache.prefix_cache import PrefixCache


def chain_of(tokens, block_size):
    chain = []
    extend_chain(chain, tokens, root=b"root", block_size=block_size)
    return chain


def any_spans(spans):
    return True


def test_kept_blocks_are_free_but_not_empty_and_evicted_in_the_order_of_their_release():
    allocator = BlockAllocator(5)
    ids = allocator.allocate(4)
    for block_id in ids[1:]:
        allocator.keep(block_id)
    allocator.free([3, 1])
    allocator.free([0, 2])
    assert (allocator.num_free, allocator.num_empty, allocator.num_used) == (5, 2, 0)
    assert allocator.next_to_evict() == 3 and not allocator.is_evictable(0)
    allocator.check_integrity()
    allocator.share([3])
    assert (allocator.num_free, allocator.next_to_evict(), allocator.ref_count(3)) == (4, 1, 1)
    allocator.forget(1)
    assert (allocator.num_free, allocator.num_empty) == (4, 3)
    allocator.forget(3)
    allocator.free([3])
    assert (allocator.num_free, allocator.num_empty) == (5, 4)
    allocator.check_integrity()
    with pytest.raises(AssertionError, match="cannot forget block 3: it is not kept"):
        allocator.forget(3)
    with pytest.raises(AssertionError, match="cannot keep block 0: it is free already"):
        allocator.keep(0)


def test_removing_a_block_takes_what_follows_it_on_all_ranks():
    chain, other = chain_of([1, 2, 3, 4, 5], 1), chain_of([1, 2, 9], 1)
    cache = PrefixCache()
    for index in range(5):
        cache.add(chain, index, None, (index % 2, index))
    cache.add(other, 2, None, (2, 7))
    assert [block.block_id for block in cache.find(chain, any_spans)] == [0, 1, 2, 3, 4]
    assert [block.block_id for block in cache.find(other, any_spans)] == [0, 1, 7]
    assert set(cache.remove((0, 2))) == {(0, 2), (1, 3), (0, 4)}
    assert len(cache.find(chain, any_spans)) == 2 and len(cache.find(other, any_spans)) == 3
    cache.check_integrity()
    assert set(cache.remove((0, 0))) == {(0, 0), (1, 1), (2, 7)}
    assert len(cache) == 0 and cache.find(other, any_spans) == []
    cache.check_integrity()


def test_the_longest_of_several_spans_wins_and_refused_ones_are_not_seen():
    chain = chain_of(range(6), 2)
    cache = PrefixCache()
    for spans, count in (((4,), 1), ((8,), 3), (None, 2)):
        for index in range(count):
            cache.add(chain, index, spans, (count, index))
    assert [b.spans for b in cache.find(chain, any_spans)] == [(8,)] * 3
    assert [b.spans for b in cache.find(chain, lambda s: s != (8,))] == [None] * 2
    assert cache.find(chain, lambda s: False) == [] and cache.find([], any_spans) == []
    assert (cache.num_findable(chain, (4,)), cache.num_findable(chain, (5,))) == (1, 0)
