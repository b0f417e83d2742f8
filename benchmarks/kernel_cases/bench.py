"""Device, sizes and contestants that all kernel measurements share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

HEADS, KV_HEADS, WIDTH = 32, 8, 128  # Llama-3-8B
LIBRARIES = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Full sizes, or sizes at which everything just starts."""

    prompt: int
    cells: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    merged_tokens: int
    copied_bytes: int
    rotated_bytes: int  # decode cycles through so much memory that no cache holds it
    tiles: tuple[tuple[int, int, int, int], ...]  # rows, keys, warps, stages


FULL = Sizes(
    prompt=131072,
    cells=8,
    contexts=(8192, 32768, 131072),
    batches=(1, 8, 32, 64),
    merged_tokens=16384,
    copied_bytes=2**32,
    rotated_bytes=2**30,
    tiles=(
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 64, 4, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
    ),
)
TINY = Sizes(
    prompt=24,
    cells=3,
    contexts=(20,),
    batches=(3,),
    merged_tokens=5,
    copied_bytes=2**16,
    rotated_bytes=1,
    tiles=((64, 16, 4, 2),),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """Device, dtype and repeats of all measurements; `backends` are the kernels available here."""

    device: Any
    dtype: Any
    sizes: Sizes
    backends: tuple[Any, ...]
    repeats: int

    def randn(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def pattern(self, far_degree: int) -> Any:
        from sps2_mega.attention.csa.pattern import CSAPattern

        cell = -(-self.sizes.prompt // self.sizes.cells)
        return CSAPattern(
            degrees=(1, far_degree),
            spans=(cell,),
            sinks=min(16, cell // 8),
            halo=min(128, cell // 8),
            tail=min(128, cell // 8),
            sample_queries=False,
        )

    def times(self, contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of all contestants that can run; the others are left out."""
        from benchmarks.gpu import device_time

        runnable = {}
        for name, work in contestants.items():
            try:
                work()
                runnable[name] = work
            except RuntimeError as error:  # no kernel for this shape, or out of memory
                print(f"  {name} left out: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        return device_time.medians(runnable, self.device, self.repeats)


def libraries(attend: Callable[[], Any], device: Any) -> dict[str, Callable[[], Any]]:
    """The same call through each of torch's attention libraries."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: Any) -> Any:
        with sdpa_kernel(backend):
            return attend()

    names = LIBRARIES[:3] if device.type == "cuda" else ("FLASH_ATTENTION",)
    return {f"torch {name}": partial(through, getattr(SDPBackend, name)) for name in names}


def best_library(times: dict[str, float]) -> float:
    return min(taken for name, taken in times.items() if name.startswith("torch "))
