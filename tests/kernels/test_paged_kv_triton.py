import pytest
import torch
from triton_device import DEVICES

from sps2_mega.kernels.paged_kv import reference

pytest.importorskip("triton")
from sps2_mega.kernels.paged_kv import triton as kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "block_size", "kv_heads", "width"),
    [(1, 1, 1, 1), (7, 5, 3, 80), (3, 16, 40, 128), (0, 4, 2, 16)],  # 5120 elements: two tiles
)
def test_tokens_land_in_their_slots(tokens, block_size, kv_heads, width, dtype, device):
    packed = torch.randn(tokens, 3 * kv_heads + 1, width, device=device).to(dtype)
    k, v = packed[:, kv_heads : 2 * kv_heads], packed[:, 2 * kv_heads : 3 * kv_heads]
    num_blocks = -(-(tokens + 3) // block_size)
    slots = torch.randperm(num_blocks * block_size, device=device)[:tokens]
    caches = torch.full((4, num_blocks, block_size, kv_heads, width), 7.0, device=device)
    k_cache, v_cache, k_expected, v_expected = caches.to(dtype)
    kernels.append(k_cache, v_cache, k, v, slots)
    reference.append(k_expected, v_expected, k, v, slots)
    assert torch.equal(k_cache, k_expected)
    assert torch.equal(v_cache, v_expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_with_a_negative_slot_is_written_nowhere(device):
    new = torch.randn(3, 2, 16, device=device)
    k_cache, v_cache = torch.full((2, 2, 4, 2, 16), 7.0, device=device)
    kernels.append(k_cache, v_cache, new, new, torch.tensor([-1, 5, -1], device=device))
    for cache in (k_cache, v_cache):
        slots = cache.flatten(0, 1)
        assert torch.equal(slots[5], new[1])
        assert (slots[:5] == 7.0).all() and (slots[6:] == 7.0).all()


def test_tokens_unlike_the_cache_are_refused():
    cache, new = torch.zeros(2, 4, 2, 8), torch.zeros(3, 2, 8)
    slots = torch.arange(3)
    with pytest.raises(ValueError, match=r"keys: torch\.float16"):
        kernels.append(cache, cache, new.half(), new, slots)
    with pytest.raises(ValueError, match=r"values: .* \(2, 4\) per token, .* \(2, 8\)"):
        kernels.append(cache, cache, new, new[..., :4], slots)
    with pytest.raises(ValueError, match="3 keys, 3 values and 2 slots"):
        kernels.append(cache, cache, new, new, slots[:2])
