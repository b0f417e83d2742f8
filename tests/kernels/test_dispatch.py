import subprocess
import sys

import numpy as np
import pytest
import torch
from tolerances import assert_partial_close
from triton_device import DEVICES

from sps2_mega.kernels import backend
from sps2_mega.kernels.backend import Backend
from sps2_mega.kernels.csa import dispatch as csa
from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.lse import dispatch as lse
from sps2_mega.kernels.paged_decode import dispatch as paged_decode
from sps2_mega.kernels.paged_kv import dispatch as paged_kv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FORMS = [Backend.TRITON, Backend.TORCH]


@pytest.fixture
def without_triton(monkeypatch):
    caches = backend._installed, backend._default
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    yield
    for cached in caches:
        cached.cache_clear()


def test_triton_is_optional(without_triton):
    assert backend.choose(CUDA, None) is Backend.TORCH
    assert backend.choose(CPU, None) is Backend.TORCH
    with pytest.raises(ValueError, match="triton is not installed"):
        backend.choose(CPU, Backend.TRITON)


def test_the_device_decides_and_an_argument_overrides():
    pytest.importorskip("triton")
    assert backend.choose(CPU, None) is Backend.TORCH
    assert backend.choose(CUDA, None) is Backend.TRITON
    assert backend.choose(CUDA, Backend.TORCH) is Backend.TORCH
    assert backend.choose(CPU, Backend.TRITON) is Backend.TRITON


def test_a_dense_run_is_a_rectangle_and_a_triangle():
    square = Piece(range(8, 16), range(8, 16), range(2), causal=True)
    before = Piece(range(8, 16), range(8), range(2))
    assert csa.is_dense_run([before, square])
    assert csa.is_dense_run([])
    assert not csa.is_dense_run([Piece(range(8, 16), range(0, 8, 2), range(2)), square])
    assert not csa.is_dense_run([Piece(range(8, 16), range(8), range(0, 2, 2)), before, square])


@pytest.mark.parametrize("device", DEVICES)
def test_both_forms_of_every_operation_agree(device):
    pytest.importorskip("triton")
    q = torch.randn(9, 4, 16, device=device)
    k, v = torch.randn(9, 2, 16, device=device), torch.randn(9, 2, 16, device=device)
    pieces = [
        Piece(range(6, 9), range(0, 6, 2), range(2)),
        Piece(range(6, 9), range(6, 9), range(2), causal=True),
    ]
    ways = [csa.attend_pieces(q, k, v, pieces, scale=0.25, backend=form) for form in FORMS]
    assert_partial_close(*ways)
    partials = torch.stack([q, q + 1]), torch.randn(2, 9, 4, device=device)
    assert_partial_close(*(lse.merge(*partials, backend=form) for form in FORMS))
    pair = (partials[0][0], partials[1][0], partials[0][1], partials[1][1])
    assert_partial_close(*(lse.merge_two(*pair, backend=form) for form in FORMS))
    caches = [torch.zeros(2, 3, 4, 2, 16, device=device) for _ in FORMS]
    slots = torch.tensor([11, 3, 0, 1, 2, 4, 8, 5, 7], device=device)
    for form, cache in zip(FORMS, caches, strict=True):
        paged_kv.append(*cache, k, v, slots, backend=form)
    assert torch.equal(*caches)
    decoded = []
    for form, cache in zip(FORMS, caches, strict=True):
        rows = paged_decode.prepare(
            np.array([[2, 0], [1, 2]]),
            np.array([0, 1]),
            np.array([3, 5]),
            block_size=4,
            dtype=q.dtype,
            device=torch.device(device),
            backend=form,
        )
        decoded.append(paged_decode.paged_decode(q[:2], *cache, rows, scale=0.25))
    assert_partial_close(*decoded)


def test_cpu_needs_no_triton():
    """Importing the dispatchers must not import packages that CPU builds of torch lack."""
    code = (
        "import sys\n"
        "from sps2_mega.kernels.csa import dispatch\n"
        "from sps2_mega.kernels.lse import dispatch\n"
        "from sps2_mega.kernels.paged_decode import dispatch\n"
        "from sps2_mega.kernels.paged_kv import dispatch\n"
        "sys.exit('sps2_mega.kernels.csa.triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
