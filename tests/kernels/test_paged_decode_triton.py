import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_partial_close
from triton_device import DEVICES, DEVICES_AND_TYPES

from sps2_mega.kernels.backend import Backend
from sps2_mega.kernels.paged_decode import dispatch, reference
from sps2_mega.kernels.paged_decode.chunks import LONGEST_CHUNK, SHORTEST_CHUNK, chunk_len

pytest.importorskip("triton")
from sps2_mega.kernels.paged_decode import triton as kernels


def compare(
    ranges, *, dtype=torch.float32, device="cpu", heads=6, kv_heads=2, width=80, block_size=4
):
    """Compare rows over a shuffled cache.

    Block 0, and every slot outside a row's range, holds NaN; table entries past a
    row's end name blocks that do not exist.
    """
    counts = [-(-end // block_size) for _, end in ranges]
    num_blocks = sum(counts) + 1
    ids = iter((torch.randperm(num_blocks - 1) + 1).tolist())
    table = np.full((len(ranges), max(counts)), 10**6)
    nan = torch.full((num_blocks, block_size, kv_heads, width), torch.nan)
    k_cache, v_cache = nan.to(device, dtype), nan.to(device, dtype)
    for row, (start, end) in enumerate(ranges):
        for token in range(end):
            if token % block_size == 0:
                table[row, token // block_size] = next(ids)
            if token >= start:
                at = table[row, token // block_size], token % block_size
                k_cache[at] = torch.randn(kv_heads, width)
                v_cache[at] = torch.randn(kv_heads, width)
    q = torch.randn(len(ranges), heads, width).to(device, dtype)
    starts, ends = (np.array(x) for x in zip(*ranges, strict=True))
    rows = dispatch.prepare(
        table,
        starts,
        ends,
        block_size=block_size,
        dtype=dtype,
        device=torch.device(device),
        backend=Backend.TRITON,
    )
    actual = dispatch.paged_decode(q, k_cache, v_cache, rows, scale=width**-0.5)
    expected = reference.paged_decode(
        q,
        k_cache,
        v_cache,
        block_table_BM=torch.from_numpy(np.where(table < num_blocks, table, 0)).to(device),
        starts_B=torch.from_numpy(starts),
        ends_B=torch.from_numpy(ends),
        scale=width**-0.5,
    )
    assert_partial_close(actual, expected)


RANGES = [(0, 1), (0, 0), (0, 7), (3, 3), (5, 129), (0, 64), (60, 66), (0, 65)]


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_TYPES)
@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "block_size"), [(6, 2, 80, 4), (3, 3, 16, 16), (17, 1, 256, 5)]
)
def test_equals_reference(heads, kv_heads, width, block_size, chunk, device, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "chunk_len", lambda **_: chunk)
    compare(
        RANGES,
        dtype=dtype,
        device=device,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        block_size=block_size,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_one_row_of_one_token_and_rows_of_nothing(device):
    compare([(0, 1)], device=device)
    compare([(0, 0), (2, 2)], device=device)


def test_what_the_kernel_has_no_form_for_is_refused():
    q, cache = torch.zeros(2, 4, 16), torch.zeros(3, 4, 2, 16)
    rows = dict(
        block_table_BM=torch.zeros(2, 1, dtype=torch.int64),
        starts_B=torch.zeros(2, dtype=torch.int64),
        ends_B=torch.ones(2, dtype=torch.int64),
        scale=1.0,
    )
    for arguments, changed, message in (
        ((q.double(), cache, cache), {}, "float64"),
        ((q.bfloat16(), cache.bfloat16(), cache.bfloat16()), {}, "bfloat16 needs a CUDA device"),
        ((q, cache.half(), cache), {}, "float16"),
        ((q[..., :8], cache, cache), {}, r"q \(2, 4, 8\)"),
        ((q[:, :3], cache, cache), {}, "3 query heads are no multiple of 2"),
        ((q[:1], cache, cache), {}, "q has 1, block table 2"),
        ((q, cache.transpose(2, 3), cache), {}, "caches"),
        ((q, cache, cache), {"scale": 0.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.paged_decode(*arguments, **rows | changed)


@given(st.integers(1, 256), st.integers(1, 64), st.integers(1, 2**20), st.integers(1, 200))
def test_chunks_fill_the_device_or_are_the_shortest(num_rows, kv_heads, longest, processors):
    chunk = chunk_len(
        num_rows=num_rows, num_kv_heads=kv_heads, longest=longest, num_processors=processors
    )
    assert SHORTEST_CHUNK <= chunk <= LONGEST_CHUNK
    assert chunk & (chunk - 1) == 0
    programs = num_rows * kv_heads * -(-longest // chunk)
    assert programs >= 4 * processors or chunk == SHORTEST_CHUNK
