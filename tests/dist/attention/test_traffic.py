"""Bytes counted at the sender equal the formulas of the transports, exactly, on equal shards."""

from __future__ import annotations

import os

import pytest
import torch
from harness import free_port, run_ranks

from sps2_mega.attention.build import make_transport
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.levels.transport import HierarchicalTransport
from sps2_mega.attention.pipeline.executor import plain_pipeline
from sps2_mega.attention.transports.base import SoftmaxParams

TOKENS, BLOCK, HEADS, KV_HEADS, WIDTH, ITEM = 96, 8, 12, 6, 16, 4
TAIL, SINKS, HALO, DEGREE = 8, 2, 4, 3


def bytes_on_rank(rank, port, sp, name):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=sp))
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
    blocks = TOKENS // BLOCK
    ranks = [block * sp // blocks for block in range(blocks)]
    layout = build_layout([ranks], [TOKENS], block_size=BLOCK, sp_size=sp)
    cpu = torch.device("cpu")
    if name == "csa":
        pattern = CSAPattern(
            degrees=(1, DEGREE),
            spans=(TOKENS // sp,),
            sinks=SINKS,
            halo=HALO,
            tail=TAIL,
            sample_queries=False,
        )
        transport = HierarchicalTransport(
            layout,
            [pattern],
            [TOKENS],
            ("gather",),
            (sp,),
            kv_heads=range(KV_HEADS),
            group=groups.sp,
            device=cpu,
            pipeline=plain_pipeline(cpu),
        )
    else:
        transport = make_transport(name, layout, groups.sp, cpu)
    local = layout.queries.counts[groups.sp.rank]
    q = torch.randn(local, HEADS, WIDTH)
    k, v = torch.randn(local, KV_HEADS, WIDTH), torch.randn(local, KV_HEADS, WIDTH)
    before = groups.sp.traffic.bytes_sent
    transport.attend(0, q, k, v, SoftmaxParams(0.2))
    sent = groups.sp.traffic.bytes_sent - before
    finalize()
    return sent


@pytest.mark.parametrize("sp", [2, 3])
@pytest.mark.parametrize("name", ["gather", "ring"])
def test_passing_keys_and_values_costs_a_shard_per_other_rank(sp, name):
    expected = 2 * TOKENS * KV_HEADS * WIDTH * ITEM * (sp - 1) // sp
    assert run_ranks(bytes_on_rank, sp, free_port(), sp, name) == [expected] * sp


@pytest.mark.parametrize("sp", [2, 3])
def test_ulysses_sends_the_other_ranks_heads_and_returns_their_outputs(sp):
    expected = (TOKENS // sp) * (2 * HEADS + 2 * KV_HEADS) * WIDTH * ITEM * (sp - 1) // sp
    assert run_ranks(bytes_on_rank, sp, free_port(), sp, "ulysses") == [expected] * sp


@pytest.mark.parametrize("sp", [2, 3])
def test_csa_sends_one_far_key_in_d_plus_halo_sinks_and_tail(sp):
    """Later ranks see earlier keys only, so rank r sends to sp - 1 - r ranks: the far rows of one
    key in d per KV head, all rows of the halo (to the next rank) and of the sinks (from rank 0)."""
    shard = TOKENS // sp
    row = 2 * WIDTH * ITEM  # one key and one value
    # Far rows of a shard, each counted once per head, and those that halo and sinks add to them.
    heads = range(KV_HEADS)

    def rows(keys: range, always: set[int]) -> int:
        return sum(j in always or j % DEGREE == head % DEGREE for j in keys for head in heads)

    sent = run_ranks(bytes_on_rank, sp, free_port(), sp, "csa")
    for rank in range(sp):
        keys = range(rank * shard, (rank + 1) * shard)
        expected = 0
        for target in range(rank + 1, sp):
            halo = set(range(target * shard - HALO, target * shard))
            expected += rows(keys, halo | set(range(SINKS))) * row
        # The tail is on the last rank: its queries go to the others, which return (out, lse).
        if rank == sp - 1:
            expected += TAIL * HEADS * WIDTH * ITEM * (sp - 1)
        else:
            expected += TAIL * HEADS * (WIDTH * ITEM + 4)
        assert sent[rank] == expected
