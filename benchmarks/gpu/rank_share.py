"""One rank's compute in an SP prefill over several ranks: seconds of a layer, from its own pieces.

Per transport and pattern the rank with the most visible pairs is timed, since the others wait for
it. Nothing is sent: keys are random and already there. The layer around the attention is Megatron's
own, with the rank's tokens, whose keys and values enter a cache. These are compute times per layer
as the simulator has them (`attention_s`, `layer_s`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device_time
from benchmarks.gpu.engine_rank import config_of, started
from benchmarks.gpu.part import Part
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.step import StepAttention
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.checkpoint.random_weights import fill_random
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.config import ModelConfig
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.kernels.csa.dispatch import attend_pieces
from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.mcore.gpt import GPT

_LONG = 262144  # tokens beyond which a layer's attention takes seconds: timed once, after a warm-up
_BLOCK = 16
_LAYERS = 2  # of the timed model: more would measure the same again


def run(part: Part) -> None:
    sizes = part.sizes
    model = resolve_model(sizes.model, needs_weights=False).config
    with started(config_of(part, num_blocks=8, max_model_len=64)) as rank:
        gpt = _short_model(rank, model)
        for prompt in sizes.sp_prompts:
            tokens = -(-prompt // sizes.sp)
            part.case(
                {"case": "rank share, layer", "prompt": prompt, "tokens": tokens},
                partial(_layer, part, model, gpt, tokens),
            )
            for name, far in [
                ("ulysses", 1),
                ("gather", 1),
                *(("gather", f) for f in sizes.far_degrees),
            ]:
                part.case(
                    {
                        "case": "rank share, attention",
                        "transport": name,
                        "degrees": [1, far] if far > 1 else [1],
                        "prompt": prompt,
                    },
                    partial(_attention, part, model, name, far, prompt),
                    seconds=20.0 if part.on_cuda else 0.0,
                )


class _QueriesOut:
    """Stand-in for attention, so that new keys and values only enter the cache."""

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        return q_TNH


def _short_model(rank: StartedRank, model: ModelConfig) -> GPT:
    short = replace(model, num_layers=_LAYERS, vocab_size=64)
    gpt = GPT(short, rank.groups, dtype=rank.compute.dtype, device=rank.compute.device)
    fill_random(gpt.weights(), short, tp_rank=0, tp=1)
    return gpt


def _layer(part: Part, model: ModelConfig, gpt: GPT, tokens: int) -> dict[str, Any]:
    pool = KVPool(
        num_layers=_LAYERS,
        num_blocks=-(-tokens // _BLOCK),
        block_size=_BLOCK,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=part.dtype,
        device=part.device,
    )
    attention = StepAttention(pool, torch.arange(tokens, device=part.device), _QueriesOut())
    ids = torch.zeros(tokens, dtype=torch.int64, device=part.device)
    start = gpt.begin(ids, torch.arange(tokens, device=part.device), attention)

    def layers() -> None:
        gpt.advance(replace(start), _LAYERS)

    taken = device_time.medians({"it": layers}, part.device, part.sizes.repeats)["it"]
    return {"layer_s": taken / _LAYERS}


@torch.inference_mode()
def _attention(
    part: Part, model: ModelConfig, transport: str, far: int, prompt: int
) -> dict[str, Any]:
    """Time the rank's share of a layer's attention.

    `ulysses`: all tokens, an even share of the heads. `gather`: all heads, two parts of the prompt
    if it is exact (one from either end, so that ranks are balanced), else the rank's own cell.
    """
    sp = part.sizes.sp
    shard = -(-prompt // sp)
    heads, kv_heads = model.num_heads, model.num_kv_heads
    if transport == "ulysses":
        heads, kv_heads = max(1, heads // sp), max(1, kv_heads // sp)
        runs = [range(prompt)]
    elif far == 1:
        half = -(-prompt // (2 * sp))
        runs = [range(half), range(prompt - half, prompt)]
    else:
        runs = [range(prompt - shard, prompt)]
    pattern = CSAPattern(
        degrees=(1, far) if far > 1 else (1,),
        spans=(shard,) if far > 1 else (),
        sinks=min(16, shard // 8),
        halo=min(128, shard // 8),
        tail=min(128, shard // 8),
        sample_queries=False,
    )
    plans = [
        csa_pieces(pattern, prompt_len=prompt, queries=run, kv_heads=range(kv_heads), layer=0)
        for run in runs
    ]

    def made(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, model.head_dim, dtype=part.dtype, device=part.device)

    queries = [made(len(run), heads) for run in runs]
    k, v = made(prompt, kv_heads), made(prompt, kv_heads)
    scale = model.head_dim**-0.5

    def attend() -> None:
        for q, run, pieces in zip(queries, runs, plans, strict=True):
            attend_pieces(q, k, v, pieces, scale=scale, q_start=run.start)

    repeats = part.sizes.repeats if prompt <= _LONG else 1
    taken = device_time.medians({"it": attend}, part.device, repeats)["it"]
    pairs = sum(_pairs(pieces) for pieces in plans)
    flops = 4.0 * model.head_dim * (heads // kv_heads) * pairs
    return {
        "attention_s": taken,
        "flops": flops,
        "flops_per_s": flops / taken,
        "merge_s": _merge_s(part, made(sum(map(len, runs)), heads)),
    }


def _pairs(pieces: Sequence[Piece]) -> int:
    return sum(piece.num_pairs * len(piece.kv_heads) for piece in pieces)


def _merge_s(part: Part, out: Tensor) -> float:
    """Seconds of merging partials of the rank's queries once."""
    lse = torch.randn(out.shape[:2], device=out.device)

    def merge() -> None:
        merge_two(out, lse, out, lse)

    return device_time.medians({"it": merge}, part.device, part.sizes.repeats)["it"]
