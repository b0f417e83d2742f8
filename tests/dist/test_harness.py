"""The harness itself: results in order, and every failure of a rank is seen and named."""

from __future__ import annotations

import os
import signal
import time

import harness
import numpy as np
import pytest


def whoami(rank: int, suffix: str, *, scale: int = 1) -> tuple[int, str, str]:
    return rank * scale, suffix, os.environ["WORLD_SIZE"]


def add_rank(rank: int, array: np.ndarray) -> np.ndarray:
    return array + rank


def pid(rank: int) -> int:
    return os.getpid()


def raise_on(rank: int, culprit: int) -> str:
    if rank == culprit:
        raise ValueError(f"no good on {rank}")
    return "fine"


def raise_everywhere(rank: int) -> None:
    raise ValueError("refused")


def hang_on(rank: int, culprit: int) -> None:
    if rank == culprit:
        waits_for_ever()


def waits_for_ever() -> None:
    time.sleep(60)


def die_on(rank: int, culprit: int) -> None:
    if rank == culprit:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def sum_of_ranks(rank: int) -> float:
    import torch
    import torch.distributed as dist

    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=harness.default_group())
    return x.item()


def test_results_come_in_rank_order_with_arguments():
    assert harness.run_ranks(whoami, 3, "s", scale=10) == [
        (0, "s", "3"),
        (10, "s", "3"),
        (20, "s", "3"),
    ]


def test_large_arrays_travel_both_ways():
    array = np.arange(2_000_003, dtype=np.float64)
    first, second = harness.run_ranks(add_rank, 2, array)
    assert np.array_equal(first, array)
    assert np.array_equal(second, array + 1)


def test_pool_is_reused_and_evicted_by_the_process_limit():
    pids = harness.run_ranks(pid, 2)
    assert harness.run_ranks(pid, 2) == pids
    harness.run_ranks(pid, harness.MAX_PROCESSES)
    assert harness.run_ranks(pid, 2) != pids


def test_exception_of_one_rank_is_raised_with_its_traceback(monkeypatch):
    monkeypatch.setattr(harness, "GRACE_S", 0.5)
    with pytest.raises(harness.RankError, match="no good on 1") as caught:
        harness.run_ranks(raise_on, 2, 1)
    assert caught.value.rank == 1
    assert "in raise_on" in str(caught.value)
    assert harness.run_ranks(whoami, 2, "again")[1] == (1, "again", "2")


def test_pool_survives_a_refusal_on_which_all_ranks_agree():
    pids = harness.run_ranks(pid, 2)
    with pytest.raises(harness.RankError, match="refused"):
        harness.run_ranks(raise_everywhere, 2)
    assert harness.run_ranks(pid, 2) == pids


def test_hang_is_reported_with_stacks():
    started = time.monotonic()
    with pytest.raises(harness.RankError, match=r"no answer within 1 s from rank 1") as caught:
        harness.run_ranks(hang_on, 2, 1, timeout=1)
    assert "waits_for_ever" in str(caught.value)
    assert time.monotonic() - started < 10


def test_death_is_reported_with_signal_and_last_output(monkeypatch):
    monkeypatch.setattr(harness, "GRACE_S", 0.5)
    with pytest.raises(harness.RankError, match="killed by SIGKILL") as caught:
        harness.run_ranks(die_on, 2, 0)
    assert caught.value.rank == 0
    assert "last words" in str(caught.value)


def test_local_function_is_refused():
    with pytest.raises(TypeError, match="module-level"):
        harness.run_ranks(lambda rank: rank, 1)


def has_group(rank: int) -> bool:
    import torch

    return torch.distributed.is_initialized()


def test_each_call_finds_no_group_and_may_make_one():
    for _ in range(3):
        assert harness.run_ranks(sum_of_ranks, 2) == [1.0, 1.0]
        assert harness.run_ranks(has_group, 2) == [False, False]


def ranks_within_ranks(rank):
    harness.run_ranks(pid, 1)


def test_a_rank_starts_no_ranks():
    with pytest.raises(harness.RankError, match="a rank started ranks"):
        harness.run_ranks(ranks_within_ranks, 2)
