"""Queries that travel see what they would see at home: fresh prompts, cached prefixes, windows, empty ranks."""

import os

import torch
from harness import free_port, run_ranks

from sps2_mega.attention.layout import build_layout
from sps2_mega.attention.pass_q import PassQ
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.kernels.attention.reference import attend_run

BLOCK, HEADS, KV_HEADS, WIDTH, SP = 4, 6, 2, 8, 3
# Blocks of each sequence by rank, its length, the tokens cached before.
STEPS = [
    ([[1]], [1], [0]),
    ([[0, 1, 2, 2, 1, 0]], [23], [0]),
    ([[0, 0, 2], [2, 2]], [11, 6], [0, 0]),
    ([[0, 1, 2, 2, 0, 1, 0, 0], [1, 0]], [31, 7], [22, 6]),
]


def worst_error(rank, port, window):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=SP))
    group = initialize(store, info, topology, device=cpu, timeout_s=60).sp
    worst, seen = 0.0, 0
    for number, (ranks, ends, starts) in enumerate(STEPS):
        layout = build_layout(ranks, ends, starts=starts, block_size=BLOCK, sp_size=SP)
        generator = torch.Generator().manual_seed(number)
        whole = [torch.randn(3, end, HEADS, WIDTH, generator=generator) for end in ends]
        q = torch.empty(layout.queries.counts[rank], HEADS, WIDTH)
        k, v = torch.empty(2, layout.keys.counts[rank], KV_HEADS, WIDTH)
        for run in layout.queries.local_runs(rank):
            q[run.local] = whole[run.sequence][0, run.start : run.end]
        for run in layout.keys.local_runs(rank):
            k[run.local] = whole[run.sequence][1, run.start : run.end, :KV_HEADS]
            v[run.local] = whole[run.sequence][2, run.start : run.end, :KV_HEADS]
        out = PassQ(layout, group).attend(0, q, k, v, ScoreRule(0.4, window))
        for run in layout.queries.local_runs(rank):
            seq = whole[run.sequence]
            expected, _ = attend_run(
                seq[0, run.start : run.end],
                seq[1, : run.end, :KV_HEADS],
                seq[2, : run.end, :KV_HEADS],
                scale=0.4,
                q_start=run.start,
                window=window,
            )
            worst = max(worst, (out[run.local] - expected).abs().max().item())
            seen += run.num_tokens
    finalize()
    return worst, seen


def test_every_layout_gives_the_one_rank_result():
    for window in (None, 5):
        found = run_ranks(worst_error, SP, free_port(), window)
        assert max(error for error, _ in found) < 2e-6
        new = sum(sum(ends) - sum(starts) for _, ends, starts in STEPS)
        assert sum(seen for _, seen in found) == new
