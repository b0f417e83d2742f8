"""Time to first token in transformers: one forward over the prompt, with cache and last logits."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bounds import attention_flops, linear_flops
from benchmarks.gpu.part import Part
from benchmarks.gpu.prefill import expected_s, num_rounds
from benchmarks.gpu.transformers_model import transformers_model
from sps2_mega.checkpoint.resolve import resolve_model


def run(part: Part) -> None:
    config = resolve_model(part.sizes.model, needs_weights=False).config
    model = transformers_model(part, longest=max(part.sizes.prompts))
    for tokens in part.sizes.prompts:
        flops = linear_flops(config, tokens) + attention_flops(config, tokens)
        part.case(
            {"case": "prefill transformers", "tokens": tokens},
            partial(_timed, part, model, tokens, flops),
            seconds=expected_s(part, config, tokens),
        )


@torch.inference_mode()
def _timed(part: Part, model: Any, tokens: int, flops: float) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=part.device)
    samples = []
    for _ in range(num_rounds(part, tokens)):
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        out.logits[0, -1].argmax().item()
        samples.append(time.perf_counter() - began)
        del out
    seconds = statistics.median(samples[1:])
    return {
        "seconds": seconds,
        "samples": samples,
        "tokens_per_s": tokens / seconds,
        "flops_per_s": flops / seconds,
    }
