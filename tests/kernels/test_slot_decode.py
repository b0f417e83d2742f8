import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DEVICES, assert_partial_close

from sps2_mega.kernels.paged_decode import reference as paged_reference
from sps2_mega.kernels.slot_decode import reference, sdpa

BLOCK_SIZE, NUM_BLOCKS = 4, 50


def compare(counts, dtype=torch.float32, repeats=2, width=16, device="cpu"):
    """Compare rows of `counts[b][g]` random slots; slots that no row sees are NaN."""
    generator = np.random.default_rng(0)
    kv_heads = len(counts[0])
    free = generator.permutation(NUM_BLOCKS * BLOCK_SIZE)
    slots, used = [], 0
    for by_head in counts:
        slots.append([np.sort(free[used : used + count]) for count in by_head])
        used += max(by_head)
    shape = (NUM_BLOCKS, BLOCK_SIZE, kv_heads, width)
    k_cache, v_cache = torch.randn(2, *shape).to(device, dtype)
    unseen = torch.from_numpy(free[used:])
    for cache in (k_cache, v_cache):
        cache.view(-1, kv_heads, width)[unseen] = torch.nan
    q = torch.randn(len(counts), kv_heads * repeats, width).to(device, dtype)
    batches = sdpa.prepare(slots, dtype=dtype, device=torch.device(device))
    actual = sdpa.slot_decode(q, k_cache, v_cache, batches, scale=0.3)
    listed = [[torch.from_numpy(chosen) for chosen in by_head] for by_head in slots]
    expected = reference.slot_decode(q, k_cache, v_cache, listed, scale=0.3)
    assert_partial_close(actual, expected)
    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_heads_of_different_counts(dtype, device):
    batches = compare([[1, 2], [30, 31], [0, 3], [0, 0], [33, 29]], dtype, device=device)
    assert len(batches) > 1


def test_nothing_to_see():
    assert compare([[0, 0, 0], [0, 0, 0]]) == []


def test_equal_counts_need_no_mask_and_no_row_index():
    (batch,) = compare([[5, 5], [5, 5]])
    assert batch.hidden_bKS is None and batch.rows_B is None


@given(st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=5))
def test_any_counts(counts):
    compare(counts)


def test_the_reference_equals_paged_decode_on_all_slots():
    k_cache, v_cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, 2, 8)
    q = torch.randn(2, 6, 8)
    table = torch.tensor([[7, 3, 9], [4, 1, 1]])
    ends = torch.tensor([11, 5])
    slots = [
        [(table[row][:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:end]] * 2
        for row, end in enumerate(ends)
    ]
    assert_partial_close(
        reference.slot_decode(q, k_cache, v_cache, slots, scale=0.5),
        paged_reference.paged_decode(
            q,
            k_cache,
            v_cache,
            block_table_BM=table,
            starts_B=torch.zeros(2, dtype=torch.int64),
            ends_B=ends,
            scale=0.5,
        ),
    )
