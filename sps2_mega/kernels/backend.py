"""Choice of a kernel's form: Triton, or torch's own operations.

Each `kernels/*/dispatch.py` calls `choose` once per call; its docstring says what the operation
gains from Triton. Triton is optional: without it everything runs on torch.
"""

from __future__ import annotations

import enum
import importlib.util
import logging
from functools import cache

import torch

log = logging.getLogger(__name__)


class Backend(enum.Enum):
    TRITON = "triton"
    TORCH = "torch"


def choose(device: torch.device, forced: Backend | None) -> Backend:
    """The forced backend, or else Triton on CUDA devices if it is installed.

    Raises:
        ValueError: Triton is forced and not installed.
    """
    if forced is Backend.TRITON and not _installed():
        raise ValueError("the Triton kernels are requested, but triton is not installed")
    return forced or _default(device.type)


@cache
def _default(device_type: str) -> Backend:
    if device_type != "cuda":
        return Backend.TORCH
    chosen = Backend.TRITON if _installed() else Backend.TORCH
    log.info("kernels on CUDA: %s", chosen.value)
    return chosen


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
