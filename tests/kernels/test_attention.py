import pytest
import torch
from tolerances import DEVICES, assert_partial_close

from sps2_mega.kernels.attention import reference, sdpa

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_qkv(num_q, num_k, heads, kv_heads, width, dtype, device="cpu"):
    return (
        torch.randn(num_q, heads, width).to(device, dtype),
        torch.randn(num_k, kv_heads, width).to(device, dtype),
        torch.randn(num_k, kv_heads, width).to(device, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_q", "num_k", "q_start", "window"),
    [
        (1, 1, 0, None),
        (63, 63, 0, None),
        (5, 68, 63, None),  # a run after cached keys
        (7, 20, 300, None),  # all keys far behind
        (9, 40, 11, None),  # keys reach past the run
        (0, 10, 3, None),
        (4, 0, 0, None),
        (300, 300, 0, 1),
        (300, 300, 0, 37),
        (517, 700, 100, 64),
        (20, 30, 500, 16),  # keys all outside the window
        (20, 20, 0, 1000),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_run_equals_reference(num_q, num_k, q_start, window, dtype, device):
    q, k, v = random_qkv(num_q, num_k, 6, 2, 24, dtype, device)
    options = dict(scale=0.21, q_start=q_start, window=window)
    assert_partial_close(
        sdpa.attend_run(q, k, v, **options), reference.attend_run(q, k, v, **options)
    )


def test_strided_inputs_need_no_copy():
    q, k, v = random_qkv(50, 50, 4, 2, 16, torch.float32)
    packed = torch.cat([q, k, v], 1)
    views = packed.split([4, 2, 2], 1)
    expected = reference.attend_run(q, k, v, scale=0.3, q_start=0)
    assert_partial_close(sdpa.attend_run(*views, scale=0.3, q_start=0), expected)


def test_reference_equals_torch():
    q, k, v = random_qkv(31, 31, 4, 4, 16, torch.float32)
    out, _ = reference.attend_run(q, k, v, scale=0.25, q_start=0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.25
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0, atol=2e-6)


def test_a_gap_in_the_keys_is_refused():
    q, k, v = random_qkv(4, 4, 2, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="keys begin at 2"):
        sdpa.attend_run(q, k, v, scale=1.0, q_start=0, k_start=2)
