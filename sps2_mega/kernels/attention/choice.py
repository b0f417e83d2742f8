"""Choice of the library for dense attention on CUDA: measured once per kind of heads, then by size.

A library is timed on one long causal run. The cost of the first run of a new shape (cuDNN then
makes a plan) is paid once per prompt and spread over its layers, so short runs keep the
library without that cost. A library that fails, or disagrees with the default, is left out:
nothing counts that was not tried on this device.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sps2_mega.kernels.attention.libraries import LIBRARIES, Library

log = logging.getLogger(__name__)

DEFAULT = "flash, keys repeated"
_MEASURED_LEN = 8192
_MEASURED_FROM = 2**20  # pairs of a call; smaller ones end before a choice would pay off
_CALLS_PER_SHAPE = 32  # a prompt's shape recurs in every layer
_REPEATS = 3
# Small runs with sizes that no tile divides: causal, and a rectangle.
_CHECKED = ((193, 193, True), (131, 300, False))
_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties other than lengths that decide a library's speed."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    width: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per (query, key) pair over all heads, and seconds of set-up for a new shape."""

    pair_s: float
    new_shape_s: float


Timer = Callable[[Callable[[], object], torch.device], float]


def attend_fastest(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention by the library expected to be fastest; see `libraries` for the contract."""
    pairs = num_pairs(q.shape[2], k.shape[2], causal)
    name = DEFAULT
    if pairs >= _MEASURED_FROM:
        kind = Kind(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3])
        name = fastest(_speeds(kind), pairs)
    return LIBRARIES[name](q, k, v, scale=scale, causal=causal)


def num_pairs(num_queries: int, num_keys: int, causal: bool) -> int:
    return num_queries * num_keys // (2 if causal else 1)


def fastest(speeds: Mapping[str, Speed], pairs: int) -> str:
    """Library expected to be fastest for a run of `pairs`; the default if none was measured."""

    def seconds(name: str) -> float:
        return speeds[name].pair_s * pairs + speeds[name].new_shape_s / _CALLS_PER_SHAPE

    return min(speeds, key=seconds, default=DEFAULT)


def measure(
    kind: Kind,
    libraries: Mapping[str, Library],
    timer: Timer,
    *,
    num_tokens: int = _MEASURED_LEN,
) -> dict[str, Speed]:
    """Measure the speed of each library that works here and agrees with the default one."""
    try:
        runs = [_run(kind, *lengths) for lengths in (*_CHECKED, (num_tokens, num_tokens, True))]
        expected = [libraries[DEFAULT](*run, scale=0.1, causal=c) for *run, c in runs[:-1]]
    except RuntimeError as error:
        log.warning("attention libraries are not compared: %s", _first_line(error))
        return {}
    speeds: dict[str, Speed] = {}
    *long_run, causal = runs[-1]
    for name, library in libraries.items():
        try:
            for (*run, c), wanted in zip(runs[:-1], expected, strict=True):
                _check(library(*run, scale=0.1, causal=c), wanted, kind.dtype)

            def work(library: Library = library) -> object:
                return library(*long_run, scale=0.1, causal=causal)

            first_s = timer(work, kind.device)
            again_s = statistics.median(timer(work, kind.device) for _ in range(_REPEATS))
        except (RuntimeError, ValueError) as error:
            log.warning("dense attention without %s: %s", name, _first_line(error))
            continue
        pairs = num_pairs(num_tokens, num_tokens, causal)
        speeds[name] = Speed(again_s / pairs, max(0.0, first_s - again_s))
    return speeds


@cache
def _speeds(kind: Kind) -> dict[str, Speed]:
    with torch.inference_mode():
        speeds = measure(kind, LIBRARIES, _seconds)
    shown = ", ".join(
        f"{name} {1e12 * speed.pair_s:.3g} ps a pair and {1e3 * speed.new_shape_s:.3g} ms a new "
        "shape"
        for name, speed in speeds.items()
    )
    log.info("dense attention, %s: %s", kind, shown)
    return speeds


def _run(
    kind: Kind, num_queries: int, num_keys: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Random q, k and v in the layout of a model's projections."""
    # A generator of its own leaves all other random numbers as they are.
    generator = torch.Generator(kind.device).manual_seed(0)

    def heads(tokens: int, count: int) -> Tensor:
        x_TNH = torch.randn(
            (tokens, count, kind.width), generator=generator, device=kind.device, dtype=kind.dtype
        )
        return x_TNH.transpose(0, 1).unsqueeze(0)

    kv = (heads(num_keys, kind.num_kv_heads) for _ in range(2))
    return heads(num_queries, kind.num_heads), *kv, causal  # type: ignore[return-value]


def _check(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Compare a library's result with the default's.

    Raises:
        ValueError: shapes differ, or values differ by more than the type's rounding explains.
    """
    for what, new, old in zip(("results", "LSE"), found, wanted, strict=True):
        if new.shape != old.shape:
            raise ValueError(f"its {what} are {tuple(new.shape)}, {tuple(old.shape)} was expected")
        difference = (new.float() - old.float()).abs().max().item()
        if not difference <= _TOLERANCE[dtype]:
            raise ValueError(f"its {what} differ from those of {DEFAULT!r} by {difference:.3g}")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call until its work is done, with the host's work, which making a plan is."""
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    began = time.perf_counter()
    work()
    stream.synchronize()
    return time.perf_counter() - began


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
