"""Tolerances of kernels against float32 references, absolute, for values of magnitude ~1."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OUT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LSE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 4e-3}


def assert_partial_close(actual, expected) -> None:
    """Compare (out, lse) pairs; -inf must match exactly and nothing may be NaN."""
    (out, lse), (out_ref, lse_ref) = actual, expected
    assert out.dtype == out_ref.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), out_ref.float(), rtol=0, atol=OUT[out.dtype])
    finite = lse_ref.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[~finite] == -torch.inf).all()
    torch.testing.assert_close(lse[finite], lse_ref[finite], rtol=0, atol=LSE[out.dtype])
