"""Messages between CPUs: matched in order, empty ones not sent, and a silent peer is an error."""

from __future__ import annotations

import os
import time

import pytest
import torch
from harness import RankError, default_group, run_ranks


def many_on_rank(rank, size):
    from sps2_mega.comm.messages import post_messages
    from sps2_mega.parallel.groups import Group

    group = Group(rank=rank, size=size, handle=default_group())
    posted = []
    for number in range(20):
        # Rows that rank r sends to p in exchange number n: sometimes none, once many.
        length = [[(r + 2 * p + number) % 4 * 7 for p in range(size)] for r in range(size)]
        length[0][size - 1] += 300_000 * (number == 3)
        sends = [(p, torch.full((length[rank][p],), 100.0 * number + rank)) for p in range(size)]
        receives = [(r, torch.empty(length[r][rank])) for r in range(size)]
        others = [p for p in range(size) if p != rank]
        work = post_messages([sends[p] for p in others], [receives[r] for r in others], group)
        posted.append((number, work, sends, receives))
    for number, work, _, receives in reversed(posted):  # in any order
        work.wait()
        assert work.get_future().done()
        for source, came in receives:
            assert source == rank or bool((came == 100 * number + source).all())
    return True


@pytest.mark.parametrize("size", [2, 3])
def test_messages_match_in_the_order_of_posting(size):
    assert run_ranks(many_on_rank, size, size) == [True] * size


def silent_on_rank(rank):
    from sps2_mega.comm.messages import post_messages
    from sps2_mega.parallel.groups import Group

    group = Group(rank=rank, size=2, handle=default_group(timeout_s=2))
    if rank == 1:
        time.sleep(4)
        return ""
    with pytest.raises(RuntimeError) as caught:
        post_messages([], [(1, torch.empty(5))], group).wait()
    return str(caught.value)


def test_a_silent_peer_ends_the_wait_with_the_group_timeout():
    message, _ = run_ranks(silent_on_rank, 2)
    assert "Timed out" in message


def gone_on_rank(rank, seen):
    from sps2_mega.comm.messages import post_messages
    from sps2_mega.parallel.groups import Group

    group = Group(rank=rank, size=2, handle=default_group())
    torch.distributed.barrier()
    if rank == 1:
        os._exit(9)
    with pytest.raises(RuntimeError) as caught:
        post_messages([], [(1, torch.empty(5))], group).wait()
    seen.write_text(str(caught.value))


def test_a_dead_peer_ends_the_wait(tmp_path):
    seen = tmp_path / "seen"
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(gone_on_rank, 2, seen)
    assert "Timed out" not in seen.read_text()
