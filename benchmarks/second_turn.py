"""Time to first token of a second turn on a long context, beside the first turn, in one run.

    python benchmarks/second_turn.py [--tokens 16384] [--sp 2] [--transport ring]
        [--scheduler sarathi] [--save]

The first turn is a prompt of `--tokens` tokens and a short answer; the second adds a question of
`--question` tokens to all that. With prefix caching only the new tokens are computed, so `ratio`
(second / first time to the first token) should be near `new_tokens / tokens`, plus what those
tokens attend to. `--no-enable-prefix-caching` shows the cost without it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token of both turns, and the number of tokens that each computed."""
    from sps2_mega.serving import LLM
    from sps2_mega.types import SamplingParams

    params = SamplingParams(max_tokens=args.answer, temperature=0.0, ignore_eos=True)
    draw = random.Random(0)
    prompt, question = (
        [draw.randrange(1, 256) for _ in range(count)] for count in (args.tokens, args.question)
    )
    with LLM(
        args.model,
        tp=args.tp,
        sp=args.sp,
        transport=args.transport,
        policy=args.scheduler,
        no_prefix_caching=args.no_prefix_caching,
        max_model_len=args.tokens + 2 * args.answer + args.question,
        threads=args.threads,
    ) as llm:
        llm.generate([prompt[:64][::-1]], params)  # first use of every code path
        (first,) = llm.generate([prompt], params)
        (second,) = llm.generate([prompt + first.completions[0].token_ids + question], params)
    turns = [
        {
            "ttft_s": round(turn.completions[0].timings.ttft_s, 4),
            "prompt_tokens": len(turn.prompt_token_ids),
            "cached_tokens": turn.num_cached_tokens,
        }
        for turn in (first, second)
    ]
    ratio = turns[1]["ttft_s"] / turns[0]["ttft_s"]
    return {"first": turns[0], "second": turns[1], "ratio": round(ratio, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sps2-tiny")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the first prompt")
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--question", type=int, default=64)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--sp", type=int, default=1)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--scheduler", default="sps2")
    parser.add_argument("--no-enable-prefix-caching", dest="no_prefix_caching", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="per rank, on CPU")
    parser.add_argument("--save", action="store_true", help="write docs/results/second_turn.json")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "save"}
    result = {"settings": settings, **measure(args)}
    print(json.dumps(result, indent=2))
    if args.save:
        machine.save("second_turn", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
