"""Memory table: figures of every rank, and a warning where the largest step may not fit."""

from __future__ import annotations

from sps2_mega.engine.startup.memory_table import RankMemory, memory_table, shortage

GIB, MIB = 2**30, 2**20


def rank(free: int, weights: int = 3 * GIB) -> RankMemory:
    return RankMemory(weights=weights, kv_cache=7 * MIB, activations=GIB // 2, free=free)


def test_least_and_most_of_all_ranks_and_who_has_least() -> None:
    table = memory_table(
        [rank(2 * GIB), rank(GIB, weights=4 * GIB), rank(2000 * GIB)], cache_tokens_per_rank=65536
    )
    assert table.splitlines() == [
        "memory of 3 ranks:",
        "                  least          most",
        "  weights      3.00 GiB      4.00 GiB",
        "  KV cache     7.00 MiB      7.00 MiB  = 65,536 tokens on each SP rank",
        "  activations  0.50 GiB      0.50 GiB",
        "  free         1.00 GiB  2,000.00 GiB  least on rank 1",
    ]


def test_one_rank() -> None:
    lines = memory_table([rank(0)], cache_tokens_per_rank=1).splitlines()
    assert lines[0] == "memory of 1 rank:"
    assert lines[-1].split() == ["free", "0.00", "MiB", "0.00", "MiB"]


def test_where_ranks_do_different_things_the_cache_is_that_of_some() -> None:
    table = memory_table([rank(0)], cache_tokens_per_rank=48, pool="prefill")
    assert "= 48 tokens on each prefill SP rank" in table


def test_a_shortage_names_the_rank_and_the_amount() -> None:
    assert shortage([rank(0), rank(5)]) is None
    text = shortage([rank(9), rank(-GIB), rank(-3 * GIB)])
    assert text is not None and text.startswith("rank 2 may run out of memory")
    assert "up to 3.00 GiB more" in text


def test_facts_travel_as_text() -> None:
    assert RankMemory.decode(rank(-7).encode()) == rank(-7)
