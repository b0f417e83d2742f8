"""Block ids of one rank: normal use, exhaustion, double frees, unknown ids, and long mixes."""

import random

import pytest

from sps2_mega.kv_cache.allocator import BlockAllocator


def test_hands_out_lowest_ids_first_and_reuses_freed_ones():
    allocator = BlockAllocator(7)
    assert allocator.allocate(3) == [0, 1, 2]
    assert allocator.allocate(0) == []
    allocator.free([1])
    assert allocator.allocate(2) == [1, 3]
    assert (allocator.num_free, allocator.num_used) == (3, 4)
    allocator.check_integrity()


def test_large_allocations_are_contiguous_again_after_frees_in_any_order():
    allocator = BlockAllocator(1000)
    ids = allocator.allocate(901)
    assert ids == list(range(901))
    random.Random(0).shuffle(ids)
    allocator.free(ids[:450])
    allocator.free(ids[450:])
    assert allocator.allocate(1000) == list(range(1000))
    allocator.check_integrity()


def test_exhaustion_is_asked_for_first_and_asserted_after():
    allocator = BlockAllocator(3)
    assert allocator.can_allocate(3)
    assert not allocator.can_allocate(4)
    with pytest.raises(AssertionError, match="4 blocks requested, 3 of 3 are free"):
        allocator.allocate(4)
    allocator.allocate(3)
    assert not allocator.can_allocate(1)
    assert BlockAllocator(0).num_free == 0


def test_double_free_stops_the_program():
    allocator = BlockAllocator(3)
    allocator.allocate(2)
    allocator.free([1])
    with pytest.raises(AssertionError, match="block 1: it is free already"):
        allocator.free([1])
    with pytest.raises(AssertionError, match="cannot share block 1"):
        allocator.share([1])


@pytest.mark.parametrize("block_id", [-1, 3])
def test_unknown_ids_stop_the_program(block_id):
    allocator = BlockAllocator(3)
    allocator.allocate(3)
    with pytest.raises(AssertionError, match=r"not in \[0, 3\)"):
        allocator.free([block_id])


def test_shared_blocks_are_free_only_after_the_last_holder():
    allocator = BlockAllocator(4)
    ids = allocator.allocate(2)
    allocator.share(ids)
    allocator.free(ids)
    assert (allocator.num_free, allocator.ref_count(0)) == (2, 1)
    allocator.check_integrity()
    allocator.free(ids)
    assert allocator.num_free == 4


def test_integrity_check_sees_a_lost_block():
    allocator = BlockAllocator(3)
    allocator._empty.pop()
    with pytest.raises(AssertionError, match="disagree on blocks"):
        allocator.check_integrity()


def test_long_mix_keeps_the_sum_of_free_and_used():
    rng = random.Random(1)
    allocator = BlockAllocator(257)
    held: list[list[int]] = []
    for _ in range(500):
        num_blocks = rng.randrange(130)
        if rng.random() < 0.5 and allocator.can_allocate(num_blocks):
            held.append(allocator.allocate(num_blocks))
        elif held:
            allocator.free(held.pop(rng.randrange(len(held))))
        assert allocator.num_used == sum(map(len, held))
        allocator.check_integrity()
