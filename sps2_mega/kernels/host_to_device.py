"""Copies of small lists of numbers to the device, without waiting for its current work.

A plain copy from pageable memory to a CUDA device waits until all launched work is done:
after a forward pass that is the whole step. A copy from pinned memory is queued in the
stream; torch keeps the memory until the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def array_to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device; the caller may change the array at once."""
    host = torch.from_numpy(values)
    if device.type == "cuda" and host.numel():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
