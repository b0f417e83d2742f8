"""Exchanges that overlap with computation deliver every row to its place, in one part or many."""

from __future__ import annotations

import pytest
import torch
from harness import default_group, run_ranks

WIDTH = 100  # float32: 400 bytes a row, so 512 KiB are 1310 rows


def shard(rank, rows):
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH) + 1e6 * rank


def exchange_on_rank(rank, counts):
    from sps2_mega.comm.exchange import post_all_gather, post_shift
    from sps2_mega.parallel.groups import Group

    group = Group(rank=rank, size=len(counts), handle=default_group())
    mine, longest = shard(rank, counts[rank]), max(counts)
    before = group.traffic.bytes_sent
    came = post_shift(mine, counts[rank - 1], group)
    gathered = post_all_gather(mine, longest, group)  # both are under way at once
    sent = group.traffic.bytes_sent - before
    pending = came, gathered
    results = [each.wait() for each in pending]
    assert all(each.posted_at <= each.finished_at for each in pending)
    return [x.clone() for x in results], sent


@pytest.mark.parametrize(
    "counts", [(1, 1), (0, 0), (7, 0), (3001, 1), (2, 4000), (5000, 0, 2621)], ids=str
)
def test_every_row_arrives_whatever_the_parts(counts):
    size, longest = len(counts), max(counts)
    for rank, ((came, gathered), sent) in enumerate(run_ranks(exchange_on_rank, size, counts)):
        before = (rank - 1) % size
        assert torch.equal(came, shard(before, counts[before]))
        for source, rows in zip(range(size), gathered.view(size, longest, WIDTH), strict=True):
            assert torch.equal(rows[: counts[source]], shard(source, counts[source]))
            assert not rows[counts[source] :].any()
        assert sent == 4 * WIDTH * (counts[rank] + longest * (size - 1))
