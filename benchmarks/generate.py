"""Offline generation against transformers: one rank, same model, prompts, dtype and threads.

    python benchmarks/generate.py [--dtype float32] [--requests 16] [--new-tokens 128] [--save]

Both get the same batch of mixed-length prompts (Python source, 100 to 2000 tokens for the bundled
byte-level model) and take turns in one run. transformers pads them into one batch; we prefill and
decode them unpadded. Its prefill of one prompt after the other, without padding, is shown too. Two
commits of our own are compared by `two_commits.py`.

    prefill   prompt tokens (padding not counted) / time until all first tokens are there
    decode    tokens after the first / time after that
    overhead  time of a decode step outside the model's forward: plan, inputs, sampling, commit
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.generation.workload import source_prompts


@dataclass
class ForwardClock:
    """Clock of the time spent in the model's forward, by module hooks."""

    seconds: float = 0.0
    _began: float = field(default=0.0)

    def attach(self, module: Any) -> None:
        module.register_forward_pre_hook(lambda *_: setattr(self, "_began", time.perf_counter()))
        module.register_forward_hook(self._stop)

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def run_ours(
    engine: Any, prompts: list[list[int]], new_tokens: int, clock: ForwardClock
) -> dict[str, float]:
    from sps2_mega.types import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        assert engine.add_request(str(number), prompt, params) is None
    while engine.stats().output_tokens % (len(prompts) * new_tokens) < len(prompts):
        engine.step()
    prefilled = time.perf_counter()
    overheads = []
    while engine.has_work():
        before, clock.seconds = time.perf_counter(), 0.0
        engine.step()
        overheads.append(time.perf_counter() - before - clock.seconds)
    ended = time.perf_counter()
    return _rates(prompts, new_tokens, began, prefilled, ended) | {
        "overhead_ms_per_step": 1e3 * statistics.median(overheads)
    }


def run_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    first_token: list[float] = []

    def note_first(_ids: Any, scores: Any) -> Any:
        if not first_token:
            first_token.append(time.perf_counter())
        return scores

    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        logits_processor=[note_first],
    )
    return _rates(prompts, new_tokens, began, first_token[0], time.perf_counter())


def prefill_one_by_one(model: Any, prompts: list[list[int]]) -> dict[str, float]:
    """Rate of transformers without padding: what a careful user gets for mixed lengths."""
    import torch

    began = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=1,
            pad_token_id=0,
        )
    elapsed = time.perf_counter() - began
    return {"prefill_tokens_per_s": sum(map(len, prompts)) / elapsed}


def _rates(
    prompts: list[list[int]], new_tokens: int, began: float, prefilled: float, ended: float
) -> dict[str, float]:
    return {
        "prefill_tokens_per_s": sum(map(len, prompts)) / (prefilled - began),
        "decode_tokens_per_s": len(prompts) * (new_tokens - 1) / (ended - prefilled),
    }


def plot(ratios: dict[str, float], path: Path) -> None:
    """Draw the speed relative to transformers as bars; 1 is a tie."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(ratios) + 1.2), layout="constrained")
    names = [name.replace("_tokens_per_s", "") for name in ratios]
    bars = axes.barh(names, list(ratios.values()))
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of sps2_mega relative to transformers, one rank, same threads")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="sps2-tiny", help="Hugging Face folder or a bundled name"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--shortest", type=int, default=100, help="characters of the shortest prompt"
    )
    parser.add_argument("--longest", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write docs/results/NAME.json and .png")
    parser.add_argument("--name", default="generate", help="of the result files")
    arguments = parser.parse_args()

    import torch
    import transformers

    from sps2_mega.checkpoint.resolve import resolve_model
    from sps2_mega.config import EngineConfig, SchedulerConfig
    from sps2_mega.engine.start import start_driver
    from sps2_mega.parallel.launcher import from_environment

    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        threads=arguments.threads,
        scheduler=SchedulerConfig(max_running=arguments.requests),
    )
    engine = start_driver(config, from_environment())
    clock = ForwardClock()
    clock.attach(engine.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve_model(arguments.model).path, dtype=getattr(torch, arguments.dtype)
    ).eval()
    model.to(next(engine.model.parameters()).device)
    texts = source_prompts(arguments.requests, arguments.shortest, arguments.longest)
    prompts = [engine.tokenizer.encode(text) for text in texts]
    result = machine.interleaved(
        {
            "ours": lambda: run_ours(engine, prompts, arguments.new_tokens, clock),
            "transformers": lambda: run_transformers(model, prompts, arguments.new_tokens),
            "transformers one by one": lambda: prefill_one_by_one(model, prompts),
        },
        arguments.repeats,
    )
    ours = result["ours"]
    result["ratios"] = {
        f"{key} / {name}": ours[key] / value
        for name, rates in result.items()
        if name != "ours"
        for key, value in rates.items()
    }
    result["prompt_lens"] = sorted(map(len, prompts))
    print(json.dumps(result, indent=2))
    if arguments.save:
        path = machine.save(arguments.name, result)
        plot(result["ratios"], path.with_suffix(".png"))
        print("written:", path)
    engine.shutdown()


if __name__ == "__main__":
    main()
