"""Decode with rows that stay with their owner, and with weights that SP ranks share, side by side.

    python benchmarks/generation/weight_placement.py [--before CHECKOUT] [--save]

The model is `wide` (hidden size 2048: a decode step reads 0.7 GB of weights), float32, random
weights, two ranks over loopback, one thread each. Contestants take turns and swap their order from
repeat to repeat: `owner`, `sliced` and `auto` (chosen per step) of this checkout, and another
checkout. Each repeat is a process of its own, through the public `LLM`; figures are decoded tokens
per second, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import machine
from benchmarks.emulated.systems import SHAPES
from benchmarks.generation.checkout import ChildFailed, commit_of, run_models
from benchmarks.generation.workload import random_prompts

BATCHES = (1, 2, 4, 8, 16)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 25, 2
PLACEMENTS = ("owner", "sliced", "auto")


def batches(vocab_size: int) -> list[list[dict[str, Any]]]:
    """Every batch size, `ROUNDS` times; no two prompts share a prefix."""
    params = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
    made = []
    for number in range(ROUNDS):
        for size in BATCHES:
            prompts = random_prompts((PROMPT_TOKENS,) * size, seed=100 * number + size)
            made.append(
                [
                    {"prompt": [token % vocab_size for token in prompt], "params": params}
                    for prompt in prompts
                ]
            )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write docs/results/NAME.json")
    parser.add_argument("--name", default="weight-placement")
    arguments = parser.parse_args()
    shape = SHAPES["wide"]
    assert shape.llama is not None
    config = shape.llama | {"model_type": "llama", "dtype": "float32"}
    contestants: dict[str, tuple[Path, dict[str, Any]]] = {
        name: (machine.ROOT, {"weights": name}) for name in PLACEMENTS
    }
    if arguments.before is not None:
        contestants["before"] = (arguments.before.resolve(), {})
    samples: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in BATCHES} for name in contestants
    }
    tokens: dict[str, Any] = {}
    stolen = machine.stolen_since()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(config))
        for repeat in range(arguments.repeats):
            order = list(contestants) if repeat % 2 == 0 else list(contestants)[::-1]
            for name in order:
                checkout, options = contestants[name]
                model = {
                    "model": place,
                    "sp": arguments.sp,
                    "options": options
                    | {"dtype": "float32", "threads": 1, "load_format": "dummy"}
                    | {"max_model_len": 512, "num_blocks": 1024},
                    "batches": batches(shape.vocab_size),
                }
                try:
                    _, answers = run_models(checkout, [model])
                except ChildFailed as error:
                    sys.stderr.write(f"weight_placement: {error}\n")
                    return 2
                rates: dict[int, list[float]] = {size: [] for size in BATCHES}
                for size, answer in zip(BATCHES * ROUNDS, answers, strict=True):
                    rates[size].append(answer["decode_tokens"] / answer["decode_s"])
                for size, found in rates.items():
                    samples[name][size].append(statistics.median(found))
                tokens.setdefault(name, [answer["tokens"] for answer in answers])
                shown = "  ".join(f"{size}: {samples[name][size][-1]:.1f}" for size in BATCHES)
                print(f"{repeat + 1}/{arguments.repeats}  {name:7} {shown}", flush=True)
    result: dict[str, Any] = {
        "model": "wide",
        "sp": arguments.sp,
        "same_tokens_as_owner": {name: tokens[name] == tokens["owner"] for name in tokens},
        "tokens_per_s": {
            name: {size: statistics.median(runs) for size, runs in each.items()}
            for name, each in samples.items()
        },
        "samples": samples,
        "share_stolen": stolen(),
        "after": commit_of(machine.ROOT),
    }
    base = "owner" if arguments.before is None else "before"
    result["ratios"] = {
        name: {
            size: statistics.median(
                new / old for new, old in zip(each[size], samples[base][size], strict=True)
            )
            for size in BATCHES
        }
        for name, each in samples.items()
    }
    if arguments.before is not None:
        result["before"] = commit_of(arguments.before.resolve())
    print(json.dumps({key: result[key] for key in ("ratios", "same_tokens_as_owner")}, indent=2))
    if arguments.save:
        shown = ["BEFORE" if str(arguments.before) == a else a for a in sys.argv[1:]]
        print("written:", machine.save(arguments.name, result, shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
