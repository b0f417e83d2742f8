"""Bytes that the planner expects equal those that the communication layer counts, by rank."""

import os

import pytest
import torch
from harness import free_port, run_ranks

from sps2_mega.attention.build import make_transport
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.planner.exact import TRANSPORTS
from sps2_mega.attention.planner.step_shape import step_shape
from sps2_mega.attention.planner.traffic import bytes_moved
from sps2_mega.attention.transports.base import SoftmaxParams

BLOCK, WIDTH = 4, 8
# Blocks of each sequence by rank, its length, the tokens cached before.
STEPS = {
    "equal shares": ([[0, 1, 2, 0, 1, 2]], [24], [0]),
    "one token": ([[1]], [1], [0]),
    "ragged, a rank without tokens": ([[0, 0, 2], [2, 2]], [11, 6], [0, 0]),
    "behind a cached prefix": ([[0, 1, 2, 2, 0], [1, 0]], [19, 7], [14, 0]),
}


def bytes_on_rank(rank, port, steps, names, heads, kv_heads):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=3))
    group = initialize(store, info, topology, device=cpu, timeout_s=60).sp
    sent = {}
    for step, (ranks, ends, starts) in steps.items():
        layout = build_layout(ranks, ends, starts=starts, block_size=BLOCK, sp_size=3)
        q = torch.randn(layout.queries.counts[group.rank], heads, WIDTH)
        k, v = torch.randn(2, layout.keys.counts[group.rank], kv_heads, WIDTH)
        for name in names:
            before = group.traffic.bytes_sent
            transport = make_transport(name, layout, group, cpu)
            transport.attend(0, q, k, v, SoftmaxParams(0.3))
            sent[step, name] = group.traffic.bytes_sent - before
    finalize()
    return sent


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)], ids=str)
def test_every_transport_sends_what_was_planned(heads, kv_heads):
    names = TRANSPORTS
    counted = run_ranks(bytes_on_rank, 3, free_port(), STEPS, names, heads, kv_heads)
    for step, (ranks, ends, starts) in STEPS.items():
        layout = build_layout(ranks, ends, starts=starts, block_size=BLOCK, sp_size=3)
        shape = step_shape(
            layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=WIDTH, itemsize=4
        )
        for name in names:
            planned = [sum(row) for row in bytes_moved(name, shape)]
            assert [sent[step, name] for sent in counted] == planned, (step, name)
