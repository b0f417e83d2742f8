"""Groups made through Megatron's parallel state match the topology; collectives on ragged rows."""

from __future__ import annotations

import math
import os

import pytest
import torch
from harness import RankError, free_port, run_ranks

from sps2_mega.parallel.topology import build_topology


def join(rank, port, tp, sp, levels):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(tp=tp, sp=sp, sp_levels=levels))
    return initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)


def members_on_rank(rank, port, tp, sp, levels):
    import torch.distributed as dist

    from sps2_mega.mcore.init import finalize

    groups = join(rank, port, tp, sp, levels)

    def members(group):
        if group.handle is None:
            return [rank]
        listed = dist.get_process_group_ranks(group.handle)
        assert listed[group.rank] == rank
        assert group.size == len(listed)
        return listed

    found = [members(g) for g in (groups.tp, groups.sp, groups.control, *groups.sp_levels)]
    assert members(groups.sp_back) == members(groups.sp)
    # Another communicator, but one count of bytes sent.
    assert groups.sp_back.handle is not groups.sp.handle or groups.sp.size == 1
    assert groups.sp_back.traffic is groups.sp.traffic
    finalize()
    return found


@pytest.mark.parametrize(
    ("tp", "sp", "levels"), [(2, 2, None), (1, 4, (2, 2)), (1, 4, None), (4, 1, None)], ids=str
)
def test_members(tp, sp, levels):
    world = tp * sp
    results = run_ranks(members_on_rank, world, free_port(), tp, sp, levels)
    topology = build_topology(tp=tp, sp=sp, sp_levels=levels, nodes=["host"] * world)
    expected = [tp_groups(topology), topology.sp_groups(), [list(range(world))]]
    expected += [level_groups(topology, level) for level in range(len(topology.sp_levels))]
    for rank, found in enumerate(results):
        for listed, groups in zip(found, expected, strict=True):
            assert listed == next(group for group in groups if rank in group)


def tp_groups(topology):
    return [[s * topology.tp + t for t in range(topology.tp)] for s in range(topology.sp)]


def level_groups(topology, level):
    """World ranks that differ in coordinate `level` of their SP rank only."""
    stride, size = math.prod(topology.sp_levels[:level]), topology.sp_levels[level]
    return [
        [sp_group[first + i * stride] for i in range(size)]
        for sp_group in topology.sp_groups()
        for first in range(topology.sp)
        if first // stride % size == 0
    ]


def disagree_on_rank(rank, port):
    join(rank, port, 2 - rank, 1 + rank, None)


def test_ranks_that_disagree_are_told_before_any_collective():
    with pytest.raises(
        RankError, match=r"ranks disagree: rank 0 has tp=2 sp=1.*rank 1 has tp=1 sp=2"
    ):
        run_ranks(disagree_on_rank, 2, free_port())


def collectives_on_rank(rank, port):
    from sps2_mega.comm.collectives import (
        all_gather_last_dim,
        all_gather_rows,
        all_to_all_flat,
        broadcast_bytes,
        minimum,
    )
    from sps2_mega.mcore.init import finalize

    groups = join(rank, port, 1, 3, None)
    sp = groups.sp
    results = []
    for counts in ([2, 0, 5], [0, 0, 0], [3, 3, 3], [0, 1, 0]):
        rows = torch.full((counts[rank], 2, 3), float(rank))
        gathered = all_gather_rows(rows, counts, sp)
        results.append((tuple(gathered.shape), gathered[:, 0, 0].tolist()))
    sizes = [[1, 0, 4], [2, 2, 0], [0, 3, 1]]  # sizes[sender][receiver]
    sent = torch.cat([torch.full((n,), 10.0 * rank + to) for to, n in enumerate(sizes[rank])])
    received = all_to_all_flat(sent, sizes[rank], [row[rank] for row in sizes], sp)
    shard = torch.arange(4).view(2, 2) + 100 * rank
    whole = all_gather_last_dim(shard, sp)
    empty = all_gather_last_dim(shard[:0], sp)
    texts = []
    for payload in (b"", b"x" * 4088, b"y" * 4089, bytes(range(256)) * 100):
        texts.append(broadcast_bytes(payload if rank == 0 else None, groups.control) == payload)
    smallest = minimum(7 - rank, groups.control)
    finalize()
    return results, received.tolist(), whole.tolist(), tuple(empty.shape), texts, smallest


def test_collectives_on_ragged_rows():
    results = run_ranks(collectives_on_rank, 3, free_port())
    for rank, (gathered, received, whole, empty, texts, smallest) in enumerate(results):
        assert gathered == [
            ((7, 2, 3), [0.0] * 2 + [2.0] * 5),
            ((0, 2, 3), []),
            ((9, 2, 3), [0.0] * 3 + [1.0] * 3 + [2.0] * 3),
            ((1, 2, 3), [1.0]),
        ]
        assert (
            received
            == [
                [0.0, 10.0, 10.0],
                [11.0, 11.0, 21.0, 21.0, 21.0],
                [2.0, 2.0, 2.0, 2.0, 22.0],
            ][rank]
        )
        assert whole == [[0, 1, 100, 101, 200, 201], [2, 3, 102, 103, 202, 203]]
        assert empty == (0, 6)
        assert texts == [True] * 4
        assert smallest == 5


def test_one_rank_needs_no_communication():
    from sps2_mega.comm.collectives import (
        all_gather_last_dim,
        all_gather_rows,
        all_to_all_flat,
        broadcast_bytes,
        minimum,
    )
    from sps2_mega.parallel.groups import SINGLE

    x = torch.randn(3, 4)
    assert all_gather_rows(x, [3], SINGLE) is x
    assert all_to_all_flat(x.flatten(), [12], [12], SINGLE).shape == (12,)
    assert all_gather_last_dim(x, SINGLE) is x
    assert broadcast_bytes(b"plan", SINGLE) == b"plan"
    assert minimum(3, SINGLE) == 3
