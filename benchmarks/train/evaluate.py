"""Quality of the trained model: bits per byte of held-out files, and answers found at given depths.

Decides the measures that the model card states. Everything here is dense attention in plain
PyTorch; `eval_accuracy.py` measures the serving runtime and its approximations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.train.corpus import BOS
from benchmarks.train.document import Event, interleave
from benchmarks.train.model import TinyLlama, token_losses
from benchmarks.train.tasks import digits, names

DEPTHS = (0.05, 0.275, 0.5, 0.725, 0.95)
TASKS = ("passkey", "key_value", "reference")
_NUM_KEYS = 10
_BATCH_TOKENS = 8192


@torch.inference_mode()
def bits_per_byte(model: TinyLlama, texts: dict[str, np.ndarray], window: int) -> float:
    """Bits per byte over all files, cut into independent windows of `window` bytes."""
    device = next(model.parameters()).device
    nats, num_bytes = 0.0, 0
    for targets, real in _windows(texts, window):
        logits = _logits(model, targets.to(device))
        losses = token_losses(logits, targets.to(device)) * real.to(device)
        nats += losses.sum().item()
        num_bytes += int(real.sum().item())
    return nats / math.log(2) / num_bytes


def _windows(texts: dict[str, np.ndarray], window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (bytes, 1.0 where a byte is real and not padding), [B, window] each."""
    pieces = [text[i : i + window] for text in texts.values() for i in range(0, len(text), window)]
    size = max(1, _BATCH_TOKENS // window)
    for start in range(0, len(pieces), size):
        group = pieces[start : start + size]
        tokens = torch.zeros(len(group), window, dtype=torch.int64)
        real = torch.zeros(len(group), window)
        for row, piece in enumerate(group):
            tokens[row, : len(piece)] = torch.from_numpy(piece.astype(np.int64))
            real[row, : len(piece)] = 1.0
        yield tokens, real


@torch.inference_mode()
def retrieval(
    model: TinyLlama,
    texts: dict[str, np.ndarray],
    *,
    task: str,
    length: int,
    num_probes: int,
    seed: int,
) -> dict[str, float]:
    """Share of probes whose answer is all the likeliest bytes, in total and per depth.

    `texts` fill the documents, which have `length` bytes with the answer.
    """
    device = next(model.parameters()).device
    per_depth = math.ceil(num_probes / len(DEPTHS))
    group = max(1, _BATCH_TOKENS // length)
    found: dict[str, float] = {}
    for depth in tqdm(DEPTHS, desc=f"{task} {length}", leave=False):
        hits = 0.0
        for start in range(0, per_depth, group):
            seeds = range(start, min(start + group, per_depth))
            generators = [
                np.random.default_rng([seed, length, int(1000 * depth), i]) for i in seeds
            ]
            probes = [probe(task, length, depth, rng, texts) for rng in generators]
            documents = np.stack([document for document, _ in probes])
            targets = torch.from_numpy(documents.astype(np.int64)).to(device)
            right = _logits(model, targets).argmax(-1) == targets
            hits += sum(
                row[-len(answer) :].all().item()
                for row, (_, answer) in zip(right, probes, strict=True)
            )
        found[f"depth {depth:g}"] = hits / per_depth
    return {"all": sum(found.values()) / len(found), **found, "num_probes": per_depth * len(DEPTHS)}


def probe(
    task: str, length: int, depth: float, rng: np.random.Generator, texts: dict[str, np.ndarray]
) -> tuple[np.ndarray, str]:
    """Bytes [length] of a probe, and its answer.

    The bytes are code, what is needed at `depth`, the question, and the answer at the end. passkey:
    one number of five digits. key_value: ten names with numbers. reference: ten, of which the one
    in question is defined by another name half-way from there to the end: that name and its number.
    """
    value = answer = digits(rng, 5)
    if task == "passkey":
        events = [Event(depth, [(f"# The pass key is {value}.\n", 1.0)])]
        question = "# What is the pass key? The pass key is "
    else:
        asked, *others = names(rng, _NUM_KEYS + 1)
        events = [Event(depth, [(f"{asked} = {value}\n", 1.0)])]
        for other in others[1:]:
            line = f"{other} = {digits(rng, 5)}\n"
            events.append(Event(rng.uniform(0.02, 0.98), [(line, 1.0)]))
        if task == "reference":
            line = f"{others[0]} = {asked}\n"
            events.append(Event((1 + depth) / 2, [(line, 1.0)]))
            asked, answer = others[0], f"{asked} == {value}"
        question = f"assert {asked} == "
    events.append(Event(1.0, [(question + answer, 1.0)]))
    long = [text for text in texts.values() if len(text) >= 2 * length]
    file = long[rng.integers(len(long))]
    start = rng.integers(len(file) - 2 * length + 1)
    return interleave(events, length, file[start : start + 2 * length])[0], answer


def _logits(model: TinyLlama, targets: Tensor) -> Tensor:
    """Logits [B, T, vocab] of the tokens that predict `targets` [B, T]."""
    inputs = torch.cat([torch.full_like(targets[:, :1], BOS), targets[:, :-1]], dim=1)
    positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    with torch.autocast(targets.device.type, dtype=torch.bfloat16):
        return model(inputs, positions)
