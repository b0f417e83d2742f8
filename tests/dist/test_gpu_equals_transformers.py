"""Every family on a GPU in 16 bits is as near to float32 as transformers in the same type on the
same GPU is."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from engine_run import run_engine

LENGTHS = (1, 7, 64, 333, 1000)
TOP = 20  # likeliest tokens that are compared, after the prompt and after one decode step


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_first_and_second_token(name, dtype, tmp_path):
    model = families.save_family(name, tmp_path)
    prompts = families.prompts(LENGTHS, seed=2)
    params = dict(max_tokens=2, temperature=0.0, logprobs=TOP, ignore_eos=True)
    options = dict(model=str(tmp_path), device="cuda", dtype=dtype)
    outputs = run_engine(options, [(prompt, params) for prompt in prompts])
    in_16_bits = copy.deepcopy(model).to("cuda", getattr(torch, dtype))
    ours, theirs = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        entries = output.completions[0].logprobs
        tokens = [*prompt, output.completions[0].token_ids[0]]
        exact = last_two(model, tokens)
        rounded = last_two(in_16_bits, tokens)
        for entry, wanted, other in zip(entries, exact, rounded, strict=True):
            for token, logprob in entry.top:
                ours.append(abs(logprob - wanted[token].item()))
                theirs.append(abs(other[token].item() - wanted[token].item()))
    assert max(ours) <= 2 * max(theirs) + 0.02, (max(ours), max(theirs))
    mean = sum(ours) / len(ours)
    assert mean <= 1.5 * sum(theirs) / len(theirs) + 0.002, mean


@torch.inference_mode()
def last_two(model, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [2, vocab] after all tokens but the last, and after all: what the engine's
    prefill and its first decode step give."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([tokens], device=device)).logits[0, -2:]
    return logits.float().log_softmax(-1).cpu()
