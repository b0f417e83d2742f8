"""Calibration of links on real ranks: all exchanges that it times work, and all ranks agree."""

from __future__ import annotations

import types

import pytest
import torch
from harness import default_group, run_ranks


def links_on_rank(rank, size):
    from benchmarks.calibration.links import measured_links
    from sps2_mega.parallel.groups import Group

    group = Group(rank=rank, size=size, handle=default_group())
    timed = []

    def agreed(call, least=2):
        call()
        timed.append(least)
        return 0.01 * len(timed)

    timer = types.SimpleNamespace(
        control=group,
        device=torch.device("cpu"),
        dtype=torch.float32,
        agreed=agreed,
        finish=lambda: None,
    )
    (link,) = measured_links([group], timer)
    return link, len(timed)


@pytest.mark.parametrize("size", [2, 3])
def test_ring_exchange_stream_and_sum_are_timed_on_all_ranks(size):
    found = run_ranks(links_on_rank, size, size)
    links, counts = zip(*found, strict=True)
    assert len(set(links)) == 1 and set(counts) == {4}
    (link,) = set(links)
    assert link.latency_s > 0 and link.reduce_latency_s > 0 and link.bytes_per_s > 0
    # By this clock each takes longer than the one before; a stream moves what an exchange moves.
    assert link.stream_factor > link.exchange_factor > 1
