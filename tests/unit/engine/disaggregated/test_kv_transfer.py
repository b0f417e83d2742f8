"""Transfers bring every head of every token to its decode rank, for any shapes of the pools."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.attention.csa.spans import local_kv_heads
from sps2_mega.engine.disaggregated.kv_transfer import (
    Destination,
    Manifest,
    plan_kv_transfers,
    receiving_ranks,
)
from sps2_mega.engine.disaggregated.kv_transfer_plan import Placement, head_cuts
from sps2_mega.parallel.rank_pools import RankPool
from sps2_mega.types import PrefillItem, SamplingParams

TP = [1, 2, 4, 8]


def fits(num_kv_heads, tp):
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


@st.composite
def pools(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6, 8]))
    tps = [tp for tp in TP if fits(heads, tp)]
    prefill = RankPool(
        name="prefill", first=0, tp=draw(st.sampled_from(tps)), sp=draw(st.integers(1, 4))
    )
    decode = RankPool(
        name="decode", first=prefill.size, tp=draw(st.sampled_from(tps)), sp=draw(st.integers(1, 3))
    )
    return heads, prefill, decode


def placed(draw, num_blocks, sp, next_ids):
    """Blocks on any ranks, each with an id of its own there."""
    ranks = draw(st.lists(st.integers(0, sp - 1), min_size=num_blocks, max_size=num_blocks))
    ids = []
    for rank in ranks:
        ids.append(next_ids[rank])
        next_ids[rank] += 1
    return Placement(ranks, ids)


@st.composite
def steps(draw):
    heads, prefill, decode = draw(pools())
    block_size = draw(st.sampled_from([1, 3, 4]))
    here, there = Counter(), Counter()
    items = []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 23))
        num_blocks = -(-length // block_size)
        source = placed(draw, num_blocks, prefill.sp, here)
        target = placed(draw, num_blocks, decode.sp, there)
        first = draw(st.integers(0, (length - 1) // block_size)) * block_size
        item = PrefillItem(
            number,
            list(range(length)),
            length,
            source.block_ranks,
            source.block_ids,
            SamplingParams(),
            0,
            start=(start := draw(st.integers(0, length - 1))),
            end=length,
            num_shared_tokens=start,
        )
        items.append((item, Destination(100 + number, first, target)))
    return heads, prefill, decode, block_size, items


def value(seq_id, position, head):
    return 1 + seq_id * 10_000 + position * 100 + head


def filled_prefill_pools(heads, prefill, block_size, items):
    """One array [slots, local heads] per prefill rank, 0 where no token is."""
    pools = {}
    for sp_rank in range(prefill.sp):
        for tp_rank in range(prefill.tp):
            own = local_kv_heads(heads, tp_rank=tp_rank, tp=prefill.tp)
            pool = np.zeros((400, len(own)), dtype=int)
            for item, _ in items:
                for position in range(item.end):
                    block = position // block_size
                    if item.block_ranks[block] == sp_rank:
                        slot = item.block_ids[block] * block_size + position % block_size
                        pool[slot] = [value(item.seq_id, position, head) for head in own]
            pools[sp_rank, tp_rank] = pool
    return pools


def chunked(items, num_chunks):
    """Passes over so many chunks of each sequence, of which the shortest may be empty."""
    passes = []
    for chunk in range(num_chunks):
        part = []
        for item, destination in items:
            size = -(-(item.end - item.start) // num_chunks)
            start = item.start + chunk * size
            end = min(item.end, start + size)
            if start < end:
                part.append((replace(item, start=start, end=end), destination))
        passes.append(part)
    return passes


def transfers_of(passes, **shapes):
    return [transfer for items in passes for transfer in plan_kv_transfers(items, **shapes)]


@given(steps(), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_every_head_of_every_token_arrives_once_where_it_belongs(step, num_chunks):
    heads, prefill, decode, block_size, items = step
    sources = filled_prefill_pools(heads, prefill, block_size, items)
    passes = chunked(items, num_chunks)
    targets = {
        rank: np.zeros(
            (400, len(local_kv_heads(heads, tp_rank=rank % decode.tp, tp=decode.tp))), int
        )
        for rank in range(decode.size)
    }
    complete: Counter = Counter()
    for (sp_rank, tp_rank), pool in sources.items():
        for transfer in transfers_of(
            passes,
            prefill=prefill,
            decode=decode,
            sp_rank=sp_rank,
            tp_rank=tp_rank,
            num_kv_heads=heads,
            block_size=block_size,
        ):
            manifest = Manifest.decode(transfer.manifest.encode())
            sent = slice(transfer.first_head, transfer.first_head + manifest.num_heads)
            kept = slice(manifest.first_head, manifest.first_head + manifest.num_heads)
            target = targets[transfer.dst - decode.first]
            assert not target[manifest.slots, kept].any(), "something arrives twice"
            target[manifest.slots, kept] = pool[transfer.slots, sent]
            for number, num_entries, total in manifest.handoffs:
                complete[number, transfer.dst, total] += num_entries
    expected = {rank: np.zeros_like(target) for rank, target in targets.items()}
    for item, destination in items:
        for position in range(destination.first, item.end):
            block = position // block_size
            slot = destination.placement.block_ids[block] * block_size + position % block_size
            for tp_rank in range(decode.tp):
                rank = tp_rank + decode.tp * destination.placement.block_ranks[block]
                own = local_kv_heads(heads, tp_rank=tp_rank, tp=decode.tp)
                expected[rank][slot] = [value(item.seq_id, position, head) for head in own]
    for rank, target in targets.items():
        assert np.array_equal(target, expected[rank])
    # What a receiver counts ends exactly when all is there, on exactly those ranks that the driver
    # waits for.
    assert all(entries == total for (_, _, total), entries in complete.items())
    for item, destination in items:
        told = {dst for handoff, dst, _ in complete if handoff == destination.handoff}
        waited = receiving_ranks(destination, item.end, decode=decode, block_size=block_size)
        assert sorted(told) == sorted(waited)


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("src_tp", TP)
@pytest.mark.parametrize("dst_tp", TP)
def test_ranks_with_the_same_head_take_turns(heads, src_tp, dst_tp):
    if not (fits(heads, src_tp) and fits(heads, dst_tp)):
        return
    cuts = head_cuts(heads, src_tp=src_tp, dst_tp=dst_tp)
    sent = Counter(cut.src for cut in cuts for _ in range(cut.count))
    assert max(sent.values()) <= -(-sum(sent.values()) // min(src_tp, len(sent)))
