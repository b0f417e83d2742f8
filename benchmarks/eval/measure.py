"""Scores of held-out texts under one attention setting, through the engine's prefill.

Every rank calls with the same arguments. Decides no setting and no text; `answers` handles probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.eval.scoring import executor_with, score_prompt
from sps2_mega.config import CSAConfig, EngineConfig
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.text.tokenizer import Tokenizer

NUM_BUCKETS = 8


@dataclass(slots=True)
class Job:
    """A started rank that measures one setting after the other on the same weights."""

    config: EngineConfig
    started: StartedRank
    num_steps: int = field(default=0)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step under the watchdog: a rank that hangs in it ends the job."""
        self.num_steps += 1
        self.started.watchdog.step_begin(self.num_steps, name)
        yield
        self.started.watchdog.step_end()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """Scores of all windows of one length.

    `nats_WT` are losses of tokens 1.. of each window, `bytes_WT` the bytes that they stand for,
    `rows` the log-probabilities after every `stride`-th token, which a divergence needs.
    """

    nats_WT: Tensor
    bytes_WT: Tensor
    rows: list[Tensor]
    stride: int


def score_texts(
    job: Job,
    csa: CSAConfig,
    windows: list[list[int]],
    tokenizer: Tokenizer,
    *,
    stride: int,
    on_done: Callable[[], None],
) -> TextScores:
    """Score windows of one length, as prompts: their last tokens are the exact tail."""
    executor = executor_with(job.started.executor, csa)
    nats, num_bytes, rows = [], [], []
    for window in windows:
        with job.step("score"):
            score = score_prompt(
                executor, window, row_positions=range(stride - 1, len(window) - 1, stride)
            )
        nats.append(-score.logprobs_T)
        num_bytes.append(torch.tensor([len(tokenizer.token_bytes(t)) for t in window[1:]]).double())
        rows.append(score.rows_PV)
        on_done()
    return TextScores(
        nats_WT=torch.stack(nats), bytes_WT=torch.stack(num_bytes), rows=rows, stride=stride
    )


def text_measures(scores: TextScores, dense: TextScores, tail: int) -> dict[str, Any]:
    """Bits per byte, perplexity per token and divergence from dense.

    They are taken over the tokens that no tail predicts, except bits per byte by eighth of the
    window, which cover all tokens. `tail` is the longest one of all settings compared, so that all
    are judged on the same tokens.
    """
    body = slice(0, max(1, scores.nats_WT.shape[1] - tail))
    # Fmt: skip.
    bits_W, dense_W = (
        _bits_per_byte(s.nats_WT[:, body], s.bytes_WT[:, body]) for s in (scores, dense)
    )
    delta_W = bits_W - dense_W
    divergences = []
    for rows, dense_rows in zip(scores.rows, dense.rows, strict=True):
        count = body.stop // scores.stride
        gap = dense_rows[:count].double() - rows[:count].double()
        divergences.append((dense_rows[:count].double().exp() * gap).sum(-1))
    nats = scores.nats_WT[:, body]
    num_windows, num_tokens = scores.nats_WT.shape
    num_parts = min(NUM_BUCKETS, num_tokens)
    return {
        "bits_per_byte": _total_bits_per_byte(nats, scores.bytes_WT[:, body]),
        "delta_bits_per_byte": delta_W.mean().item(),
        "delta_standard_error": (
            delta_W.std().item() / math.sqrt(num_windows) if num_windows > 1 else None
        ),
        "perplexity": math.exp(nats.mean().item()),
        "kl_from_dense": torch.cat(divergences).mean().item()
        if body.stop >= scores.stride
        else None,
        "by_position": [
            _total_bits_per_byte(part, part_bytes)
            for part, part_bytes in zip(
                scores.nats_WT.tensor_split(num_parts, 1),
                scores.bytes_WT.tensor_split(num_parts, 1),
                strict=True,
            )
        ],
        "num_windows": num_windows,
        "num_tokens": nats.numel(),
    }


def _bits_per_byte(nats_WT: Tensor, bytes_WT: Tensor) -> Tensor:
    return nats_WT.sum(1) / math.log(2) / bytes_WT.sum(1)


def _total_bits_per_byte(nats_WT: Tensor, bytes_WT: Tensor) -> float:
    return nats_WT.sum().item() / math.log(2) / bytes_WT.sum().item()
