"""CSA prefill attention against torch's dense causal SDPA: one rank, same threads, in one run.

    python benchmarks/csa.py [--tokens 16384] [--degrees 1,4] [--cells 8] [--threads 1] [--save]

There are two shapes of heads: the bundled model's, and Llama-3-8B's with a quarter of its heads and
half their width. `ratio_of_ideal` is CSA time / (dense time x FLOPs ratio): 1 means that the
remaining work runs as fast as dense attention does; the target is <= 1.15. `cpu_ratio_of_ideal` is
the same from processor time, which other load on the machine disturbs less. CSA's time includes
planning the pieces.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine

SHAPES = {  # query heads, KV heads, head width
    "bundled model": (8, 4, 32),
    "Llama-3-8B / 4": (8, 2, 64),
}


def compare(pattern: Any, tokens: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Seconds of one layer's attention by both, and CSA's distance from its share of the work."""
    import torch

    from sps2_mega.attention.csa.pieces import csa_pieces
    from sps2_mega.attention.layout.causal_pairs import causal_pairs
    from sps2_mega.attention.planner.sparse_volume import flops_ratio
    from sps2_mega.kernels.csa.sdpa import attend_pieces

    heads, kv_heads, width = shape
    q = torch.randn(tokens, heads, width)
    k, v = torch.randn(tokens, kv_heads, width), torch.randn(tokens, kv_heads, width)
    scale = width**-0.5
    where = dict(prompt_len=tokens, kv_heads=range(kv_heads), layer=0)

    def dense() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )

    def csa() -> None:
        pieces = csa_pieces(pattern, queries=range(tokens), **where)
        attend_pieces(q, k, v, pieces, scale=scale)

    def seconds(run: Any) -> dict[str, float]:
        began, cpu_began = time.perf_counter(), time.process_time()
        run()
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu_began,
        }

    result: dict[str, Any] = machine.interleaved(
        {"dense": lambda: seconds(dense), "csa": lambda: seconds(csa)}, repeats
    )
    ratio = flops_ratio(pattern, **where)
    share, cpu_share = (
        result["csa"][clock] / result["dense"][clock] for clock in ("seconds", "cpu_seconds")
    )
    dense_flops = 4 * width * heads * causal_pairs(range(tokens))
    result["dense"]["gflops_per_s"] = 1e-9 * dense_flops / result["dense"]["seconds"]
    result["csa"]["gflops_per_s"] = 1e-9 * dense_flops * ratio / result["csa"]["seconds"]
    return result | {
        "flops_ratio": ratio,
        "time_ratio": share,
        "ratio_of_ideal": share / ratio,
        "cpu_ratio_of_ideal": cpu_share / ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--degrees", default="1,4", help="near and far degree")
    parser.add_argument("--cells", type=int, default=8, help="cells of level 0 in the prompt")
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--halo", type=int, default=128)
    parser.add_argument("--tail", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write docs/results/csa.json")
    arguments = parser.parse_args()

    import torch

    from sps2_mega.attention.csa.pattern import CSAPattern

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    near, far = map(int, arguments.degrees.split(","))
    pattern = CSAPattern(
        degrees=(near, far),
        spans=(-(-arguments.tokens // arguments.cells),),
        sinks=arguments.sinks,
        halo=arguments.halo,
        tail=arguments.tail,
        sample_queries=False,
    )
    result = {
        name: {"query_heads, kv_heads, width": shape}
        | compare(pattern, arguments.tokens, shape, arguments.repeats)
        for name, shape in SHAPES.items()
    }
    print(json.dumps(result, indent=2))
    if arguments.save:
        print("written:", machine.save("csa", {"arguments": vars(arguments)} | result))


if __name__ == "__main__":
    main()
