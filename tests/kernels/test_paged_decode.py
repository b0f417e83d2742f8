import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DEVICES, assert_partial_close

from sps2_mega.kernels.paged_decode import reference, sdpa
from sps2_mega.kernels.paged_kv.reference import append

BLOCK_SIZE = 4


def compare(starts, ends, dtype=torch.float32, heads=6, kv_heads=3, width=16, device="cpu"):
    """Compare rows over a cache whose unowned blocks hold NaN and unused slots hold garbage."""
    generator = np.random.default_rng(0)
    counts = [-(-end // BLOCK_SIZE) for end in ends]
    num_blocks = sum(counts) + 2
    ids = generator.permutation(num_blocks - 1) + 1
    table = generator.integers(0, num_blocks, (len(ends), max([*counts, 1])))
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = ids[used : used + count]
        used += count
    k_cache = torch.randn(num_blocks, BLOCK_SIZE, kv_heads, width).to(device, dtype)
    v_cache = torch.randn(num_blocks, BLOCK_SIZE, kv_heads, width).to(device, dtype)
    k_cache[0], v_cache[0] = torch.nan, torch.nan
    q = torch.randn(len(ends), heads, width).to(device, dtype)
    buckets = sdpa.prepare(
        table,
        np.array(starts, dtype=np.int64),
        np.array(ends, dtype=np.int64),
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=torch.device(device),
    )
    actual = sdpa.paged_decode(q, k_cache, v_cache, buckets, scale=0.3)
    expected = reference.paged_decode(
        q,
        k_cache,
        v_cache,
        block_table_BM=torch.from_numpy(table),
        starts_B=torch.tensor(starts),
        ends_B=torch.tensor(ends),
        scale=0.3,
    )
    assert_partial_close(actual, expected)
    return buckets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_very_different_lengths(dtype, device):
    buckets = compare([0] * 7, [1, 4, 5, 63, 64, 200, 0], dtype, device=device)
    assert len(buckets) > 1


def test_windows_hide_the_beginning():
    compare([0, 3, 9, 7], [2, 9, 10, 7])


def test_rows_that_hold_nothing():
    assert compare([0, 0], [0, 0]) == []


def test_equal_full_rows_need_no_mask_and_no_row_index():
    (bucket,) = compare([0, 0, 0], [8, 8, 8])
    assert bucket.bias_B11S is None
    assert bucket.rows_B is None


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6))
def test_any_ranges(ranges):
    compare([min(r) for r in ranges], [max(r) for r in ranges])


@given(st.lists(st.integers(0, 100), max_size=20))
def test_buckets_waste_at_most_half(num_blocks):
    groups = sdpa.bucket_rows(num_blocks)
    assert sorted(row for group in groups for row in group) == [
        row for row, count in enumerate(num_blocks) if count
    ]
    for group in groups:
        counts = [num_blocks[row] for row in group]
        assert max(counts) <= 2 * min(counts)
        assert group == sorted(group)


def test_append_writes_the_slots():
    k_cache, v_cache = torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    append(k_cache, v_cache, k, v, torch.tensor([11, 0, 6]))
    assert torch.equal(k_cache[2, 3], k[0])
    assert torch.equal(v_cache[0, 0], v[1])
    assert torch.equal(k_cache[1, 2], k[2])
    assert (k_cache != 0).sum() == k.numel()
    append(k_cache, v_cache, k[:0], v[:0], torch.empty(0, dtype=torch.int64))
