"""Small lists reach the device unchanged, and on CUDA without waiting for its current work."""

from __future__ import annotations

import pytest
import torch
from tolerances import DEVICES

from sps2_mega.kernels.host_to_device import to_device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", [[], [3], [2**52 + 1, 0, -7]])
def test_values_arrive_in_their_type(values, device):
    for dtype in (torch.int64, torch.float64):
        arrived = to_device(values, dtype, torch.device(device))
        assert arrived.dtype is dtype and arrived.device.type == device
        assert arrived.tolist() == values


@pytest.mark.gpu
def test_a_decode_step_waits_once():
    """Sampling 32 sequences, each with its own settings, waits once: to read the tokens."""
    from sps2_mega.types import SamplingParams
    from sps2_mega.worker.sampling.sampler import sample

    logits = torch.randn(32, 3000, device="cuda")
    params = [
        SamplingParams(temperature=0.0) if i % 2 else SamplingParams(top_k=5, top_p=0.9, min_p=0.01)
        for i in range(32)
    ]
    waits = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # the one that must be
            sample(logits, params, list(range(32)), [7] * 32)
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            sample(logits, params, list(range(32)), [7] * 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
