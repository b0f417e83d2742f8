"""Where Triton kernels run in tests: compiled on a CUDA device, or in Triton's interpreter on CPU
without one.

`conftest.py` asks for the interpreter before anybody imports triton; the two cannot be mixed in one
process.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ON_CPU = pytest.mark.skipif(not INTERPRETED, reason="no interpreter beside an NVIDIA driver")

DEVICES = [pytest.param("cpu", marks=_ON_CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter multiplies bfloat16 as the integers it stores them in.
DEVICES_AND_TYPES = [
    pytest.param("cpu", torch.float32, marks=_ON_CPU, id="cpu-float32"),
    pytest.param("cpu", torch.float16, marks=_ON_CPU, id="cpu-float16"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{dtype}")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]
