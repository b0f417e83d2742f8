"""Attention kernels on one CUDA device against torch's own, side by side in one run.

    python benchmarks/kernels.py [--save] [--repeats 7]
    python benchmarks/kernels.py --tiny     starts everything on a CPU; its numbers mean nothing

csa     one layer's prefill attention, Llama-3-8B heads, bfloat16, 128K tokens, 8 cells, degrees 1,4 and 1,8.
        share_of_ideal = best dense library time x FLOPs ratio / time of CSA; the target is >= 0.85
        csa_tiles are other sizes of the kernel's tiles
decode  one layer's paged decode attention. share_of_copy = bytes of K and V per second / copy
bandwidth; the target is >= 0.85 from 64K tokens in the batch. torch reads the same bytes from one
dense tensor
merge   partials of a prefill merged by LSE, and share_of_copy of the bytes read and written
append  new tokens into the paged cache, likewise
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine

HEADS, KV_HEADS, WIDTH = 32, 8, 128  # Llama-3-8B
LIBRARIES = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: full sizes, or sizes at which all of it just starts."""

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
    """Where and how often everything runs; `backends` are the forms of our kernels that exist
    here."""

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
        """Medians of all contestants that can run; the others are left out."""
        from benchmarks import device_time

        runnable = {}
        for name, work in contestants.items():
            try:
                work()
                runnable[name] = work
            except (
                RuntimeError
            ) as error:  # a library without a kernel for this shape, or out of memory
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


def csa(bench: Bench, far_degree: int) -> dict[str, Any]:
    import torch

    from sps2_mega.attention.csa.pieces import csa_pieces
    from sps2_mega.attention.planner.sparse_volume import flops_ratio
    from sps2_mega.kernels.csa.dispatch import attend_pieces

    tokens = bench.sizes.prompt
    pattern = bench.pattern(far_degree)
    where = dict(prompt_len=tokens, kv_heads=range(KV_HEADS), layer=0)
    pieces = csa_pieces(pattern, queries=range(tokens), **where)
    q, k, v = (bench.randn(tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    scale = WIDTH**-0.5
    dense = partial(
        torch.nn.functional.scaled_dot_product_attention,
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    ours = {
        f"csa {form.value}": partial(attend_pieces, q, k, v, pieces, scale=scale, backend=form)
        for form in bench.backends
    }
    times = bench.times(libraries(dense, bench.device) | ours)
    ratio = flops_ratio(pattern, **where)
    flops = 4 * WIDTH * HEADS * (tokens * (tokens + 1) // 2)
    result: dict[str, Any] = {"degrees": [1, far_degree], "flops_ratio": ratio, "seconds": times}
    result["tflops_per_s"] = {
        name: 1e-12 * flops * (ratio if name in ours else 1.0) / taken
        for name, taken in times.items()
    }
    result["share_of_ideal"] = {
        name: best_library(times) * ratio / times[name] for name in ours if name in times
    }
    if len(ours) > 1:
        outs = [work()[0] for work in ours.values()]
        result["max_difference"] = (outs[0] - outs[1]).abs().max().item()
    return result


def tile_shapes(bench: Bench) -> list[dict[str, Any]]:
    """CSA at degrees 1,4 with other tiles than the kernel's constants: what those are chosen
    from."""
    from unittest.mock import patch

    from sps2_mega.attention.csa.pieces import csa_pieces
    from sps2_mega.kernels.csa import triton as kernel
    from sps2_mega.kernels.csa.tile_shape import TileShape

    tokens = bench.sizes.prompt
    pattern = bench.pattern(4)
    where = dict(prompt_len=tokens, kv_heads=range(KV_HEADS), layer=0)
    pieces = csa_pieces(pattern, queries=range(tokens), **where)
    q, k, v = (bench.randn(tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    found = []
    for rows, keys, warps, stages in bench.sizes.tiles:
        shape = TileShape(rows=rows, keys=keys, warps=warps, stages=stages)
        with patch.object(kernel, "tile_shape", lambda *_, shape=shape: shape):
            times = bench.times(
                {"csa triton": partial(kernel.attend_pieces, q, k, v, pieces, scale=WIDTH**-0.5)}
            )
        found.append(asdict(shape) | {"seconds": times})
    return found


def decode(bench: Bench, batch: int, context: int, bandwidth: float) -> dict[str, Any] | None:
    """None where the device has no room."""
    import numpy as np
    import torch

    from benchmarks.device_time import in_graph
    from sps2_mega.kernels.paged_decode import dispatch

    block_size, scale = 16, WIDTH**-0.5
    per_row = -(-context // block_size)
    num_bytes = 2 * batch * context * KV_HEADS * WIDTH * bench.dtype.itemsize
    copies = max(1, bench.sizes.rotated_bytes // num_bytes)
    if bench.device.type == "cuda" and 2.5 * copies * num_bytes > torch.cuda.mem_get_info()[0]:
        return None
    num_blocks = copies * batch * per_row
    k_cache, v_cache = (bench.randn(num_blocks, block_size, KV_HEADS, WIDTH) for _ in range(2))
    tables = np.random.default_rng(0).permutation(num_blocks).reshape(copies, batch, per_row)
    q = bench.randn(batch, HEADS, WIDTH)
    contestants = {}
    for form in bench.backends:
        rows = [
            dispatch.prepare(
                table,
                np.zeros(batch, dtype=np.int64),
                np.full(batch, context),
                block_size=block_size,
                dtype=bench.dtype,
                device=bench.device,
                backend=form,
            )
            for table in tables
        ]
        works = [partial(dispatch.paged_decode, q, k_cache, v_cache, r, scale=scale) for r in rows]
        contestants[f"paged {form.value}"] = works
    dense_k, dense_v = (
        x.view(-1)[: copies * batch * context * KV_HEADS * WIDTH]
        .view(copies, batch, KV_HEADS, context, WIDTH)
        for x in (k_cache, v_cache)
    )  # fmt: skip
    for name, _ in libraries(lambda: None, bench.device).items():
        contestants[name] = [
            libraries(
                partial(
                    torch.nn.functional.scaled_dot_product_attention,
                    q.unsqueeze(2),
                    dense_k[copy],
                    dense_v[copy],
                    scale=scale,
                    enable_gqa=True,
                ),
                bench.device,
            )[name]
            for copy in range(copies)
        ]
    ready = {}
    for name, works in contestants.items():
        try:
            ready[name] = in_graph(works, bench.device)
        except RuntimeError as error:
            print(f"  {name} left out: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    times = {name: taken / copies for name, taken in bench.times(ready).items()}
    return {
        "batch": batch,
        "context": context,
        "seconds": times,
        "share_of_copy": {name: num_bytes / taken / bandwidth for name, taken in times.items()},
    }


def merge(bench: Bench, partials: int, bandwidth: float) -> dict[str, Any]:
    import torch

    from sps2_mega.kernels.lse import dispatch

    tokens = bench.sizes.merged_tokens
    out = bench.randn(partials, tokens, HEADS, WIDTH)
    lse = torch.randn(partials, tokens, HEADS, device=bench.device)
    times = bench.times(
        {
            f"merge {form.value}": partial(dispatch.merge, out, lse, backend=form)
            for form in bench.backends
        }
    )
    moved = (out.numel() * bench.dtype.itemsize + lse.numel() * 4) * (1 + 1 / partials)
    shares = {name: moved / taken / bandwidth for name, taken in times.items()}
    return {"partials": partials, "seconds": times, "share_of_copy": shares}


def append(bench: Bench, bandwidth: float) -> dict[str, Any]:
    import torch

    from sps2_mega.kernels.paged_kv import dispatch

    tokens, block_size = bench.sizes.merged_tokens, 16
    num_blocks = -(-tokens // block_size)
    k_cache, v_cache = (bench.randn(num_blocks, block_size, KV_HEADS, WIDTH) for _ in range(2))
    packed = bench.randn(tokens, HEADS + 2 * KV_HEADS, WIDTH)
    _, k, v = packed.split([HEADS, KV_HEADS, KV_HEADS], 1)
    slots = torch.arange(tokens, device=bench.device)
    times = bench.times(
        {
            f"append {form.value}": partial(
                dispatch.append, k_cache, v_cache, k, v, slots, backend=form
            )
            for form in bench.backends
        }
    )
    moved = 4 * k.numel() * bench.dtype.itemsize
    shares = {name: moved / taken / bandwidth for name, taken in times.items()}
    return {"tokens": tokens, "seconds": times, "share_of_copy": shares}


def run(bench: Bench, written: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All measurements; `written` gets what there is so far after each of them."""
    from benchmarks.device_time import copy_bandwidth
    from benchmarks.kernels_rotary import rotary
    from sps2_mega.kernels.backend import Backend

    heads = HEADS, KV_HEADS, WIDTH
    bandwidth = copy_bandwidth(bench.device, bench.sizes.copied_bytes, bench.repeats)
    result: dict[str, Any] = {"copy_bytes_per_s": bandwidth}
    shapes = [(b, c) for c in bench.sizes.contexts for b in bench.sizes.batches]
    works: list[tuple[str, Callable[[], Any]]] = [
        *(("csa", partial(csa, bench, degree)) for degree in (4, 8)),
        *(("decode", partial(decode, bench, *shape, bandwidth)) for shape in shapes),
        *(("merge", partial(merge, bench, partials, bandwidth)) for partials in (2, 8)),
        ("append", partial(append, bench, bandwidth)),
        *(
            ("rotary", partial(rotary, bench, heads, tokens, bandwidth))
            for tokens in (1, bench.sizes.merged_tokens)
        ),
    ]
    if Backend.TRITON in bench.backends:
        works.append(("csa_tiles", partial(tile_shapes, bench)))
    for name, work in works:
        try:
            found = work()
        except RuntimeError as error:  # one kernel that fails must not take the others with it
            found = {"error": str(error).splitlines()[0][:300]}
        if name in ("csa", "decode", "merge", "rotary"):
            result.setdefault(name, []).append(found)
        else:
            result[name] = found
        written(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; works on a CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write docs/results/NAME.json")
    parser.add_argument(
        "--out", type=Path, help="write FOLDER/NAME.json after each measurement, print short lines"
    )
    parser.add_argument("--name", default="gpu-kernels", help="of the result file")
    arguments = parser.parse_args()

    import torch

    on_cuda = torch.cuda.is_available()
    if not on_cuda and not arguments.tiny:
        parser.error("no CUDA device: only --tiny runs on a CPU")
    if not on_cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
    from sps2_mega.kernels.backend import Backend

    has_triton = importlib.util.find_spec("triton") is not None
    torch.manual_seed(0)
    bench = Bench(
        device=torch.device("cuda" if on_cuda else "cpu"),
        # The interpreter cannot multiply bfloat16, and few CPU libraries multiply float16.
        dtype=torch.bfloat16 if on_cuda else torch.float32,
        sizes=TINY if arguments.tiny else FULL,
        backends=tuple(Backend) if has_triton else (Backend.TORCH,),
        repeats=1 if arguments.tiny else arguments.repeats,
    )
    head: dict[str, Any] = {"heads, kv_heads, width": (HEADS, KV_HEADS, WIDTH)}
    if arguments.tiny:
        head["warning"] = "tiny sizes: shows that everything starts, the times mean nothing"
    with torch.inference_mode():
        result = head | run(bench, partial(_keep, arguments, head))
    print(json.dumps(result, indent=2) if arguments.out is None else "\n".join(lines(result)))
    if arguments.save:
        print("written:", machine.save(arguments.name, {"arguments": vars(arguments)} | result))


def lines(result: dict[str, Any]) -> list[str]:
    """The result in short: one line per measurement, times in ms and the share that the target is
    about."""

    def short(found: dict[str, Any] | None) -> str:
        if not found or "seconds" not in found:
            return json.dumps(found)
        shares = found.get("share_of_ideal", {}) | found.get("share_of_copy", {})
        what = [
            f"{key} {found[key]}"
            for key in ("degrees", "batch", "context", "tokens")
            if key in found
        ]
        times = [
            f"{name} {1e3 * taken:.4g} ms" + (f" ({shares[name]:.2f})" if name in shares else "")
            for name, taken in found["seconds"].items()
        ]
        return ", ".join(what + times)

    found = [f"copy {result['copy_bytes_per_s'] * 1e-12:.3g} TB/s"]
    for name in ("csa", "decode", "merge", "rotary", "csa_tiles"):
        found += [f"{name}: {short(each)}" for each in result.get(name, [])]
    return [*found, f"append: {short(result.get('append'))}"]


def _keep(arguments: argparse.Namespace, head: dict[str, Any], result: dict[str, Any]) -> None:
    if arguments.out is not None:
        content = {"machine": machine.describe()} | head | result
        (arguments.out / f"{arguments.name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
