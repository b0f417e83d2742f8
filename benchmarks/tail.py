"""Cost of the exact tail in a sparse prefill: measured here, and computed for a long prompt.

    python benchmarks/tail.py [--tokens 16384] [--sp 2] [--tail 128] [--save]

`measured`: seconds to the first token with and without tail, by two jobs on the same prompts in
turn. `computed`: for `--long` tokens on `--ranks` ranks of the model `--long-model`, the tail's
share of the attention pairs, of all FLOPs of the prefill, and of the bytes sent, from the formulas
of the planner. The target is less than 3 % of a prefill of 128K tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds to the first token of both jobs, each with a process of its own."""
    import multiprocessing
    import random

    draw = random.Random(0)
    context = multiprocessing.get_context("spawn")
    jobs = {}
    for name, tail in (("with_tail", args.tail), ("without", 0)):
        ours, theirs = context.Pipe()
        job = context.Process(target=_job, args=(theirs, args.model, args.tokens, args.sp, tail))
        job.start()
        jobs[name] = job, ours

    def ttft(name: str) -> dict[str, float]:
        jobs[name][1].send([draw.randrange(1, 256) for _ in range(args.tokens)])
        return {"ttft_s": jobs[name][1].recv()}

    contestants = {name: partial(ttft, name) for name in jobs}
    found = machine.interleaved(contestants, args.repeats)
    for job, pipe in jobs.values():
        pipe.send(None)
        job.join()
    added = found["with_tail"]["ttft_s"] / found["without"]["ttft_s"] - 1
    return {"tokens": args.tokens, "sp": args.sp, **found, "added_share": round(added, 4)}


def _job(pipe: Any, model: str, tokens: int, sp: int, tail: int) -> None:
    """Loop of a job: prompts in, seconds to the first token out, until None arrives."""
    from sps2_mega.config import CSAConfig
    from sps2_mega.serving import LLM
    from sps2_mega.types import SamplingParams

    once = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    csa = CSAConfig(degrees=(1, 4), spans=(tokens // 8,), tail=tail)
    with LLM(
        model, csa=csa, sp=sp, max_model_len=tokens + 2, threads=1, no_prefix_caching=True
    ) as llm:
        while (prompt := pipe.recv()) is not None:
            (output,) = llm.generate([prompt], once)
            pipe.send(output.completions[0].timings.ttft_s)


def computed(args: argparse.Namespace) -> dict[str, Any]:
    """Tail's shares in a prefill with contiguous shards, cells of one rank and degrees 1,4."""
    from sps2_mega.attention.csa.pattern import CSAPattern, tail_starts
    from sps2_mega.attention.layout.causal_pairs import causal_pairs
    from sps2_mega.attention.layout.token_layout import build_layout
    from sps2_mega.attention.planner.visible_rows import visible_between
    from sps2_mega.checkpoint.model_file import named_model_file

    model = named_model_file(args.long_model).config
    tokens, ranks, block = args.long, args.ranks, 16
    blocks = tokens // block
    layout = build_layout(
        [[index * ranks // blocks for index in range(blocks)]],
        [tokens],
        block_size=block,
        sp_size=ranks,
    )
    pattern = CSAPattern(
        degrees=(1, 4),
        spans=(tokens // ranks,),
        sinks=16,
        halo=128,
        tail=args.tail,
        sample_queries=False,
    )
    starts = tail_starts([pattern], [tokens])
    body = visible_between(layout, [pattern], starts, range(model.num_kv_heads))
    per_kv_head = model.num_heads // model.num_kv_heads
    body_pairs = sum(pair.pairs for pair in body.values()) * per_kv_head
    tail_pairs = causal_pairs(range(starts[0], tokens)) * model.num_heads
    width, item = model.head_dim, 2
    body_bytes = sum(p.key_rows * 2 * width * item for (a, b), p in body.items() if a != b)
    tail_bytes = args.tail * model.num_heads * (2 * width * item + 4) * (ranks - 1)
    weights = model.hidden_size * width * 2 * (model.num_heads + model.num_kv_heads)
    weights += model.hidden_size * model.ffn_hidden_size * (3 if model.gated else 2)
    all_flops = 4 * width * (body_pairs + tail_pairs) + 2 * weights * tokens
    return {
        "model": args.long_model,
        "tokens": tokens,
        "ranks": ranks,
        "tail": args.tail,
        "share_of_attention": round(tail_pairs / (tail_pairs + body_pairs), 5),
        "share_of_flops": round(4 * width * tail_pairs / all_flops, 5),
        "share_of_bytes": round(tail_bytes / (tail_bytes + body_bytes), 5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sps2-tiny")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--tail", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long-model", default="llama-3-8b")
    parser.add_argument("--long", type=int, default=131072)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--save", action="store_true", help="write docs/results/tail.json")
    args = parser.parse_args()
    result = {"computed": computed(args), "measured": measured(args)}
    print(json.dumps(result, indent=2))
    if args.save:
        machine.save("tail", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
