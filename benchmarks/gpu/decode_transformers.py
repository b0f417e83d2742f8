"""Decode steps of transformers at its documented best: a static cache and a compiled forward.

Prompts of random tokens are prefilled, padded to the longest; then the time between tokens is
measured from the step on after which nothing is compiled or captured any more.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bounds import spread
from benchmarks.gpu.part import Part
from benchmarks.gpu.transformers_model import transformers_model

_EXPECTED_S = 60.0  # compilation and prefill


def run(part: Part) -> None:
    sizes = part.sizes
    shapes = [spread(*sizes.mixed)] + [[ctx] * batch for batch, ctx in sizes.compared_decode]
    steps = 2 * sizes.decode_steps
    model = transformers_model(part, longest=max(map(max, shapes)) + steps)
    for contexts in shapes:
        mixed = len(set(contexts)) > 1
        what = {
            "case": "decode mixed transformers" if mixed else "decode transformers",
            "batch": len(contexts),
            "context": [min(contexts), max(contexts)] if mixed else contexts[0],
            "tokens": sum(contexts),
        }
        part.case(
            what,
            partial(_timed, part, model, contexts, steps),
            seconds=_EXPECTED_S if part.on_cuda else 0.0,
        )


@torch.inference_mode()
def _timed(part: Part, model: Any, contexts: Sequence[int], steps: int) -> dict[str, Any]:
    longest = max(contexts)
    ids = torch.randint(2, model.config.vocab_size, (len(contexts), longest), device=part.device)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        mask[row, longest - context :] = 1
    times: list[float] = []

    def note(_ids: Tensor, scores: Tensor) -> Tensor:
        if part.on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return scores

    model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=steps,
        max_new_tokens=steps,
        pad_token_id=0,
        cache_implementation="static",
        logits_processor=[note],
    )
    gaps = [after - before for before, after in itertools.pairwise(times)]
    seconds = statistics.median(gaps[len(gaps) // 2 :])
    return {
        "seconds": seconds,
        "tokens_per_s": len(contexts) / seconds,
        "first_gaps": gaps[:5],
    }
