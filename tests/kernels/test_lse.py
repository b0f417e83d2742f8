import itertools

import pytest
import torch

from sps2_mega.kernels.attention.reference import attend_run
from sps2_mega.kernels.lse.reference import merge, merge_two


def partials(cuts, num_k=50):
    q = torch.randn(7, 4, 16)
    k, v = torch.randn(num_k, 2, 16), torch.randn(num_k, 2, 16)
    whole = attend_run(q, k, v, scale=0.3, q_start=num_k)
    edges = [0, *cuts, num_k]
    parts = [
        attend_run(q, k[a:b], v[a:b], scale=0.3, q_start=num_k)
        for a, b in itertools.pairwise(edges)
    ]
    return whole, torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


@pytest.mark.parametrize("cuts", [[], [1], [25, 25], [0, 3, 49]])
def test_merging_parts_gives_the_whole(cuts):
    (out, lse), outs, lses = partials(cuts)
    merged_out, merged_lse = merge(outs, lses)
    torch.testing.assert_close(merged_out, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse, rtol=0, atol=2e-6)
    while len(outs) > 1:
        pair = merge_two(outs[0], lses[0], outs[1], lses[1])
        outs = torch.cat([pair[0][None], outs[2:]])
        lses = torch.cat([pair[1][None], lses[2:]])
    torch.testing.assert_close(outs[0], out, rtol=0, atol=1e-6)


def test_rows_without_any_key_stay_empty_and_large_scores_do_not_overflow():
    out = torch.randn(3, 2, 1, 4)
    lse = torch.tensor([[[-torch.inf], [500.0]], [[-torch.inf], [-500.0]], [[-torch.inf], [498.0]]])
    out[:, 0] = 0.0
    merged, merged_lse = merge(out, lse)
    assert merged_lse[0, 0] == -torch.inf
    assert (merged[0] == 0).all()
    weight = torch.tensor(498.0 - 500.0).exp()
    expected = (out[0, 1] + weight * out[2, 1]) / (1 + weight)
    torch.testing.assert_close(merged[1], expected)
    empty = merge_two(out[0, :1], lse[0, :1], out[1, :1], lse[1, :1])
    assert not empty[0].isnan().any()
    assert (empty[1] == -torch.inf).all()
