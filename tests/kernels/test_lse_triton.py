import pytest
import torch
from tolerances import assert_partial_close
from triton_device import DEVICES, DEVICES_AND_TYPES

from sps2_mega.kernels.lse import reference

pytest.importorskip("triton")
from sps2_mega.kernels.lse import triton as kernels


def partials(num, num_q, heads, width, dtype, device):
    """Partials of which every other one is empty in some rows, and all are in the first row."""
    out = torch.randn(num, num_q, heads, width, device=device)
    lse = 3 * torch.randn(num, num_q, heads, device=device)
    lse[::2, 1::3], lse[:, :1] = -torch.inf, -torch.inf
    out[lse == -torch.inf] = 0
    return out.to(dtype), lse


@pytest.mark.parametrize(("device", "dtype"), [*DEVICES_AND_TYPES])
@pytest.mark.parametrize("sizes", [(1, 4, 2, 16), (2, 1, 1, 1), (3, 7, 3, 80), (5, 33, 2, 256)])
def test_equals_reference(sizes, device, dtype):
    out, lse = partials(*sizes, dtype, device)
    assert_partial_close(kernels.merge(out, lse), reference.merge(out, lse))
    pair = (out[0], lse[0], out[-1], lse[-1])
    assert_partial_close(kernels.merge_two(*pair), reference.merge_two(*pair))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_needs_no_products_of_tiles(device):
    out, lse = partials(3, 9, 2, 24, torch.bfloat16, device)
    assert_partial_close(kernels.merge(out, lse), reference.merge(out, lse))


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_by_their_strides(device):
    out, lse = partials(3, 10, 4, 16, torch.float32, device)
    views = out[:, ::2, 1:3], lse[:, ::2, 1:3]
    expected = reference.merge(*(x.contiguous() for x in views))
    assert_partial_close(kernels.merge(*views), expected)
    turned = views[0].transpose(1, 3).contiguous().transpose(1, 3)
    assert_partial_close(kernels.merge(turned, views[1]), expected)
    two = kernels.merge_two(views[0][0], views[1][0], views[0][2], views[1][2])
    assert_partial_close(two, reference.merge_two(*(x[i] for i in (0, 2) for x in views)))
    assert_partial_close(
        kernels.merge_two(*(x[i, 2] for i in (0, 2) for x in views)), (two[0][2], two[1][2])
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_in_float32_takes_partials_of_16_bits(device):
    out, lse = partials(2, 5, 2, 16, torch.float16, device)
    pair = (out[0].float(), lse[0], out[1], lse[1])
    assert_partial_close(kernels.merge_two(*pair), reference.merge_two(*pair))


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    out, lse = partials(2, 5, 2, 16, torch.float32, device)
    merged = kernels.merge(out[:, :0], lse[:, :0])
    assert merged[0].shape == (0, 2, 16)
    assert merged[1].shape == (0, 2)
    assert kernels.merge_two(out[0, :, :0], lse[0, :, :0], out[1, :, :0], lse[1, :, :0])[
        1
    ].shape == (5, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_do_not_overflow(device):
    out, lse = partials(3, 4, 2, 16, torch.float32, device)
    merged, merged_lse = kernels.merge(out, lse + 500)
    expected, expected_lse = reference.merge(out, lse + 500)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged_lse, expected_lse, rtol=0, atol=1e-4)
