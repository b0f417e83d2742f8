"""Two checkouts side by side: start-up, prefill, decode and greedy tokens, interleaved in one run.

    git worktree add /tmp/before COMMIT
    python benchmarks/two_commits.py --before /tmp/before [--after DIR] [--tokens] [--save]

Each repeat starts every checkout in a process of its own on every setting; checkouts take turns and
swap their order from repeat to repeat. Settings are the bundled model and a dummy Llama of 200M
parameters, on one rank and on two (SP 2, gloo), float32, one thread per rank. One script measures
both (`generation/child.py`), through the public `LLM`:

    start-up  from the start of the process to the first token of a short prompt
    prefill   until all first tokens of a batch are there
    decode    from then until all last tokens are there

Ratios are seconds after / seconds before: once of the medians, once as the median of the ratios
within each repeat, on which a slow minute of the machine acts less. `--tokens` also compares greedy
tokens of the bundled prompts and of the models of tests/families.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.generation.checkout import ChildFailed, commit_of, run_models
from benchmarks.generation.tokens import compare
from benchmarks.generation.workload import random_prompts, save_dummy_llama, source_prompts

MEASURES = ("startup_s", "prefill_s", "decode_s")
RANKS = (1, 2)
SIDES = ("before", "after")
TINY, DUMMY = "sps2-tiny", "dummy Llama, 200M parameters"
_TINY_BATCH = dict(count=16, shortest=100, longest=2000)  # characters, one token each
_TINY_NEW_TOKENS, _DUMMY_NEW_TOKENS = 64, 17
_DUMMY_LENGTHS = (512, 128, 128, 64)


def settings(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """A model with its batches for `child.py`, per model and number of ranks."""
    dummy = save_dummy_llama(folder / "dummy-llama")
    batches: dict[str, list[Any]] = {TINY: [], DUMMY: []}
    for number in range(rounds):  # no two rounds share a prefix that could be cached
        texts = [f"# {number}\n{text}" for text in source_prompts(**_TINY_BATCH)]
        batches[TINY].append([request(text, _TINY_NEW_TOKENS) for text in texts])
        prompts = random_prompts(_DUMMY_LENGTHS, seed=number)
        batches[DUMMY].append([request(prompt, _DUMMY_NEW_TOKENS) for prompt in prompts])
    options = {"dtype": "float32", "threads": 1}
    models = {
        TINY: {"model": TINY, "options": options},
        DUMMY: {"model": dummy, "options": options | {"load_format": "dummy"}},
    }
    return {
        f"{name}, {sp} rank{'s' * (sp > 1)}": model | {"sp": sp, "batches": batches[name]}
        for name, model in models.items()
        for sp in RANKS
    }


def request(prompt: str | list[int], new_tokens: int) -> dict[str, Any]:
    params = {"max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    return {"prompt": prompt, "params": params}


def measure(checkout: Path, model: dict[str, Any]) -> dict[str, float]:
    """One repeat of one setting: start-up, and medians over the batches."""
    startup_s, answers = run_models(checkout, [model])
    return {
        "startup_s": startup_s,
        **{key: statistics.median(a[key] for a in answers) for key in ("prefill_s", "decode_s")},
        **{key: answers[0][key] for key in ("prefill_tokens", "decode_tokens")},
    }


def summary(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians per side, rates from them, ratios, and all samples of one setting."""
    result: dict[str, Any] = {}
    for side, repeats in samples.items():
        medians = {key: statistics.median(sample[key] for sample in repeats) for key in repeats[0]}
        rates = {
            f"{phase}_tokens_per_s": medians[f"{phase}_tokens"] / medians[f"{phase}_s"]
            for phase in ("prefill", "decode")
        }
        result[side] = medians | rates
    pairs = list(zip(*(samples[side] for side in SIDES), strict=True))
    result["ratios"] = {
        key: {
            "of_medians": result["after"][key] / result["before"][key],
            "median_within_repeats": statistics.median(new[key] / old[key] for old, new in pairs),
        }
        for key in MEASURES
    }
    result["samples"] = samples
    return result


def run_all(checkouts: dict[str, Path], folder: Path, repeats: int, rounds: int) -> dict[str, Any]:
    """Measure all settings and return their summaries."""
    chosen = settings(folder, rounds)
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {side: [] for side in SIDES} for name in chosen
    }
    for repeat in range(repeats):
        for name, model in chosen.items():
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                sample = measure(checkouts[side], model)
                samples[name][side].append(sample)
                seconds = "  ".join(f"{key} {sample[key]:.3f}" for key in MEASURES)
                print(f"{repeat + 1}/{repeats}  {name}  {side}  {seconds}", flush=True)
    return {name: summary(each) for name, each in samples.items()}


def table(result: dict[str, Any]) -> str:
    """One line per setting and measure."""
    lines = [
        "| setting | seconds of | before | after | ratio | ratio within repeats |",
        "|---" * 6 + "|",
    ]
    for name, found in result.items():
        for key in MEASURES:
            ratios = found["ratios"][key]
            lines.append(
                f"| {name} | {key[:-2]} | {found['before'][key]:.3f} | {found['after'][key]:.3f} "
                f"| {ratios['of_medians']:.3f} | {ratios['median_within_repeats']:.3f} |"
            )
    return "\n".join(lines)


def without_folders(arguments: list[str]) -> list[str]:
    """The command line with BEFORE and AFTER in place of folders of this machine."""
    shown: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if shown and shown[-1] in ("--before", "--after"):
            shown.append(shown[-1][2:].upper())
        elif equals and flag in ("--before", "--after"):
            shown += [flag, flag[2:].upper()]
        else:
            shown.append(argument)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--after", type=Path, default=machine.ROOT, help="default: this one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="batches per process")
    parser.add_argument("--quick", action="store_true", help="one repeat of one batch")
    parser.add_argument("--tokens", action="store_true", help="also compare greedy tokens")
    parser.add_argument(
        "--only-tokens", action="store_true", help="compare tokens, measure nothing"
    )
    parser.add_argument("--save", action="store_true", help="write docs/results/NAME.json")
    parser.add_argument("--name", default="house", help="of the result file")
    arguments = parser.parse_args()
    checkouts = {side: getattr(arguments, side).resolve() for side in SIDES}
    repeats, rounds = (1, 1) if arguments.quick else (arguments.repeats, arguments.rounds)
    stolen = machine.stolen_since()
    result: dict[str, Any] = {side: commit_of(path) for side, path in checkouts.items()}
    try:
        with tempfile.TemporaryDirectory() as place:
            if arguments.tokens or arguments.only_tokens:
                result["tokens"] = compare(
                    checkouts["before"], checkouts["after"], Path(place, "families"), RANKS
                )
                print(json.dumps(result["tokens"], indent=2), flush=True)
            if not arguments.only_tokens:
                result["settings"] = run_all(checkouts, Path(place), repeats, rounds)
                print(table(result["settings"]))
    except ChildFailed as error:
        sys.stderr.write(f"two_commits: {error}\n")
        return 2
    result |= {"repeats": repeats, "batches_per_process": rounds, "share_stolen": stolen()}
    if arguments.save:
        print("written:", machine.save(arguments.name, result, without_folders(sys.argv[1:])))
    return 0 if result.get("tokens", {}).get("identical", True) else 1


if __name__ == "__main__":
    sys.exit(main())
