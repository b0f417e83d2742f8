"""Attention kernels on one CUDA device against torch's own, side by side in one run.

python benchmarks/kernels.py [--save] [--repeats 7]
python benchmarks/kernels.py --tiny     starts everything on a CPU; its numbers mean nothing

csa     one layer's prefill attention: Llama-3-8B heads, bfloat16, 128K tokens, 8 cells, degrees
        1,4 and 1,8. share_of_ideal = best dense library time x FLOPs ratio / time of CSA; the
        target is >= 0.85. csa_tiles are other sizes of the kernel's tiles
decode  one layer's paged decode attention. share_of_copy = bytes of K and V per second / copy
        bandwidth; the target is >= 0.85 from 64K tokens in the batch. torch reads the same
        bytes from one dense tensor
merge   partials of a prefill merged by LSE, and share_of_copy of the bytes read and written
append  new tokens into the paged cache, likewise
rotary  RoPE fused with that write, likewise
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.kernel_cases.bench import FULL, HEADS, KV_HEADS, TINY, WIDTH, Bench


def run(bench: Bench, written: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run all measurements; `written` gets the results so far after each of them."""
    from benchmarks.gpu.device_time import copy_bandwidth
    from benchmarks.kernel_cases.csa import csa, tile_shapes
    from benchmarks.kernel_cases.decode import decode
    from benchmarks.kernel_cases.memory import append, merge
    from benchmarks.kernel_cases.rotary import rotary
    from sps2_mega.kernels.backend import Backend

    bandwidth = copy_bandwidth(bench.device, bench.sizes.copied_bytes, bench.repeats)
    result: dict[str, Any] = {"copy_bytes_per_s": bandwidth}
    shapes = [(b, c) for c in bench.sizes.contexts for b in bench.sizes.batches]
    works: list[tuple[str, Callable[[], Any]]] = [
        *(("csa", partial(csa, bench, degree)) for degree in (4, 8)),
        *(("decode", partial(decode, bench, *shape, bandwidth)) for shape in shapes),
        *(("merge", partial(merge, bench, partials, bandwidth)) for partials in (2, 8)),
        ("append", partial(append, bench, bandwidth)),
        *(
            ("rotary", partial(rotary, bench, tokens, bandwidth))
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
    """Short lines, one per measurement: times in ms and the share that the target is about."""

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
